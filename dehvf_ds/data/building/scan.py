"""Shards written and scanned, by several processes, and the index of a directory of them.

A sample is a run of neighbouring members: the picture (``IMAGE_MEMBERS``; absent for a text-only row) and
``KEY.json``, the record; shards made by img2dataset may bring the caption as ``KEY.txt``. A scan gives every
sample one byte range and its CRC-32, so that a sample can be read at random and no changed byte goes
unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int32, Int64, UInt64
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from webdataset.writer import TarWriter

from dehvf_ds.atomic import atomic_file
from dehvf_ds.config import UserError
from dehvf_ds.data.images import decode_image
from dehvf_ds.data.index import FORMAT_VERSION, INDEX_NAME, LENGTHS_NAME, MANIFEST_NAME
from dehvf_ds.data.records import CheckedRecord, read_record, text_lengths
from dehvf_ds.data.shards import (
    BAD_NAME,
    KEY_TWICE,
    SIDE_BY_SIDE,
    UNDECODABLE,
    DamagedSample,
    ShardRow,
    parse_members,
    picture_name,
    sample_ranges,
)

LINE_EVERY_S = 30.0
"""How often progress is told where there is no terminal; a shorter build says nothing."""

Task = TypeVar("Task")
Result = TypeVar("Result")

_PLAIN_KEY = re.compile(r"[^./\s][^./\s]*")


class BadSample(NamedTuple):
    """A sample that was left out: a word to count it by, and the line that names it."""

    reason: str
    line: str


@dataclass(frozen=True, kw_only=True)
class ShardTable:
    """What a scan found in one shard.

    Attributes:
        rows: for each sample the offset and size of its members in bytes, its number of captions (0 for a row
            of another task) and the CRC-32 of its bytes.
        text_lengths: characters of each example's text, row by row: a caption each, or the row's whole text.
        key_hashes: 64 bits of a hash of each sample's key, to find keys that two shards share.
        num_bytes: size of the file.
        sha256: hash of the file.
        num_pictures: samples with a picture.
        tasks: samples by what they are for: ``caption``, ``chat``, ``scienceqa``.
        notes: what was put right in records, by a word each.
        bad: the samples that were left out; only with ``skip_bad``.
    """

    rows: Int64[np.ndarray, "samples 4"]
    text_lengths: Int32[np.ndarray, " examples"]
    key_hashes: UInt64[np.ndarray, " samples"]
    num_bytes: int
    sha256: str
    num_pictures: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    bad: tuple[BadSample, ...] = ()


def write_shard(rows: Iterable[ShardRow], path: Path) -> ShardTable:
    """Writes one shard and scans it; the same rows give the same bytes.

    The file gets its name when it is whole and on the disk: a shard of that name is a finished one.
    """
    with atomic_file(path) as part:
        # Fixed owner, mode and time: the bytes depend on the samples alone.
        owner = {"user": "dehvf", "group": "dehvf", "mode": 0o644, "mtime": 0}
        with part.open("wb") as file, TarWriter(file, encoder=False, compress=False, **owner) as writer:
            for row in rows:
                if not _PLAIN_KEY.fullmatch(row.key):
                    raise UserError(
                        f"key {row.key!r}: empty, or has a dot, slash or space, where WebDataset splits names"
                    )
                writer.write({"__key__": row.key, **row.members})
        return scan_shard(part, shown_as=path)


def scan_shard(
    path: Path, *, skip_bad: bool = False, decode: bool = False, shown_as: Path | None = None
) -> ShardTable:
    """Reads a whole shard once, in order, and checks every sample.

    A file that is no whole, uncompressed tar is a ``UserError``, and so is the first unusable sample, unless
    ``skip_bad`` leaves them out. Messages call the file ``shown_as``.
    """
    shown = shown_as or path
    good: dict[str, _Found] = {}
    bad: list[BadSample] = []
    seen: set[str] = set()

    def leave_out(error: DamagedSample) -> None:
        if not skip_bad:
            raise UserError(f"{error}; repair it, or leave such samples out with --skip-bad") from None
        bad.append(BadSample(error.reason, str(error)))

    with path.open("rb") as file:
        for key, begin, end, problem in sample_ranges(path, shown):
            file.seek(begin)
            data = file.read(end - begin)
            twice = DamagedSample(f"{shown}: key {key!r} is given to two samples; {SIDE_BY_SIDE}", KEY_TWICE)
            if key in good and not good[key].has_picture:
                # The rest of it, or another's: its picture may be what follows.
                leave_out(twice)
                del good[key]
            try:
                if problem is not None:
                    raise DamagedSample(f"{shown}: {problem}", BAD_NAME)
                if key in good:
                    raise twice
                checked, has_picture = check_sample(data, f"{shown}: sample {key}", decode=decode)
                if key in seen and not has_picture:
                    raise twice
            except DamagedSample as error:
                leave_out(error)
            else:
                captions, texts = text_lengths(checked.record)
                row = (begin, end - begin, captions, zlib.crc32(data))
                good[key] = _Found(row, texts, has_picture, checked.task, checked.notes)
            seen.add(key)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return ShardTable(
        rows=np.array([found.row for found in good.values()], dtype=np.int64).reshape(-1, 4),
        text_lengths=np.array([n for found in good.values() for n in found.texts], dtype=np.int32),
        key_hashes=hash_keys(good),
        num_bytes=path.stat().st_size,
        sha256=sha256,
        num_pictures=sum(found.has_picture for found in good.values()),
        tasks=Counter(found.task for found in good.values()),
        notes=Counter(note for found in good.values() for note in found.notes),
        bad=tuple(bad),
    )


class _Found(NamedTuple):
    """A usable sample of a shard."""

    row: tuple[int, int, int, int]
    texts: tuple[int, ...]
    has_picture: bool
    task: str
    notes: tuple[str, ...]


def check_sample(data: bytes, where: str, *, decode: bool) -> tuple[CheckedRecord, bool]:
    """A sample's record, and whether it has a picture; ``DamagedSample`` where it cannot be used."""
    members = parse_members(data, where)
    checked = read_record(members)
    picture = picture_name(members)
    if picture is not None and decode:
        check_picture(members[picture], where)
    return checked, picture is not None


def check_picture(data: bytes, where: str) -> None:
    """Decodes a picture, as small as its kind can be; a ``DamagedSample`` where it is not whole."""
    try:
        decode_image(data, shorter_side=1)
    except ValueError as error:
        raise DamagedSample(f"{where}: {error}", UNDECODABLE) from None


def hash_keys(keys: Iterable[str]) -> UInt64[np.ndarray, " keys"]:
    """64 bits of a hash of each key."""
    encoded = (key.encode("utf-8", "surrogateescape") for key in keys)
    digests = b"".join(hashlib.blake2b(key, digest_size=8).digest() for key in encoded)
    return np.frombuffer(digests, dtype="<u8")


def find_key(path: Path, key_hash: int) -> str:
    """The key of a shard that has this hash."""
    return next(r.key for r in sample_ranges(path, path) if int(hash_keys([r.key])[0]) == key_hash)


def shard_name(name: str, number: int) -> str:
    """File name of a builder's shard."""
    return f"{name}-{number:06d}.tar"


def write_index(
    directory: Path, names: Sequence[str], tables: Sequence[ShardTable], builder: dict[str, Any]
) -> dict[str, Any]:
    """Writes index, text lengths and, last, the manifest of finished shards; returns the manifest.

    ``names`` are the shards' file names in order, and ``builder`` is what made them.
    """
    if not sum(len(table.rows) for table in tables):
        raise UserError(f"{directory}: there is no sample to index; look at the arguments")
    prefixed = _keys_repeat(directory, names, tables)
    rows = np.concatenate([table.rows for table in tables])
    lengths = np.concatenate([table.text_lengths for table in tables])
    for file_name, array in ((INDEX_NAME, rows), (LENGTHS_NAME, lengths)):
        with atomic_file(directory / file_name) as part, part.open("wb") as file:
            np.save(file, array)
    manifest = {
        "format_version": FORMAT_VERSION,
        "num_samples": len(rows),
        "num_captions": int(rows[:, 2].sum()),
        "num_pictures": sum(table.num_pictures for table in tables),
        "tasks": dict(sorted(sum((table.tasks for table in tables), Counter()).items())),
        # Where shards number their keys anew, a sample's key is SHARD/KEY.
        "key_prefix": "shard" if prefixed else None,
        "shards": [
            {
                "name": name,
                "samples": len(table.rows),
                "examples": len(table.text_lengths),
                "bytes": table.num_bytes,
                "sha256": table.sha256,
            }
            for name, table in zip(names, tables, strict=True)
        ],
        "builder": builder,
    }
    with atomic_file(directory / MANIFEST_NAME) as part:
        part.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def run_tasks(
    function: Callable[[Task], Result], tasks: Sequence[Task], *, num_workers: int, title: str | None
) -> list[Result]:
    """Results of ``function(task)`` in the tasks' order, under a bar with this title (None: no bar).

    With one worker, or one task, in this process. An error ends everything; among several it is that of the
    earliest task, whatever the number of workers. No process outlives the call, however it ends.
    """
    if num_workers < 1:
        raise UserError(f"--num-workers {num_workers}: must be at least 1")
    several = min(num_workers, len(tasks)) > 1
    with warnings.catch_warnings(action="ignore"):
        # It warns of more workers than cores. They start before the bar, which starts a thread.
        found = iter(
            DataLoader(
                _Results(function, tasks),
                batch_size=None,
                collate_fn=lambda result: result,
                num_workers=num_workers if several else 0,
                multiprocessing_context="fork" if several else None,
            )
        )
    every = 0.1 if sys.stderr.isatty() else LINE_EVERY_S
    delays: dict[str, Any] = {"mininterval": every, "maxinterval": max(every, 10.0), "delay": every}
    results = []
    try:
        with tqdm(total=len(tasks), desc=title, unit=" shards", disable=title is None, **delays) as bar:
            for result in found:
                if isinstance(result, Exception):
                    raise result
                results.append(result)
                bar.update()
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        remedy = "is there enough memory? Call again, with a smaller --num-workers"
        raise UserError(f"a worker process was killed; {remedy}") from None
    finally:
        # The last reference: the workers end here.
        del found
    return results


class _Results(Dataset):
    """What a function makes of each task; a user's error is a result, for a worker's raise is a page."""

    def __init__(self, function: Callable[[Any], Any], tasks: Sequence[Any]):
        self._function = function
        self._tasks = tasks

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, number: int) -> Any:
        try:
            return self._function(self._tasks[number])
        except (UserError, OSError) as error:
            return error


def _keys_repeat(directory: Path, names: Sequence[str], tables: Sequence[ShardTable]) -> bool:
    """Whether two shards use the same key for different samples, as those that number their keys anew do.

    The same sample in two shards is a ``UserError``, for it would be learnt twice.
    """
    hashes = np.concatenate([table.key_hashes for table in tables])
    checks = np.concatenate([table.rows[:, 3] for table in tables])
    order = np.lexsort((checks, hashes))
    repeats = hashes[order[1:]] == hashes[order[:-1]]
    same = np.flatnonzero(repeats & (checks[order[1:]] == checks[order[:-1]]))
    if len(same):
        ends = np.cumsum([len(table.key_hashes) for table in tables])
        rows = order[same[0] : same[0] + 2]
        first, second = (names[int(i)] for i in np.searchsorted(ends, sorted(rows), side="right"))
        key = find_key(directory / first, int(hashes[rows[0]]))
        others = f" (and {len(same) - 1} others)" if len(same) > 1 else ""
        raise UserError(
            f"{directory}: sample {key!r}{others} stands in {first} and, the same bytes, in {second}; "
            "remove one of the two"
        )
    return bool(repeats.any())
