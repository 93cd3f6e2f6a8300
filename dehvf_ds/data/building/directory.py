"""A directory of shards: written by one call at a time, in several processes; indexed, and read again."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from dehvf_ds import __version__
from dehvf_ds.atomic import atomic_file, sha256_of
from dehvf_ds.config import UserError
from dehvf_ds.data.building.scan import BadRows, ShardTable, find_key, note, scan_shard
from dehvf_ds.data.index import (
    FORMAT_VERSION,
    INDEX_NAME,
    LENGTHS_NAME,
    MANIFEST_NAME,
    PLAIN_FILE_NAME,
    open_tables,
    read_manifest,
)
from dehvf_ds.data.shards import one_line

PLAN_NAME = ".build.json"
"""Arguments of a build that is not finished; the manifest takes them over."""

LINE_EVERY_S = 30.0
"""How often progress is printed where there is no terminal; a shorter build prints none."""

Task = TypeVar("Task")
Result = TypeVar("Result")

_PACKED = re.compile(
    r".+\.(?:tar\.(?:gz|bz2|xz|zst|zstd|lz4|lzma|lzo|z|br)|tgz|tbz2?|txz|tzst)", re.IGNORECASE
)


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Keeps a second writer out of a directory while this one lives; removes half-written files."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some file systems have no locks.
        if isinstance(error, BlockingIOError):
            os.close(descriptor)
            raise UserError(f"{directory}: another call is writing here; wait for it") from None
    try:
        yield
    finally:
        for path in filter(is_part, directory.iterdir()):
            path.unlink(missing_ok=True)
        os.close(descriptor)


def is_part(path: Path) -> bool:
    """Whether a file is one that was being written."""
    return path.name.startswith(".") and path.name.endswith(".part")


def adopt_shards(
    directory: Path, *, skip_bad: bool, overwrite: bool, decode: bool, num_workers: int
) -> dict[str, Any]:
    """Indexes all ``*.tar`` of a directory, in the order of their names; returns the manifest.

    Shards are as img2dataset and other tools of WebDataset write them; other files are left alone. Where
    shards number their keys anew, a sample's key becomes SHARD/KEY.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    with alone_in(directory):
        paths = _find_shards(directory, overwrite=overwrite)
        scan = partial(scan_shard, skip_bad=skip_bad, decode=decode)
        tables = run_tasks(scan, paths, num_workers=num_workers, title="Reading shards")
        bad = BadRows(skip=True)
        for table in tables:
            bad.notes.update(table.notes)
            for _, reason, line in table.bad:
                bad.add(line.removeprefix(f"{directory}/"), line, reason)
        bad.report(sum(len(table.rows) for table in tables))
        builder = {"source": "index", "skip_bad": skip_bad, "version": __version__, **bad.fields()}
        manifest = write_index(directory, [path.name for path in paths], tables, builder)
    if manifest["key_prefix"]:
        note("the shards number their keys anew; a sample's key is SHARD/KEY")
    return manifest


def _find_shards(directory: Path, *, overwrite: bool) -> list[Path]:
    """The shards to index; a note names what looks like a shard and is not indexed."""
    if (directory / MANIFEST_NAME).is_file() and not overwrite:
        raise UserError(f"{directory}: {MANIFEST_NAME} already exists; --overwrite rebuilds the index")
    if (directory / PLAN_NAME).is_file() and not (directory / MANIFEST_NAME).is_file():
        raise UserError(f"{directory}: holds an unfinished build; the call that began it finishes it")
    files = [p for p in sorted(directory.rglob("*")) if not p.name.startswith(".") and p.is_file()]
    tars = [path for path in files if path.suffix.lower() == ".tar"]
    packed = [path for path in files if _PACKED.fullmatch(path.name)]
    packed = [p for p in packed if not {p.with_suffix(""), p.with_suffix(".tar")}.intersection(tars)]
    if here := [path.name for path in packed if path.parent == directory]:
        others = f" (and {len(here) - 1} others)" if len(here) > 1 else ""
        unpack = "compressed, and samples are read at random: unpack it to .tar (gunzip, zstd -d, ..)"
        raise UserError(f"{directory}: {here[0]}{others} is {unpack}")
    paths = [path for path in tars if path.parent == directory]
    if others := sorted({*tars, *packed}.difference(paths)):
        remedy = "unpack what is compressed to .tar, and index each folder below by itself"
        note(f"not indexed: {len(others)} other shards, as {others[0]}; {remedy}")
    if not paths:
        raise UserError(f"{directory}: holds no *.tar")
    if odd := [path for path in paths if not PLAIN_FILE_NAME.fullmatch(path.name)]:
        raise UserError(f"{odd[0]}: a shard's name has letters, digits and ._=- only; rename it")
    return paths


class _Expected(NamedTuple):
    """What manifest and index say of a shard."""

    path: Path
    sha256: str
    rows: np.ndarray
    lengths: np.ndarray


def verify_shards(directory: Path, *, decode: bool, num_workers: int) -> tuple[dict[str, Any], list[str]]:
    """Reads everything again, against manifest and index; returns a line for each damaged shard or sample."""
    manifest = read_manifest(directory)
    shards = manifest["shards"]
    rows, lengths = open_tables(directory, manifest)
    row_ends, text_ends = (np.cumsum([shard[name] for shard in shards]) for name in ("samples", "examples"))
    tasks = [
        _Expected(directory / shard["name"], shard["sha256"], *expected)
        for shard, *expected in zip(
            shards, np.split(rows, row_ends[:-1]), np.split(lengths, text_ends[:-1]), strict=True
        )
    ]
    check = partial(_check_shard, decode=decode)
    found = run_tasks(check, tasks, num_workers=num_workers, title="Checking shards")
    problems = [line for lines in found for line in lines]
    if manifest.get("num_captions") != int(np.sum(rows[:, 2])):
        problems.append(f"{directory / MANIFEST_NAME}: num_captions is not the sum over {INDEX_NAME}")
    return manifest, problems


def _check_shard(shard: _Expected, *, decode: bool) -> list[str]:
    """What is wrong with a shard, with the index of it, or with the samples in the index."""
    path, sha256, rows, lengths = shard
    try:
        if sha256_of(path) != sha256:
            return [f"{path}: its bytes are not those that {MANIFEST_NAME} was made of; copy it again"]
        table = scan_shard(path, skip_bad=True, decode=decode)
        if not decode and len(table.rows) > len(rows):
            # Samples that the index leaves out because their pictures cannot be decoded.
            table = scan_shard(path, skip_bad=True, decode=True)
    except OSError as error:
        return [f"{path}: cannot be read: {error.strerror or one_line(error)}; copy it again"]
    except UserError as error:
        return [str(error)]
    bad = {sample.offset: sample.line for sample in table.bad}
    # An index that was made without decoding holds pictures that cannot be decoded.
    problems = [bad[offset] for offset in rows[:, 0].tolist() if offset in bad]
    wrong = ""
    if not np.array_equal(rows[~np.isin(rows[:, 0], list(bad))], table.rows):
        wrong = INDEX_NAME
    elif not problems and not np.array_equal(lengths, table.text_lengths):
        wrong = LENGTHS_NAME
    if wrong:
        remedy = f"make it again: tools/build_shards.py index {path.parent} --overwrite"
        problems.append(f"{path.with_name(wrong)}: not what {path.name} holds; {remedy}")
    return problems


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


def _keys_repeat(directory: Path, names: Sequence[str], tables: Sequence[ShardTable]) -> bool:
    """Whether two shards use the same key for different samples, as those that number their keys anew do.

    The same sample in two shards is a ``UserError``, for it would be learnt twice.
    """
    hashes = np.concatenate([table.key_hashes for table in tables])
    checks = np.concatenate([table.rows[:, 3] for table in tables])
    shard_of = np.repeat(np.array(names), [len(table.rows) for table in tables])
    order = np.lexsort((checks, hashes))
    repeats = hashes[order[1:]] == hashes[order[:-1]]
    same = np.flatnonzero(repeats & (checks[order[1:]] == checks[order[:-1]]))
    if len(same):
        first, second = sorted(order[same[0] : same[0] + 2])
        key = find_key(directory / shard_of[first], int(hashes[first]))
        raise UserError(
            f"{directory}: sample {key!r} is in {shard_of[first]} and, with the same bytes, in "
            f"{shard_of[second]}; remove one of the two"
        )
    return bool(repeats.any())


def run_tasks(
    function: Callable[[Task], Result], tasks: Sequence[Task], *, num_workers: int, title: str
) -> list[Result]:
    """Results of ``function(task)`` in the tasks' order, under a progress bar.

    With one worker, or one task, in this process. An error ends everything; among several it is that of the
    earliest task, whatever the number of workers. No process outlives the call, however it ends.
    """
    several = min(num_workers, len(tasks)) > 1
    with warnings.catch_warnings(action="ignore"):
        # It warns of more workers than cores. They start before the bar, which starts a thread.
        found = iter(
            DataLoader(
                tasks,  # pyright: ignore[reportArgumentType]
                batch_size=None,
                collate_fn=partial(_result_or_error, function),
                num_workers=num_workers if several else 0,
                multiprocessing_context="fork" if several else None,
            )
        )
    every = 0.1 if sys.stderr.isatty() else LINE_EVERY_S
    delays: dict[str, Any] = {"mininterval": every, "maxinterval": max(every, 10.0), "delay": every}
    results = []
    try:
        with tqdm(total=len(tasks), desc=title, unit=" shards", **delays) as bar:
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


def _result_or_error(function: Callable[[Any], Any], task: Any) -> Any:
    """A user's error as a result: raised in a worker, it would come with a page of traceback."""
    try:
        return function(task)
    except (UserError, OSError) as error:
        return error
