"""Whether the pictures of a finished build are still those that its shards were made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dehvf_ds.config import UserError
from dehvf_ds.data.building.left_out import Note
from dehvf_ds.data.building.pictures import ShardTask, read_rows
from dehvf_ds.data.building.plan import picture_sizes, stored_bytes
from dehvf_ds.data.building.sources import SourceRow
from dehvf_ds.data.manifest import INDEX_NAME
from dehvf_ds.data.shards import temporary_name, write_shard


def pictures_are_gone(rows: Sequence[SourceRow], note: Note) -> bool:
    """Whether no picture of a finished build is there any more, so that there is nothing to compare."""
    sizes = [size for row, size in zip(rows, picture_sizes(rows), strict=True) if row.image is not None]
    if sizes and all(size is None for size in sizes):
        note("the pictures are no longer there; they were not compared with the shards")
        return True
    return False


def check_unchanged(output: Path, manifest: dict[str, Any], tasks: Sequence[ShardTask]) -> None:
    """Refuses a finished build whose pictures are others now.

    A shard whose rows have their old sizes, and whose pictures were not touched since, is as it was; any
    other is made again beside it, and compared.
    """
    sizes = np.load(output / INDEX_NAME, mmap_mode="r")[:, 1]
    ends = np.cumsum([0, *(shard["samples"] for shard in manifest["shards"])]).tolist()
    numbers = {shard["name"]: number for number, shard in enumerate(manifest["shards"])}
    for task in tasks:
        number = numbers.get(task.path.name)
        stored = sizes[ends[number] : ends[number + 1]] if number is not None else sizes[:0]
        if _looks_unchanged(task, stored):
            continue
        promised = manifest["shards"][number]["sha256"] if number is not None else None
        if _sha256_now(task) != promised:
            named = [str(row.image or row.key) for row in (*task.rows[:1], *task.rows[-1:])]
            raise UserError(
                f"{output}: holds shards of other pictures: of {task.path.name} ({' .. '.join(named)}) one "
                "at least was changed, added or removed since; give another --output, or remove it"
            )
    if others := set(numbers) - {task.path.name for task in tasks}:
        raise UserError(
            f"{output}: holds shards of more pictures than there are now ({min(others)}); give another "
            "--output, or remove it"
        )


def _looks_unchanged(task: ShardTask, stored: np.ndarray) -> bool:
    if len(stored) != len(task.rows) or not task.path.is_file():
        return False
    if task.settings.shorter_side is None and stored.tolist() != [stored_bytes(row) for row in task.rows]:
        return False
    return not touched_since(task)


def touched_since(task: ShardTask) -> bool:
    """Whether a picture of a shard was written or replaced after it."""
    written = task.path.stat().st_mtime
    states = (row.image.stat() for row in task.rows if row.image is not None)
    # ctime: a picture that was replaced by an older file keeps that one's mtime.
    return any(max(state.st_mtime, state.st_ctime) > written for state in states)


def _sha256_now(task: ShardTask) -> str | None:
    """The hash that the shard would have if it were made now; None for one without a sample."""
    path = task.path.with_name(f"{task.path.name}.now")
    try:
        table = write_shard(read_rows(task, []), path)
        return table.sha256 if len(table.rows) else None
    finally:
        path.unlink(missing_ok=True)
        temporary_name(path).unlink(missing_ok=True)
