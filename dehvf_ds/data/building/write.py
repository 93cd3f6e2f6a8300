"""Shards written from rows, by several processes.

One shard is one task, and the plan alone decides its bytes. A shard has its name only when it is whole, so a
second call after whatever ended the first keeps the finished ones.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from dehvf_ds import __version__
from dehvf_ds.config import UserError
from dehvf_ds.data.building.directory import (
    MAX_NAMED,
    Progress,
    alone_in,
    begin,
    check_begun,
    finished_manifest,
    left_out_fields,
    remove_leftovers,
    remove_parts,
    write_error,
)
from dehvf_ds.data.building.plan import MEMBER_OF_SUFFIX, BuildSettings, PlannedRow, plan_shards, stored_bytes
from dehvf_ds.data.building.sources import Note, SourceRow
from dehvf_ds.data.building.tasks import Advance, run_tasks
from dehvf_ds.data.images import decode_image
from dehvf_ds.data.manifest import PLAIN_FILE_NAME, shard_name, write_index
from dehvf_ds.data.shards import (
    ShardRow,
    ShardTable,
    hash_keys,
    one_line,
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
) -> tuple[dict[str, Any], bool]:
    """Builds a shard directory, or goes on with one that the same arguments began.

    Args:
        rows: the samples, in the order in which they are stored.
        output: the directory; created.
        name: the shards' name before ``-%06d.tar``.
        settings: how rows become shards.
        facts: what the rows were read from, without this machine's paths; kept in the manifest.
        num_workers: processes.
        progress: counts samples.
        note: told what was left out and what was built again.

    Returns:
        The manifest, and whether it was there already.

    Raises:
        UserError: the directory holds something else, a picture is missing or bad, the disk is full.
    """
    if not PLAIN_FILE_NAME.fullmatch(name):
        raise UserError(f"--name {name!r}: letters, digits, _ and - only")
    if not rows:
        raise UserError("there is no sample to write; look at the arguments")
    builder = _describe(rows, name, settings, facts)
    output.mkdir(parents=True, exist_ok=True)
    with alone_in(output):
        if (finished := finished_manifest(output, builder)) is not None:
            remove_leftovers(output)
            return finished, True
        check_begun(output, builder)
        plan = plan_shards(rows, settings)
        tasks = [
            _ShardTask(output / shard_name(name, number), tuple(shard), settings)
            for number, shard in enumerate(plan)
        ]
        progress.start(len(rows))
        try:
            begin(output, builder)
            built = run_tasks(_build_shard, tasks, num_workers=num_workers, advance=progress.advance)
            manifest = _finish(output, tasks, built, builder, note)
        except OSError as error:
            raise write_error(error, output) from error
        finally:
            remove_parts(output)
        remove_leftovers(output)
    return manifest, False


@dataclass(frozen=True)
class _ShardTask:
    path: Path
    rows: tuple[PlannedRow, ...]
    settings: BuildSettings


@dataclass(frozen=True)
class _BuiltShard:
    """A shard's scan, the keys that were left out, and notes for the user."""

    table: ShardTable
    left_out: tuple[str, ...]
    notes: tuple[str, ...]


def _build_shard(task: _ShardTask, advance: Advance) -> _BuiltShard:
    notes: list[str] = []
    if task.path.exists():
        table, reason = _finished_table(task)
        if table is not None:
            advance(len(task.rows))
            there = set(table.key_hashes.tolist())
            hashes = hash_keys(row.key for row in task.rows).tolist()
            left_out = (row.key for row, value in zip(task.rows, hashes, strict=True) if value not in there)
            return _BuiltShard(table, tuple(left_out), ())
        notes.append(f"{task.path}: built again ({reason})")
    left_out = []
    try:
        table = write_shard(_read_rows(task, left_out, notes, advance), task.path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary_name(task.path).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(error, task.path) from error
        raise
    return _BuiltShard(table, tuple(left_out), tuple(notes))


def _finished_table(task: _ShardTask) -> tuple[ShardTable | None, str]:
    """The scan of a shard that is there, or None and why it is not the planned one."""
    try:
        table = scan_shard(task.path)
        written = task.path.stat().st_mtime
        if any(row.image is not None and row.image.stat().st_mtime > written for row in task.rows):
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


def _read_rows(
    task: _ShardTask, left_out: list[str], notes: list[str], advance: Advance
) -> Iterator[ShardRow]:
    for row in task.rows:
        members = {"json": row.record}
        try:
            if row.image is not None:
                member, data = _read_picture(row.image, task.settings)
                members[member] = data
        except ValueError as error:
            if not task.settings.skip_bad:
                remedy = "repair it, or leave such rows out with --skip-bad"
                raise UserError(f"{row.image}: {error}; {remedy}") from None
            left_out.append(row.key)
            notes.append(f"left out {row.image}: {error}")
        else:
            yield ShardRow(key=row.key, members=members)
        advance(1)


def _read_picture(path: Path, settings: BuildSettings) -> tuple[str, bytes]:
    """Member name and bytes of a picture: the file's own, or of a smaller JPEG."""
    data, member = path.read_bytes(), MEMBER_OF_SUFFIX[path.suffix.lower()]
    if not data:
        raise ValueError("a picture of 0 bytes")
    if settings.shorter_side is None:
        return member, data
    image = decode_image(data, shorter_side=settings.shorter_side)
    if min(image.size) <= settings.shorter_side:
        return member, data
    scale = settings.shorter_side / min(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    # A comment of the source would be written along, however long.
    image.info = {}
    file = io.BytesIO()
    try:
        image.save(file, "JPEG", quality=settings.jpeg_quality)
    except OSError as error:
        raise ValueError(f"{width} x {height} pixels do not fit a JPEG: {one_line(error)}") from error
    return "jpg", file.getvalue()


def _finish(
    output: Path,
    tasks: Sequence[_ShardTask],
    built: Sequence[_BuiltShard],
    builder: dict[str, Any],
    note: Note,
) -> dict[str, Any]:
    notes = [line for shard in built for line in shard.notes]
    for line in notes[:MAX_NAMED]:
        note(line)
    if len(notes) > MAX_NAMED:
        note(f"and {len(notes) - MAX_NAMED} more of this kind")
    left_out = [key for shard in built for key in shard.left_out]
    if left_out:
        note(f"left out {len(left_out)} of {sum(len(task.rows) for task in tasks)} samples for their picture")
    for task, shard in zip(tasks, built, strict=True):
        if not len(shard.table.rows):
            task.path.unlink()
    full = [(task.path.name, shard.table) for task, shard in zip(tasks, built, strict=True)]
    full = [(name, table) for name, table in full if len(table.rows)]
    return write_index(
        output,
        [name for name, _ in full],
        [table for _, table in full],
        {**builder, **left_out_fields(left_out)},
    )


def _describe(
    rows: Sequence[SourceRow], name: str, settings: BuildSettings, facts: dict[str, Any]
) -> dict[str, Any]:
    described = asdict(settings)
    if settings.shorter_side is None:
        del described["jpeg_quality"]
    else:
        # Another version may resize and encode to other bytes.
        described["pillow"] = PIL.__version__
    return {
        **facts,
        "name": name,
        **described,
        "rows": len(rows),
        "pictures": sum(row.image is not None for row in rows),
        "version": __version__,
    }
