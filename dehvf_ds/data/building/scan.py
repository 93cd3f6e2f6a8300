"""One shard written and scanned, and what is left out of it.

A scan gives every sample one byte range and its CRC-32, so that a sample can be read at random and no changed
byte goes unnoticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt64
from webdataset.writer import TarWriter

from dehvf_ds.atomic import atomic_file
from dehvf_ds.config import UserError
from dehvf_ds.data.images import decode_image
from dehvf_ds.data.records import read_record, text_lengths
from dehvf_ds.data.shards import (
    BAD_NAME,
    BAD_RECORD,
    KEY_TWICE,
    SIDE_BY_SIDE,
    UNDECODABLE,
    DamagedSample,
    ShardRow,
    one_line,
    parse_members,
    picture_name,
    sample_ranges,
)

# Most rows that are named as left out.
MAX_NAMED = 20

_PLAIN_KEY = re.compile(r"[^./\s][^./\s]*")


class BadSample(NamedTuple):
    """A sample that was left out: its first byte, a word to count it by, and the line that names it."""

    offset: int
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
        notes: oddities of the records, with how often.
        bad: the samples that were left out; only with ``skip_bad``.
    """

    rows: Int64[np.ndarray, "samples 4"]
    text_lengths: Int32[np.ndarray, " examples"]
    key_hashes: UInt64[np.ndarray, " samples"]
    num_bytes: int
    sha256: str
    num_pictures: int
    tasks: Counter[str]
    notes: Counter[str]
    bad: tuple[BadSample, ...]


def note(line: str) -> None:
    """Prints a line that the user should read."""
    print(f"note: {line}", file=sys.stderr, flush=True)


class BadRows:
    """Rows that cannot be used: the first ends the build, or with ``skip`` all are left out.

    ``left_out`` has each one's name, line and reason to count by; ``notes`` counts the oddities of the rows
    that stay; ``remedy`` ends the line of the error.
    """

    def __init__(self, *, skip: bool, remedy: str = "repair it, or leave such rows out with --skip-bad"):
        self.left_out: list[tuple[str, str, str]] = []
        self.notes: Counter[str] = Counter()
        self._skip = skip
        self._remedy = remedy

    @property
    def counts(self) -> Counter[str]:
        """Rows left out, by reason."""
        return Counter(reason for _, _, reason in self.left_out)

    def add(self, name: str, line: str, reason: str) -> None:
        """Leaves a row out, or raises ``line``; the manifest keeps ``name``, which has no local paths."""
        if not self._skip:
            raise UserError(f"{line}; {self._remedy}")
        self.left_out.append((name, line, reason))

    @contextlib.contextmanager
    def row(self, name: str, where: str) -> Iterator[None]:
        """Adds the row that is read inside if its annotation has any mistake."""
        try:
            yield
        except DamagedSample as error:
            self.add(name, f"{where}: {error}", error.reason)
        except (UserError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            line = f"{where}: cannot be read: {type(error).__name__} {one_line(error)}"
            self.add(name, line, BAD_RECORD)

    def report(self, num_used: int) -> None:
        """Prints what was left out beside ``num_used`` rows, and the oddities of these."""
        for _, line, _ in self.left_out[:MAX_NAMED]:
            note(f"left out {line}")
        if total := len(self.left_out):
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
            note(f"left out {total} of {total + num_used}: {reasons}")
        for what, count in sorted(self.notes.items()):
            note(f"{count} times: {what}")

    def fields(self) -> dict[str, Any]:
        """What a manifest says of the rows that are not in the shards."""
        return {
            "left_out": len(self.left_out),
            "left_out_reasons": dict(sorted(self.counts.items())),
            "left_out_first": [name for name, _, _ in self.left_out[:MAX_NAMED]],
        }


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


class _Found(NamedTuple):
    """A usable sample of a shard."""

    row: tuple[int, int, int, int]
    texts: tuple[int, ...]
    has_picture: bool
    task: str
    notes: tuple[str, ...]


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

    def leave_out(offset: int, error: DamagedSample) -> None:
        if not skip_bad:
            raise UserError(f"{error}; repair it, or leave such samples out with --skip-bad") from None
        bad.append(BadSample(offset, error.reason, str(error)))

    with path.open("rb") as file:
        for key, begin, end, problem in sample_ranges(path, shown):
            file.seek(begin)
            data = file.read(end - begin)
            twice = DamagedSample(f"{shown}: key {key!r} is given to two samples; {SIDE_BY_SIDE}", KEY_TWICE)
            if key in good and not good[key].has_picture:
                # The rest of it, or another's: its picture may be what follows.
                leave_out(good.pop(key).row[0], twice)
            try:
                if problem is not None:
                    raise DamagedSample(f"{shown}: {problem}", BAD_NAME)
                if key in good:
                    raise twice
                found = _check_sample(data, begin, f"{shown}: sample {key}", decode=decode)
                if key in seen and not found.has_picture:
                    raise twice
                good[key] = found
            except DamagedSample as error:
                leave_out(begin, error)
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


def _check_sample(data: bytes, offset: int, where: str, *, decode: bool) -> _Found:
    members = parse_members(data, where)
    checked = read_record(members)
    picture = picture_name(members)
    if picture is not None and decode:
        check_picture(members[picture], where)
    captions, texts = text_lengths(checked.record)
    row = (offset, len(data), captions, zlib.crc32(data))
    return _Found(row, texts, picture is not None, checked.task, checked.notes)


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
