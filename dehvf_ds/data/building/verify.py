"""Everything read again, and what is not as the manifest and the index say."""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from dehvf_ds.config import UserError
from dehvf_ds.data.building.directory import Progress
from dehvf_ds.data.building.tasks import Advance, run_tasks
from dehvf_ds.data.damage import one_line
from dehvf_ds.data.manifest import INDEX_NAME, LENGTHS_NAME, MANIFEST_NAME, open_table, read_manifest
from dehvf_ds.data.members import parse_members
from dehvf_ds.data.records import text_lengths
from dehvf_ds.data.shards import check_sample, scan_shard


def verify_shards(
    directory: Path, *, decode: bool, num_workers: int, progress: Progress
) -> tuple[dict[str, Any], list[str]]:
    """Reads everything again: sizes, hashes, members, records, pictures, against manifest and index.

    Args:
        directory: a shard directory.
        decode: decode every picture.
        num_workers: processes.
        progress: counts samples.

    Returns:
        The manifest, and a line for each shard or sample that is damaged.

    Raises:
        UserError: manifest or index cannot be read at all.
    """
    manifest = read_manifest(directory)
    shards = manifest["shards"]
    rows = open_table(directory / INDEX_NAME, np.int64, (manifest["num_samples"], 4))
    lengths = open_table(directory / LENGTHS_NAME, np.int32, (sum(s["examples"] for s in shards),))
    tasks, first_row, first_text = [], 0, 0
    for shard in shards:
        end_row, end_text = first_row + shard["samples"], first_text + shard["examples"]
        expected = (np.array(rows[first_row:end_row]), np.array(lengths[first_text:end_text]))
        tasks.append(_CheckTask(directory / shard["name"], shard, *expected, decode))
        first_row, first_text = end_row, end_text
    progress.start(manifest["num_samples"])
    checked = run_tasks(_check_shard, tasks, num_workers=num_workers, advance=progress.advance)
    names = {shard["sha256"]: shard["name"] for shard in shards}
    problems = []
    for task, (sha256, lines) in zip(tasks, checked, strict=True):
        if lines and sha256 != task.promised["sha256"] and sha256 in names:
            lines = [f"{task.path}: holds what {MANIFEST_NAME} calls {names[sha256]}; copy it again"]
        problems.extend(lines)
    if manifest.get("num_captions") != int(np.sum(rows[:, 2])):
        problems.append(f"{directory / MANIFEST_NAME}: num_captions is not the sum over {INDEX_NAME}")
    return manifest, problems


@dataclass(frozen=True)
class _CheckTask:
    path: Path
    promised: dict[str, Any]
    rows: np.ndarray
    lengths: np.ndarray
    decode: bool


def _check_shard(task: _CheckTask, advance: Advance) -> tuple[str | None, list[str]]:
    """The shard's hash, if it can be read, and what is wrong with it."""
    path, promised = task.path, task.promised
    if not path.is_file():
        return None, [f"{path}: no such shard; copy it again"]
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            num_bytes = file.seek(0, os.SEEK_END)
            if num_bytes != promised["bytes"]:
                given = f"{MANIFEST_NAME} promises {promised['bytes']}"
                return sha256, [f"{path}: {num_bytes} bytes where {given}; copy it again"]
            same = sha256 == promised["sha256"]
            found = _sample_problems(task, file, advance, changed=not same)
        if same:
            return sha256, [*_index_problems(task), *found]
    except OSError as error:
        return None, [f"{path}: cannot be read: {error.strerror or one_line(error)}"]
    if found and len(found) < len(task.rows):
        return sha256, found
    return sha256, [f"{path}: its bytes are not those that {MANIFEST_NAME} was made of; copy it again"]


def _index_problems(task: _CheckTask) -> list[str]:
    """Compares a shard that is as it was built with what the index says of it."""
    try:
        table = scan_shard(task.path, skip_bad=True)
        if len(table.rows) > len(task.rows):
            # Pictures that cannot be decoded may have been left out.
            table = scan_shard(task.path, skip_bad=True, decode=True)
    except UserError as error:
        return [str(error)]
    kept = np.isin(task.rows[:, 0], table.rows[:, 0])
    if not kept.all() and np.array_equal(table.rows, task.rows[kept]):
        # The unusable ones among its samples are named one by one.
        return []
    if np.array_equal(table.rows, task.rows) and np.array_equal(table.text_lengths, task.lengths):
        return []
    name = INDEX_NAME if not np.array_equal(table.rows, task.rows) else LENGTHS_NAME
    directory = task.path.parent
    remedy = f"make it again: tools/build_shards.py index {directory} --overwrite"
    return [
        f"{directory / name}: not what {task.path.name} holds ({len(table.rows)} usable samples); {remedy}"
    ]


def _sample_problems(
    task: _CheckTask, file: io.BufferedReader, advance: Advance, *, changed: bool
) -> list[str]:
    problems = []
    for number, (offset, size, captions, checksum) in enumerate(task.rows.tolist()):
        where = f"{task.path}: sample {number}"
        advance(1)
        try:
            data = _read_range(file, offset, size, task.promised["bytes"])
            if len(data) != size or crc32(data) != checksum:
                # Where the shard is as it was, the index is what is wrong, and said to be.
                if changed:
                    problems.append(f"{where} {_key_in(data)}: not the bytes that the index was made of")
                continue
            where = f"{where} {_key_in(data)}"
            checked, _ = check_sample(data, where, decode=task.decode)
            if text_lengths(checked.record)[0] != captions:
                problems.append(f"{where}: not {captions} captions as {INDEX_NAME} says")
        except UserError as error:
            problems.append(str(error))
    return problems


def _read_range(file: io.BufferedReader, offset: int, size: int, num_bytes: int) -> bytes:
    """Bytes of a sample; none where a damaged index names a place outside the shard."""
    if offset < 0 or size < 0 or offset + size > num_bytes:
        return b""
    file.seek(offset)
    return file.read(size)


def _key_in(data: bytes) -> str:
    """The key at the beginning of a sample's bytes, if it can still be read."""
    try:
        return f"({parse_members(data, '')['__key__']})"
    except UserError:
        return "(its key cannot be read)"
