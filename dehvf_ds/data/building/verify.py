"""Shards that lie there already: those of other tools indexed, and those of a manifest read again."""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from dehvf_ds import __version__
from dehvf_ds.config import UserError
from dehvf_ds.data.building.scan import check_sample, run_tasks, scan_shard, write_index
from dehvf_ds.data.building.sources import BadRows, note
from dehvf_ds.data.building.writer import PLAN_NAME, alone_in
from dehvf_ds.data.index import (
    INDEX_NAME,
    LENGTHS_NAME,
    MANIFEST_NAME,
    PLAIN_FILE_NAME,
    open_tables,
    read_manifest,
)
from dehvf_ds.data.shards import DamagedSample, one_line, parse_members

_PACKED = re.compile(
    r".+\.(?:tar\.(?:gz|bz2|xz|zst|zstd|lz4|lzma|lzo|z|br)|tgz|tbz2?|txz|tzst)", re.IGNORECASE
)


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
            for reason, line in table.bad:
                bad.add(line.removeprefix(f"{directory}/"), line, reason)
        bad.tell(sum(len(table.rows) + len(table.bad) for table in tables))
        builder = {"source": "index", "skip_bad": skip_bad, "version": __version__, **bad.fields()}
        manifest = write_index(directory, [path.name for path in paths], tables, builder)
    if manifest["key_prefix"]:
        note("the shards number their keys anew; a sample's key is SHARD/KEY")
    return manifest


def verify_shards(directory: Path, *, decode: bool, num_workers: int) -> tuple[dict[str, Any], list[str]]:
    """Reads everything again, against manifest and index; returns a line for each damaged shard or sample."""
    manifest = read_manifest(directory)
    shards = manifest["shards"]
    rows, lengths = open_tables(directory, manifest)
    tasks, first_row, first_text = [], 0, 0
    for shard in shards:
        end_row, end_text = first_row + shard["samples"], first_text + shard["examples"]
        expected = (np.array(rows[first_row:end_row]), np.array(lengths[first_text:end_text]))
        tasks.append(_Promise(directory / shard["name"], shard["sha256"], *expected, decode))
        first_row, first_text = end_row, end_text
    checked = run_tasks(_check_shard, tasks, num_workers=num_workers, title="Checking shards")
    names = {shard["sha256"]: shard["name"] for shard in shards}
    problems = []
    for task, (sha256, lines) in zip(tasks, checked, strict=True):
        if sha256 != task.sha256 and sha256 in names:
            lines = [f"{task.path}: holds what {MANIFEST_NAME} calls {names[sha256]}; copy it again"]
        problems.extend(lines)
    if manifest.get("num_captions") != int(np.sum(rows[:, 2])):
        problems.append(f"{directory / MANIFEST_NAME}: num_captions is not the sum over {INDEX_NAME}")
    return manifest, problems


def _find_shards(directory: Path, *, overwrite: bool) -> list[Path]:
    """The shards to index; a note or an error names what looks like a shard and is none of them."""
    if (directory / MANIFEST_NAME).is_file() and not overwrite:
        raise UserError(f"{directory}: {MANIFEST_NAME} is there already; --overwrite indexes anew")
    if (directory / PLAN_NAME).is_file() and not (directory / MANIFEST_NAME).is_file():
        raise UserError(f"{directory}: holds a build that is not finished; the call that began it goes on")
    files = [p for p in sorted(directory.rglob("*")) if not p.name.startswith(".") and p.is_file()]
    tars = [path for path in files if path.suffix.lower() == ".tar"]
    packed = [path for path in files if _PACKED.fullmatch(path.name)]
    packed = [p for p in packed if not {p.with_suffix(""), p.with_suffix(".tar")}.intersection(tars)]
    if here := [path.name for path in packed if path.parent == directory]:
        others = f" (and {len(here) - 1} others)" if len(here) > 1 else ""
        unpack = "is compressed, and samples are read at random: unpack it to .tar (gunzip, zstd -d, ..)"
        raise UserError(f"{directory}: {here[0]}{others} {unpack}")
    paths = [path for path in tars if path.parent == directory]
    below = sorted(str(path.parent) for path in (*tars, *packed) if path.parent != directory)
    if below:
        note(f"not indexed: {len(below)} tars in folders below, as {below[0]}; index each folder by itself")
    if not paths:
        raise UserError(f"{directory}: holds no *.tar")
    if odd := [path for path in paths if not PLAIN_FILE_NAME.fullmatch(path.name)]:
        raise UserError(f"{odd[0]}: a shard's name has letters, digits and ._=- only; rename it")
    return paths


@dataclass(frozen=True)
class _Promise:
    """What manifest and index say of a shard, and whether to decode its pictures."""

    path: Path
    sha256: str
    rows: np.ndarray
    lengths: np.ndarray
    decode: bool


def _check_shard(task: _Promise) -> tuple[str | None, list[str]]:
    """The shard's hash, if it can be read, and what is wrong with it."""
    try:
        with task.path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if sha256 == task.sha256:
                return sha256, _compare_with_index(task, file)
            same = [crc32(_read_range(file, row)) == row[3] for row in task.rows]
    except OSError as error:
        return None, [f"{task.path}: cannot be read: {error.strerror or one_line(error)}; copy it again"]
    except UserError as error:
        return task.sha256, [str(error)]
    numbers = [number for number, is_same in enumerate(same) if not is_same]
    changed = f"{len(numbers)} of {len(same)} samples changed, as {numbers[:1]}"
    promised = f"its bytes are not those that {MANIFEST_NAME} was made of ({changed}); copy it again"
    return sha256, [f"{task.path}: {promised}"]


def _compare_with_index(task: _Promise, file: io.BufferedReader) -> list[str]:
    """What is wrong with the index of a shard that is as it was made, and with the samples of the index."""
    table = scan_shard(task.path, skip_bad=True, decode=task.decode)
    usable = np.isin(task.rows[:, 0], table.rows[:, 0])
    indexed = np.isin(table.rows[:, 0], task.rows[:, 0])
    # The index may hold samples that are damaged, and may lack those whose picture cannot be decoded.
    problems = [_problem(task.path, file, row, decode=task.decode) for row in task.rows[~usable]]
    left_out = [_problem(task.path, file, row, decode=True) for row in table.rows[~indexed]]
    wrong = ""
    if not np.array_equal(task.rows[usable], table.rows[indexed]) or "" in (*problems, *left_out):
        wrong = INDEX_NAME
    elif usable.all():
        examples = np.repeat(indexed, np.maximum(table.rows[:, 2], 1))
        wrong = "" if np.array_equal(table.text_lengths[examples], task.lengths) else LENGTHS_NAME
    if wrong:
        remedy = f"make it again: tools/build_shards.py index {task.path.parent} --overwrite"
        problems.append(f"{task.path.with_name(wrong)}: not what {task.path.name} holds; {remedy}")
    return list(filter(None, problems))


def _problem(path: Path, file: io.BufferedReader, row: np.ndarray, *, decode: bool) -> str:
    """Why a sample cannot be used; empty where it can, or where the index does not know these bytes."""
    data = _read_range(file, row)
    if crc32(data) != row[3]:
        return ""
    try:
        key = parse_members(data, f"{path}: a sample")["__key__"]
        check_sample(data, f"{path}: sample {key}", decode=decode)
    except DamagedSample as error:
        return str(error)
    return ""


def _read_range(file: io.BufferedReader, row: np.ndarray) -> bytes:
    """Bytes of a sample; none where a damaged index names a place outside the shard."""
    offset, size = int(row[0]), int(row[1])
    if offset < 0 or size < 0 or offset + size > file.seek(0, io.SEEK_END):
        return b""
    file.seek(offset)
    return file.read(size)
