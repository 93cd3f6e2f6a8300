"""Shards written from rows, by several processes; and a directory of shards kept by one call at a time.

Which row goes into which shard, under which key, is planned before a picture is read. One shard is one task,
and the plan alone decides its bytes. A shard has its name only when it is whole, so a second call after
whatever ended the first keeps the finished ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
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
from dehvf_ds.data.building.scan import (
    ShardTable,
    check_picture,
    hash_keys,
    run_tasks,
    scan_shard,
    shard_name,
    write_index,
    write_shard,
)
from dehvf_ds.data.building.sources import BadRows, SourceRow, note
from dehvf_ds.data.images import decode_image
from dehvf_ds.data.index import INDEX_NAME, MANIFEST_NAME, PLAIN_FILE_NAME, read_manifest
from dehvf_ds.data.shards import (
    IMAGE_MEMBERS,
    NO_PICTURE,
    UNDECODABLE,
    DamagedSample,
    ShardRow,
    one_line,
)

PLAN_NAME = ".build.json"
"""Arguments of a build that is not finished; the manifest takes them over."""

MAX_KEY_LENGTH = 80
STAT_THREADS = 16
_MEMBER_OF_SUFFIX = {f".{kind}": kind for kind in IMAGE_MEMBERS} | {".jpeg": "jpg"}


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """How rows become shards; the flags of ``build_shards.py`` say what each is."""

    samples_per_shard: int | None = 1000
    """None where ``bytes_per_shard`` says when one is full."""
    bytes_per_shard: int | None = None
    shorter_side: int | None = None
    jpeg_quality: int = 90
    skip_bad: bool = False
    decode: bool = False

    def __post_init__(self) -> None:
        for name in ("samples_per_shard", "bytes_per_shard", "shorter_side", "jpeg_quality"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")


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
    progress: bool = True,
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
        bad: takes rows that cannot be used, after those that were left out in reading the annotations.
        progress: show a bar.

    Returns:
        The manifest, and whether it was there already.
    """
    num_rows = len(rows) + sum(bad.counts.values())
    if not PLAIN_FILE_NAME.fullmatch(name):
        raise UserError(f"--name {name!r}: letters, digits, _ and - only")
    if not rows:
        bad.tell(num_rows)
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
            _check_unchanged(output, finished, tasks)
            return finished, True
        with atomic_file(output / PLAN_NAME) as part:
            part.write_text(json.dumps(builder, indent=2) + "\n", encoding="utf-8")
        title = "Writing shards" if progress else None
        built = run_tasks(_build_shard, tasks, num_workers=num_workers, title=title)
        for key, line in (row for _, left_out in built for row in left_out):
            bad.add(key, line, UNDECODABLE)
        bad.tell(num_rows)
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

    ``bad`` takes rows whose picture is missing, of an unknown kind or empty. Keys do not depend on which rows
    are left out.
    """
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        sizes = list(pool.map(_picture_bytes, rows))
    missing = sum(size is None for size in sizes)
    shards, filled = [[]], 0
    for row, key, size in zip(rows, _unique_keys(row.name for row in rows), sizes, strict=True):
        record = json.dumps(row.record, ensure_ascii=False, sort_keys=True).encode()
        if size is None:
            absent = f"no such picture ({missing} of {len(rows)} are missing)"
            bad.add(key, f"{row.image}: {absent}; look at --images or --root", NO_PICTURE)
            continue
        if row.image is not None and (not size or row.image.suffix.lower() not in _MEMBER_OF_SUFFIX):
            kinds = "a picture's name ends in one of .jpg, .png, .webp, .gif, .bmp, .tif, .avif, .jp2, .."
            problem = f"{kinds}; convert it" if size else "a picture of 0 bytes; copy it again"
            bad.add(key, f"{row.image}: {problem}", UNDECODABLE)
            continue
        full = len(shards[-1]) == settings.samples_per_shard
        if settings.bytes_per_shard is not None:
            full = bool(shards[-1]) and filled + size + len(record) > settings.bytes_per_shard
        if full:
            shards.append([])
            filled = 0
        shards[-1].append(PlannedRow(key, record, row.image, size))
        filled += size + len(record)
    return shards


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Keeps a second writer out of a directory while this one lives; removes half-written files."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{directory}: another call is writing here; wait for it") from None
        except OSError:
            # A file system without locks.
            pass
        try:
            yield
        finally:
            for path in filter(_is_part, directory.iterdir()):
                path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class _ShardTask:
    """A shard to write: its file, its samples, and how their pictures are stored."""

    path: Path
    rows: tuple[PlannedRow, ...]
    settings: BuildSettings

    def has_sizes(self, rows: Sequence[PlannedRow], sizes: np.ndarray) -> bool:
        """Whether samples of these sizes may be these rows; sizes of smaller pictures are not known."""
        if self.settings.shorter_side is not None:
            return len(rows) == len(sizes)
        return sizes.tolist() == [row.stored_bytes() for row in rows]

    def touched_since(self) -> bool:
        """Whether a picture was written or replaced after the shard."""
        written = self.path.stat().st_mtime
        states = (row.image.stat() for row in self.rows if row.image is not None)
        # ctime: a picture that was replaced by an older file keeps that one's mtime.
        return any(max(state.st_mtime, state.st_ctime) > written for state in states)

    def read(self, left_out: list[tuple[str, str]]) -> Iterator[ShardRow]:
        """Yields the samples; where they may, those of a bad picture go to ``left_out`` (key and line)."""
        for row in self.rows:
            members = {"json": row.record}
            try:
                if row.image is not None:
                    member, data = _read_picture(row.image, self.settings)
                    members[member] = data
            except DamagedSample as error:
                if not self.settings.skip_bad:
                    remedy = "repair it, or leave such rows out with --skip-bad"
                    raise UserError(f"{error}; {remedy}") from None
                left_out.append((row.key, str(error)))
            else:
                yield ShardRow(key=row.key, members=members)


def _build_shard(task: _ShardTask) -> tuple[ShardTable, list[tuple[str, str]]]:
    """A shard's scan, and the rows whose picture cannot be decoded (key and line)."""
    if task.path.exists():
        try:
            table = scan_shard(task.path)
            keys = hash_keys(row.key for row in task.rows)
            there = np.isin(keys, table.key_hashes)
            kept = [row for row, is_there in zip(task.rows, there, strict=True) if is_there]
            gone = [row for row, is_there in zip(task.rows, there, strict=True) if not is_there]
            if (
                np.array_equal(keys[there], table.key_hashes)
                and (task.settings.skip_bad or not gone)
                and task.has_sizes(kept, table.rows[:, 1])
                and not task.touched_since()
            ):
                return table, [(row.key, f"{row.image}: not a readable picture") for row in gone]
            reason = "its samples are not the planned ones, or a picture is newer than it"
        except (UserError, OSError) as error:
            reason = one_line(error)
        note(f"{task.path}: built again ({reason})")
    left_out: list[tuple[str, str]] = []
    return write_shard(task.read(left_out), task.path), left_out


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
        image.save(file, "JPEG", quality=settings.jpeg_quality)
    except (ValueError, OSError) as error:
        raise DamagedSample(f"{path}: {one_line(error)}") from error
    return "jpg", file.getvalue()


def _require_same_build(output: Path, builder: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a finished build of these arguments, or None for one that is begun or not yet.

    A directory that holds anything else is refused.
    """
    begun = output / PLAN_NAME
    manifest = read_manifest(output) if (output / MANIFEST_NAME).is_file() else None
    if manifest is not None:
        before = manifest.get("builder", {})
        begun.unlink(missing_ok=True)
    elif begun.is_file():
        before = json.loads(begun.read_text(encoding="utf-8"))
    elif all(map(_is_part, output.iterdir())):
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
    if settings.shorter_side is None:
        del described["jpeg_quality"]
    else:
        # Another version may resize and encode to other bytes.
        described["pillow"] = PIL.__version__
    if not settings.skip_bad:
        # It then changes no byte: either every picture is whole, or there are no shards.
        del described["decode"]
    counts = {"rows": len(rows), "pictures": sum(row.image is not None for row in rows)}
    return {**facts, "name": name, **described, **counts, "version": __version__}


def _check_unchanged(output: Path, manifest: dict[str, Any], tasks: Sequence[_ShardTask]) -> None:
    """Refuses a finished build whose pictures are others now.

    A shard whose rows have their old sizes, and whose pictures were not touched since, is as it was; any
    other is made again beside it, and compared.
    """
    sizes, end = np.load(output / INDEX_NAME, mmap_mode="r")[:, 1], 0
    planned = {task.path.name: task for task in tasks}
    changed = []
    for shard in manifest["shards"]:
        begin, end = end, end + shard["samples"]
        task = planned.pop(shard["name"], None)
        if task and task.has_sizes(task.rows, sizes[begin:end]) and not task.touched_since():
            continue
        if task is None or _sha256_now(task) != shard["sha256"]:
            changed.append(shard["name"])
            break
    changed += [name for name, task in planned.items() if not changed and _sha256_now(task)]
    if changed:
        raise UserError(
            f"{output}: holds shards of other pictures: of {changed[0]} one at least was changed, added or "
            "removed since; give another --output, or remove it"
        )


def _sha256_now(task: _ShardTask) -> str | None:
    """The hash that the shard would have if it were made now; None for one without a sample."""
    path = task.path.with_name(f".{task.path.name}.now.part")
    try:
        table = write_shard(task.read([]), path)
        return table.sha256 if len(table.rows) else None
    finally:
        path.unlink(missing_ok=True)


def _is_part(path: Path) -> bool:
    """Whether a file is one that was being written."""
    return path.name.startswith(".") and path.name.endswith(".part")


def _picture_bytes(row: SourceRow) -> int | None:
    """Size of a row's picture; 0 for a row without one, None where there is no such file."""
    if row.image is None:
        return 0
    try:
        return row.image.stat().st_size if row.image.is_file() else None
    except (OSError, ValueError):
        return None


def _unique_keys(names: Iterable[str]) -> Iterator[str]:
    """Keys of plain characters; a number sets names apart that become equal."""
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
