"""Shards written from rows, by several processes.

One shard is one task, and the plan alone decides its bytes. A shard has its name only when it is whole, so a
second call after whatever ended the first keeps the finished ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from dehvf_ds import __version__
from dehvf_ds.config import UserError
from dehvf_ds.data.building.directory import (
    Progress,
    alone_in,
    begin,
    check_begun,
    finished_manifest,
    remove_leftovers,
    remove_parts,
    write_error,
)
from dehvf_ds.data.building.left_out import MAX_NAMED, BadRows, Note
from dehvf_ds.data.building.pictures import ShardTask, read_rows
from dehvf_ds.data.building.plan import BuildSettings, plan_shards, stored_bytes
from dehvf_ds.data.building.sources import SourceRow
from dehvf_ds.data.building.tasks import Advance, run_tasks
from dehvf_ds.data.building.unchanged import check_unchanged, pictures_are_gone, touched_since
from dehvf_ds.data.damage import UNDECODABLE, one_line
from dehvf_ds.data.manifest import PLAIN_FILE_NAME, shard_name, write_index
from dehvf_ds.data.shards import (
    ShardTable,
    hash_keys,
    scan_shard,
    temporary_name,
    write_shard,
)


def build_shards(
    rows: Sequence[SourceRow],
    output: Path,
    *,
    name: str,
    settings: BuildSettings,
    facts: dict[str, Any],
    num_workers: int,
    progress: Progress,
    note: Note,
    bad: BadRows | None = None,
) -> tuple[dict[str, Any], bool]:
    """Builds a shard directory, or goes on with one that the same arguments began.

    A finished one is left alone where its pictures are as they were: those whose size is another, or which
    were touched since, are read and compared.

    Args:
        rows: the samples, in the order in which they are stored.
        output: the directory; created.
        name: the shards' name before ``-%06d.tar``.
        settings: how rows become shards.
        facts: what the rows were read from, without this machine's paths; kept in the manifest.
        num_workers: processes.
        progress: counts samples.
        note: told what was left out and what was built again.
        bad: takes rows that cannot be used, after those that were left out in reading the annotations.

    Returns:
        The manifest, and whether it was there already.

    Raises:
        UserError: the directory holds something else, a picture is missing, bad or another than in the
            shards, the disk is full.
    """
    bad = bad or BadRows(skip=settings.skip_bad)
    num_rows = len(rows) + sum(bad.counts.values())
    if not PLAIN_FILE_NAME.fullmatch(name):
        raise UserError(f"--name {name!r}: letters, digits, _ and - only")
    if not rows:
        bad.tell(note, num_rows)
        raise UserError("there is no sample to write; look at the arguments")
    builder = _describe(rows, name, settings, facts)
    output.mkdir(parents=True, exist_ok=True)
    with alone_in(output):
        finished = finished_manifest(output, builder)
        if finished is None:
            check_begun(output, builder)
        elif pictures_are_gone(rows, note):
            remove_leftovers(output)
            return finished, True
        plan = plan_shards(rows, settings, bad)
        tasks = [
            ShardTask(output / shard_name(name, number), tuple(shard), settings)
            for number, shard in enumerate(plan)
        ]
        if finished is not None:
            check_unchanged(output, finished, tasks)
            remove_leftovers(output)
            return finished, True
        progress.start(sum(len(shard) for shard in plan))
        try:
            begin(output, builder)
            built = run_tasks(_build_shard, tasks, num_workers=num_workers, advance=progress.advance)
            for line in [line for shard in built for line in shard.notes][:MAX_NAMED]:
                note(line)
            for key, line in (row for shard in built for row in shard.left_out):
                bad.add(key, line, UNDECODABLE)
            bad.tell(note, num_rows)
            manifest = _finish(output, tasks, built, {**builder, **bad.fields()})
        except OSError as error:
            raise write_error(error, output) from error
        finally:
            remove_parts(output)
        remove_leftovers(output)
    return manifest, False


@dataclass(frozen=True)
class _BuiltShard:
    """A shard's scan, the rows whose picture cannot be decoded (key and line), and notes for the user."""

    table: ShardTable
    left_out: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def _build_shard(task: ShardTask, advance: Advance) -> _BuiltShard:
    notes: list[str] = []
    if task.path.exists():
        table, reason = _finished_table(task)
        if table is not None:
            advance(len(task.rows))
            there = set(table.key_hashes.tolist())
            hashes = hash_keys(row.key for row in task.rows).tolist()
            rows = [row for row, value in zip(task.rows, hashes, strict=True) if value not in there]
            left_out = [(row.key, f"{row.image}: not a readable picture") for row in rows]
            return _BuiltShard(table, tuple(left_out), ())
        notes.append(f"{task.path}: built again ({reason})")
    left_out: list[tuple[str, str]] = []
    try:
        table = write_shard(read_rows(task, left_out, advance), task.path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary_name(task.path).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(error, task.path) from error
        raise
    return _BuiltShard(table, tuple(left_out), tuple(notes))


def _finished_table(task: ShardTask) -> tuple[ShardTable | None, str]:
    """The scan of a shard that is there, or None and why it is not the planned one."""
    try:
        table = scan_shard(task.path)
        if touched_since(task):
            return None, "a picture is newer than the shard"
    except (UserError, OSError) as error:
        return None, one_line(error)
    keys = hash_keys(row.key for row in task.rows)
    sizes = np.array([stored_bytes(row) for row in task.rows])
    if task.settings.skip_bad:
        there = np.isin(keys, table.key_hashes)
        keys, sizes = keys[there], sizes[there]
    if not np.array_equal(keys, table.key_hashes):
        return None, "it held other samples"
    if task.settings.shorter_side is None and not np.array_equal(sizes, table.rows[:, 1]):
        return None, "it held other records or pictures"
    return table, ""


def _finish(
    output: Path, tasks: Sequence[ShardTask], built: Sequence[_BuiltShard], builder: dict[str, Any]
) -> dict[str, Any]:
    for task, shard in zip(tasks, built, strict=True):
        if not len(shard.table.rows):
            task.path.unlink()
    full = [(task.path.name, shard.table) for task, shard in zip(tasks, built, strict=True)]
    full = [(name, table) for name, table in full if len(table.rows)]
    return write_index(output, [name for name, _ in full], [table for _, table in full], builder)


def _describe(
    rows: Sequence[SourceRow], name: str, settings: BuildSettings, facts: dict[str, Any]
) -> dict[str, Any]:
    described = asdict(settings)
    if settings.shorter_side is None:
        del described["jpeg_quality"]
    else:
        # Another version may resize and encode to other bytes.
        described["pillow"] = PIL.__version__
    if not settings.skip_bad:
        # It then changes no byte: either every picture is whole, or there are no shards.
        del described["decode"]
    return {
        **facts,
        "name": name,
        **described,
        "rows": len(rows),
        "pictures": sum(row.image is not None for row in rows),
        "version": __version__,
    }
