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
from dehvf_ds.data.building.plan import (
    MEMBER_OF_SUFFIX,
    BuildSettings,
    PlannedRow,
    picture_sizes,
    plan_shards,
    stored_bytes,
)
from dehvf_ds.data.building.sources import SourceRow
from dehvf_ds.data.building.tasks import Advance, run_tasks
from dehvf_ds.data.damage import UNDECODABLE, one_line
from dehvf_ds.data.images import decode_image
from dehvf_ds.data.manifest import INDEX_NAME, PLAIN_FILE_NAME, shard_name, write_index
from dehvf_ds.data.shards import (
    ShardRow,
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

    A finished one is left alone where its pictures are as they were: those whose size is another, or which were
    touched since, are read and compared.

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
        UserError: the directory holds something else, a picture is missing, bad or another than in the shards, the
            disk is full.
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
        elif _pictures_are_gone(rows, note):
            remove_leftovers(output)
            return finished, True
        plan = plan_shards(rows, settings, bad)
        tasks = [
            _ShardTask(output / shard_name(name, number), tuple(shard), settings)
            for number, shard in enumerate(plan)
        ]
        if finished is not None:
            _check_unchanged(output, finished, tasks)
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
class _ShardTask:
    path: Path
    rows: tuple[PlannedRow, ...]
    settings: BuildSettings


@dataclass(frozen=True)
class _BuiltShard:
    """A shard's scan, the rows whose picture cannot be decoded (key and line), and notes for the user."""

    table: ShardTable
    left_out: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def _build_shard(task: _ShardTask, advance: Advance) -> _BuiltShard:
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
        table = write_shard(_read_rows(task, left_out, advance), task.path)
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
        if _touched_since(task):
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
    task: _ShardTask, left_out: list[tuple[str, str]], advance: Advance | None = None
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
            left_out.append((row.key, f"{row.image}: {error}"))
        else:
            yield ShardRow(key=row.key, members=members)
        if advance is not None:
            advance(1)


def _read_picture(path: Path, settings: BuildSettings) -> tuple[str, bytes]:
    """Member name and bytes of a picture: the file's own, or of a smaller JPEG."""
    data, member = path.read_bytes(), MEMBER_OF_SUFFIX[path.suffix.lower()]
    if not data:
        raise ValueError("a picture of 0 bytes")
    if settings.shorter_side is None:
        if settings.decode:
            # As small as its kind can be decoded: to see whether it is whole.
            decode_image(data, shorter_side=1)
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


def _pictures_are_gone(rows: Sequence[SourceRow], note: Note) -> bool:
    """Whether none of the pictures of a finished build is there any more, so that there is nothing to compare."""
    sizes = [size for row, size in zip(rows, picture_sizes(rows), strict=True) if row.image is not None]
    if sizes and all(size is None for size in sizes):
        note("the pictures are no longer there; they were not compared with the shards")
        return True
    return False


def _check_unchanged(output: Path, manifest: dict[str, Any], tasks: Sequence[_ShardTask]) -> None:
    """Refuses a finished build whose pictures are others now.

    A shard whose rows have their old sizes, and whose pictures were not touched since, is taken for unchanged;
    any other is made again beside it, and compared.
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
            first, last = task.rows[0].image or task.rows[0].key, task.rows[-1].image or task.rows[-1].key
            raise UserError(
                f"{output}: holds shards of other pictures: of {task.path.name} ({first} .. {last}) at least one was "
                "changed, added or removed since; give another --output, or remove it"
            )
    if others := set(numbers) - {task.path.name for task in tasks}:
        raise UserError(
            f"{output}: holds shards of more pictures than there are now ({min(others)}); give another --output, or "
            "remove it"
        )


def _looks_unchanged(task: _ShardTask, stored: np.ndarray) -> bool:
    if len(stored) != len(task.rows) or not task.path.is_file():
        return False
    if task.settings.shorter_side is None and stored.tolist() != [stored_bytes(row) for row in task.rows]:
        return False
    return not _touched_since(task)


def _touched_since(task: _ShardTask) -> bool:
    """Whether a picture of a shard was written or replaced after it."""
    written = task.path.stat().st_mtime
    states = (row.image.stat() for row in task.rows if row.image is not None)
    # ctime: a picture that was replaced by an older file keeps that one's mtime.
    return any(max(state.st_mtime, state.st_ctime) > written for state in states)


def _sha256_now(task: _ShardTask) -> str | None:
    """The hash that the shard would have if it were made now; None for one without a sample."""
    path = task.path.with_name(f"{task.path.name}.now")
    try:
        table = write_shard(_read_rows(task, []), path)
        return table.sha256 if len(table.rows) else None
    finally:
        path.unlink(missing_ok=True)
        temporary_name(path).unlink(missing_ok=True)


def _finish(
    output: Path, tasks: Sequence[_ShardTask], built: Sequence[_BuiltShard], builder: dict[str, Any]
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
