"""The files beside the shards of a directory: what they promise, written and read.

``index.npy`` (``ShardTable.rows`` of all shards), ``text_lengths.npy``, and ``manifest.json``, which is
written last and vouches for all.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dehvf_ds.config import UserError, looked_in
from dehvf_ds.data.damage import one_line
from dehvf_ds.data.shards import ShardTable, find_key, publish, temporary_name

FORMAT_VERSION = 3
OLDER_VERSIONS = (2,)
"""Read, too: without the counts of pictures and tasks, so that rows are checked as they are read only."""

MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npy"
LENGTHS_NAME = "text_lengths.npy"
PLAIN_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._=-]*")


def shard_name(name: str, number: int) -> str:
    """File name of a builder's shard."""
    return f"{name}-{number:06d}.tar"


def write_index(
    directory: Path, names: Sequence[str], tables: Sequence[ShardTable], builder: dict[str, Any]
) -> dict[str, Any]:
    """Writes index, text lengths and, last, the manifest of finished shards.

    Args:
        directory: where the shards lie.
        names: their file names, in order.
        tables: their scans.
        builder: what made them, kept in the manifest.

    Returns:
        The manifest.

    Raises:
        UserError: there is no sample, or a sample stands in two shards.
    """
    if not sum(len(table.rows) for table in tables):
        raise UserError(f"{directory}: there is no sample to index; look at the arguments")
    prefixed = _keys_repeat(directory, names, tables)
    arrays = {
        INDEX_NAME: np.concatenate([table.rows for table in tables]),
        LENGTHS_NAME: np.concatenate([table.text_lengths for table in tables]),
    }
    for file_name, array in arrays.items():
        with temporary_name(directory / file_name).open("wb") as file:
            np.save(file, array)
        publish(directory / file_name)
    manifest = {
        "format_version": FORMAT_VERSION,
        "num_samples": len(arrays[INDEX_NAME]),
        "num_captions": int(arrays[INDEX_NAME][:, 2].sum()),
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
    path = directory / MANIFEST_NAME
    temporary_name(path).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    publish(path)
    return manifest


def read_manifest(directory: Path) -> dict[str, Any]:
    """Reads a shard directory's manifest and checks what is needed of it.

    Raises:
        UserError: it is missing, of another format version, or damaged.
    """
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        where = looked_in(directory)
        raise UserError(f"{directory}: no such directory{where}; build shards with tools/build_shards.py")
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; build shards with tools/build_shards.py (it is written last), or index "
            f"those of another tool: tools/build_shards.py index {directory}"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, num_samples = manifest["format_version"], manifest["num_samples"]
        if version not in (FORMAT_VERSION, *OLDER_VERSIONS):
            raise UserError(
                f"{path}: format version {version}, this program reads {FORMAT_VERSION}; make it again: "
                f"tools/build_shards.py index {directory} --overwrite"
            )
        samples = 0
        for shard in manifest["shards"]:
            samples += int(shard["samples"])
            if not PLAIN_FILE_NAME.fullmatch(shard["name"]):
                raise ValueError(f"shard name {shard['name']!r} is not a plain file name")
            _ = int(shard["examples"]), int(shard["bytes"]), str(shard["sha256"])
        if version == FORMAT_VERSION:
            _ = int(manifest["num_pictures"]), dict(manifest["tasks"])
            if manifest["key_prefix"] not in (None, "shard"):
                raise ValueError(f"key_prefix {manifest['key_prefix']!r}")
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__} {one_line(error)}"
        raise UserError(f"{path}: not a manifest of shards: {reason}; make it again") from None
    if num_samples != samples:
        raise UserError(f"{path}: num_samples {num_samples} is not the sum over its shards; make it again")
    if num_samples < 1:
        raise UserError(f"{path}: names no sample; make it again")
    return manifest


def open_table(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """Maps ``index.npy`` or ``text_lengths.npy``; nothing is read yet.

    Raises:
        UserError: it is missing, no array, or not of the dtype and shape that the manifest promises.
    """
    remedy = f"make it again: tools/build_shards.py index {path.parent} --overwrite"
    if not path.is_file():
        raise UserError(f"{path}: no such file; {remedy}")
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: not an index: {one_line(error)}; {remedy}") from None
    if table.shape != shape or table.dtype != dtype:
        promised = f"{MANIFEST_NAME} promises {np.dtype(dtype)} {shape}"
        raise UserError(f"{path}: {table.dtype} {table.shape} where {promised}; copy both again")
    return table


def _keys_repeat(directory: Path, names: Sequence[str], tables: Sequence[ShardTable]) -> bool:
    """Whether two shards use the same key for different samples, as those that number their keys anew do.

    Raises:
        UserError: it is the same sample, for it would be learnt twice; or one shard stands there twice.
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
