"""Shards written from rows.

Which row goes into which shard, under which key, is planned before a picture is read. One shard is one task,
and the plan alone decides its bytes. A shard has its name only when it is complete, so that the same
call after an interruption keeps the finished ones.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image

from dehvf_ds import __version__
from dehvf_ds.atomic import atomic_file
from dehvf_ds.config import UserError
from dehvf_ds.data.building.directory import PLAN_NAME, alone_in, is_part, run_tasks, write_index
from dehvf_ds.data.building.scan import (
    BadRows,
    ShardTable,
    check_picture,
    hash_keys,
    note,
    scan_shard,
    shard_name,
    write_shard,
)
from dehvf_ds.data.building.sources import SourceRow
from dehvf_ds.data.images import decode_image
from dehvf_ds.data.index import INDEX_NAME, MANIFEST_NAME, read_manifest
from dehvf_ds.data.shards import IMAGE_MEMBERS, NO_PICTURE, UNDECODABLE, DamagedSample, ShardRow, one_line

MAX_KEY_LENGTH = 80
STAT_THREADS = 16
JPEG_QUALITY = 90

_MEMBER_OF_SUFFIX = {f".{kind}": kind for kind in IMAGE_MEMBERS} | {".jpeg": "jpg"}


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """How rows become shards; the flags of ``build_shards.py`` say what each is."""

    samples_per_shard: int = 1000
    shorter_side: int | None = None
    skip_bad: bool = False
    decode: bool = False


class PlannedRow(NamedTuple):
    """One sample of the plan: its key, its record as it is stored, its picture and that file's size."""

    key: str
    record: bytes
    image: Path | None
    image_bytes: int

    def stored_bytes(self) -> int:
        """Size in the shard when the picture is copied: a header block and whole blocks a member."""
        sizes = [len(self.record), *([] if self.image is None else [self.image_bytes])]
        return sum(BLOCKSIZE * (1 + -(-size // BLOCKSIZE)) for size in sizes)


def build_shards(
    rows: Sequence[SourceRow],
    output: Path,
    *,
    name: str,
    settings: BuildSettings,
    facts: dict[str, Any],
    num_workers: int,
    bad: BadRows,
) -> tuple[dict[str, Any], bool]:
    """Builds a shard directory, or continues one that the same arguments began.

    A finished one is left alone if its pictures are unchanged: those of another size, or written since, are
    read and compared.

    Rows are stored in their order, in shards ``NAME-%06d.tar``. ``facts`` say what they were read from,
    without local paths, and are kept in the manifest. ``bad`` holds what reading the annotations left out.

    Returns:
        The manifest, and whether it was there already.
    """
    if not rows:
        bad.report(0)
        raise UserError("there is no sample to write; look at the arguments")
    builder = _describe(rows, name, settings, facts)
    output.mkdir(parents=True, exist_ok=True)
    with alone_in(output):
        finished = _require_same_build(output, builder)
        images = [row.image for row in rows if row.image is not None]
        if finished and images and not any(image.is_file() for image in images):
            note("the pictures are no longer there; they were not compared with the shards")
            return finished, True
        plan = plan_shards(rows, settings, bad)
        paths = (output / shard_name(name, number) for number in range(len(plan)))
        tasks = [_ShardTask(path, tuple(shard), settings) for path, shard in zip(paths, plan, strict=True)]
        if finished:
            _require_unchanged(output, finished, tasks)
            return finished, True
        with atomic_file(output / PLAN_NAME) as part:
            part.write_text(json.dumps(builder, indent=2) + "\n", encoding="utf-8")
        built = run_tasks(_build_shard, tasks, num_workers=num_workers, title="Writing shards")
        for row in (row for _, left_out in built for row in left_out):
            bad.add(*row)
        bad.report(sum(len(table.rows) for table, _ in built))
        names, tables = [], []
        for task, (table, _) in zip(tasks, built, strict=True):
            if len(table.rows):
                names.append(task.path.name)
                tables.append(table)
            else:
                task.path.unlink()
        manifest = write_index(output, names, tables, {**builder, **bad.fields()})
        (output / PLAN_NAME).unlink()
    return manifest, False


def plan_shards(rows: Sequence[SourceRow], settings: BuildSettings, bad: BadRows) -> list[list[PlannedRow]]:
    """Gives every row its key and its shard; looks at every picture's size and at no picture's bytes.

    ``bad`` takes rows whose picture is missing or of an unknown kind. Keys do not depend on which rows are
    left out.
    """
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        sizes = list(pool.map(_picture_bytes, rows))
    missing = f"no such picture ({sizes.count(None)} of {len(rows)} are missing)"
    planned = []
    for row, key, size in zip(rows, _unique_keys(row.name for row in rows), sizes, strict=True):
        if size is None:
            bad.add(key, f"{row.image}: {missing}; look at --images or --root", NO_PICTURE)
        elif row.image is not None and row.image.suffix.lower() not in _MEMBER_OF_SUFFIX:
            kinds = "a picture's name ends in one of .jpg, .png, .webp, .gif, .bmp, .tif, .avif, .jp2, .."
            bad.add(key, f"{row.image}: {kinds}; convert it", UNDECODABLE)
        else:
            record = json.dumps(row.record, ensure_ascii=False, sort_keys=True).encode()
            planned.append(PlannedRow(key, record, row.image, size))
    length = settings.samples_per_shard
    return [planned[first : first + length] for first in range(0, len(planned), length)]


@dataclass(frozen=True)
class _ShardTask:
    """A shard to write: its file, its samples, and how their pictures are stored."""

    path: Path
    rows: tuple[PlannedRow, ...]
    settings: BuildSettings

    def is_current(self, sizes: np.ndarray, left_out: Container[str] = ()) -> bool:
        """Whether a finished shard of samples of these sizes holds the pictures as they are now.

        False also where that is not certain: where a picture, also one that was left out, was written since.
        """
        planned = [row.stored_bytes() for row in self.rows if row.key not in left_out]
        if len(sizes) != len(planned) or (self.settings.shorter_side is None and sizes.tolist() != planned):
            return False
        states = (row.image.stat() for row in self.rows if row.image is not None)
        written = self.path.stat().st_mtime
        # ctime: a picture that was replaced by an older file keeps that one's mtime.
        return all(max(state.st_mtime, state.st_ctime) <= written for state in states)

    def read(self, bad: BadRows) -> Iterator[ShardRow]:
        """Yields the samples whose picture can be used."""
        for row in self.rows:
            members = {"json": row.record}
            try:
                if row.image is not None:
                    member, data = _read_picture(row.image, self.settings)
                    members[member] = data
                yield ShardRow(key=row.key, members=members)
            except DamagedSample as error:
                bad.add(row.key, str(error), UNDECODABLE)

    def sha256_now(self) -> str | None:
        """The hash that the shard would have if it were written now; None for one without a sample."""
        path = self.path.with_name(f".{self.path.name}.now.part")
        try:
            table = write_shard(self.read(BadRows(skip=self.settings.skip_bad)), path)
            return table.sha256 if len(table.rows) else None
        finally:
            path.unlink(missing_ok=True)


def _build_shard(task: _ShardTask) -> tuple[ShardTable, list[tuple[str, str, str]]]:
    """A shard's scan, and the rows whose picture cannot be decoded."""
    if task.path.exists():
        try:
            table = scan_shard(task.path)
            hashes = hash_keys(row.key for row in task.rows)
            there = np.isin(hashes, table.key_hashes)
            gone = {
                row.key: row.image for row, is_there in zip(task.rows, there, strict=True) if not is_there
            }
            same_keys = np.array_equal(hashes[there], table.key_hashes)
            allowed = same_keys and (task.settings.skip_bad or not gone)
            if allowed and task.is_current(table.rows[:, 1], left_out=gone):
                lines = ((key, f"{image}: not a readable picture") for key, image in gone.items())
                return table, [(key, line, UNDECODABLE) for key, line in lines]
            reason = "its samples are not the planned ones, or a picture is newer than it"
        except (UserError, OSError) as error:
            reason = one_line(error)
        note(f"{task.path}: built again ({reason})")
    bad = BadRows(skip=task.settings.skip_bad)
    return write_shard(task.read(bad), task.path), bad.left_out


def _read_picture(path: Path, settings: BuildSettings) -> tuple[str, bytes]:
    """Member name and bytes of a picture: the file's own, or of a smaller JPEG."""
    data, member = path.read_bytes(), _MEMBER_OF_SUFFIX[path.suffix.lower()]
    side = settings.shorter_side
    if not data:
        raise DamagedSample(f"{path}: a picture of 0 bytes")
    if side is None:
        if settings.decode:
            check_picture(data, str(path))
        return member, data
    try:
        image = decode_image(data, shorter_side=side)
        if min(image.size) <= side:
            return member, data
        width, height = (max(1, round(length * side / min(image.size))) for length in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        # A comment of the source would be written along, however long.
        image.info = {}
        file = io.BytesIO()
        image.save(file, "JPEG", quality=JPEG_QUALITY)
    except (ValueError, OSError) as error:
        raise DamagedSample(f"{path}: {one_line(error)}") from error
    return "jpg", file.getvalue()


def _require_same_build(output: Path, builder: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a finished build of these arguments, or None if it is unfinished or not started.

    A directory that holds anything else is refused.
    """
    begun = output / PLAN_NAME
    manifest = read_manifest(output) if (output / MANIFEST_NAME).is_file() else None
    if manifest is not None:
        before = manifest.get("builder", {})
        begun.unlink(missing_ok=True)
    elif begun.is_file():
        before = json.loads(begun.read_text(encoding="utf-8"))
    elif all(map(is_part, output.iterdir())):
        return None
    else:
        raise UserError(f"{output}: not empty; give another --output")
    # Another version of the program builds the same; where it does not, the manifest's format is another.
    names = [n for n in {**builder, **before} if not n.startswith("left_out") and n != "version"]
    differing = [
        f"{name} ({_shown(before.get(name))} there, {_shown(builder.get(name))} now)"
        for name in names
        if before.get(name) != builder.get(name)
    ]
    if differing:
        what = "holds shards" if manifest else "holds a build that is not finished"
        listed = f"{what} of other arguments: {', '.join(differing)}"
        raise UserError(f"{output}: {listed}; give another --output, or remove it")
    return manifest


def _shown(value: Any) -> str:
    return f"{value['name']} {value['sha256'][:12]}" if isinstance(value, dict) else str(value)


def _describe(
    rows: Sequence[SourceRow], name: str, settings: BuildSettings, facts: dict[str, Any]
) -> dict[str, Any]:
    described = asdict(settings)
    if settings.shorter_side is not None:
        # Another version may resize and encode to other bytes.
        described |= {"jpeg_quality": JPEG_QUALITY, "pillow": PIL.__version__}
    if not settings.skip_bad:
        # It then changes no byte: either every picture is whole, or there are no shards.
        del described["decode"]
    counts = {"rows": len(rows), "pictures": sum(row.image is not None for row in rows)}
    return {**facts, "name": name, **described, **counts, "version": __version__}


def _require_unchanged(output: Path, manifest: dict[str, Any], tasks: Sequence[_ShardTask]) -> None:
    """Refuses a finished build whose pictures have changed."""
    sizes, end = np.load(output / INDEX_NAME, mmap_mode="r")[:, 1], 0
    now = {task.path.name: task for task in tasks}
    changed = []
    for shard in manifest["shards"]:
        begin, end = end, end + shard["samples"]
        task = now.pop(shard["name"], None)
        if task is None or not (task.is_current(sizes[begin:end]) or task.sha256_now() == shard["sha256"]):
            changed.append(shard["name"])
            break
    if changed := changed or [name for name, task in now.items() if task.sha256_now()]:
        raise UserError(
            f"{output}: holds shards of other pictures: of {changed[0]} at least one was changed, added or "
            "removed since; give another --output, or remove it"
        )


def _picture_bytes(row: SourceRow) -> int | None:
    """Size of a row's picture; 0 for a row without one, None where it is no file."""
    try:
        if row.image is None:
            return 0
        return row.image.stat().st_size if row.image.is_file() else None
    except (OSError, ValueError):
        return None


def _unique_keys(names: Iterable[str]) -> Iterator[str]:
    """Keys of plain characters; names that collide get a number."""
    used: set[str] = set()
    last: dict[str, int] = {}
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:MAX_KEY_LENGTH] or "sample"
        key = stem
        while key in used:
            last[stem] = last.get(stem, 1) + 1
            key = f"{stem}-{last[stem]}"
        used.add(key)
        yield key
