"""Shard directories made, taken over and checked, by several processes.

``build_shards`` plans which row goes into which shard and writes them; one shard is one task, and the plan
alone decides its bytes. A shard has its name only when it is whole, so a second call after whatever ended the
first keeps the finished ones. ``adopt_shards`` indexes the shards of another tool; ``verify_shards`` reads
everything again and says what is not as it was.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any, Protocol, TypeVar
from zlib import crc32

import numpy as np
import PIL
from PIL import Image

from dehvf_ds import __version__
from dehvf_ds.config import UserError
from dehvf_ds.data.images import decode_image
from dehvf_ds.data.index import (
    _PLAIN_FILE_NAME,
    INDEX_NAME,
    LENGTHS_NAME,
    MANIFEST_NAME,
    _read_manifest,
    shard_name,
    write_index,
)
from dehvf_ds.data.shards import (
    IMAGE_MEMBERS,
    ShardRow,
    ShardTable,
    hash_keys,
    one_line,
    parse_members,
    parse_record,
    publish,
    scan_shard,
    temporary_name,
    text_lengths,
    write_shard,
)
from dehvf_ds.data.sources import Note, SourceRow

Task = TypeVar("Task")
Result = TypeVar("Result")
Advance = Callable[[int], None]

PLAN_NAME = ".build.json"
"""Arguments of a build that is not finished; the manifest takes them over."""

MEMBER_OF_SUFFIX = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
MAX_KEY_LENGTH = 80
MAX_NAMED = 20
"""Most samples that a manifest names as left out."""

REPORT_EVERY_S = 0.2
STAT_THREADS = 16
END_WITHIN_S = 5.0


class Progress(Protocol):
    """Is told how much there is to do and how much of it is done."""

    def start(self, total: int) -> None:
        """Begins; ``total`` is what the counts of ``advance`` add up to."""
        ...

    def advance(self, count: int) -> None:
        """``count`` more are done."""
        ...


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """How rows become shards.

    Attributes:
        samples_per_shard: samples of a shard; None where ``bytes_per_shard`` says when one is full.
        bytes_per_shard: largest sum of the source files' sizes in a shard (a single larger row is one, too).
        shorter_side: pictures with a longer one are resized to this shorter side and stored as JPEG.
        jpeg_quality: quality of those, 1 to 100.
        skip_bad: leave out rows whose picture has no bytes or cannot be decoded for resizing.
    """

    samples_per_shard: int | None = 1000
    bytes_per_shard: int | None = None
    shorter_side: int | None = None
    jpeg_quality: int = 90
    skip_bad: bool = False

    def __post_init__(self) -> None:
        for name in ("samples_per_shard", "bytes_per_shard", "shorter_side", "jpeg_quality"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if self.jpeg_quality > 100:
            raise UserError(f"--jpeg-quality {self.jpeg_quality}: must be at most 100")


@dataclass(frozen=True)
class PlannedRow:
    """One sample of the plan: its key, its record as it is stored, its picture and that file's size."""

    key: str
    record: bytes
    image: Path | None
    image_bytes: int


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
    if not _PLAIN_FILE_NAME.fullmatch(name):
        raise UserError(f"--name {name!r}: letters, digits, _ and - only")
    if not rows:
        raise UserError("there is no sample to write; look at the arguments")
    builder = _describe(rows, name, settings, facts)
    output.mkdir(parents=True, exist_ok=True)
    with _alone_in(output):
        if (finished := _finished_manifest(output, builder)) is not None:
            _remove_leftovers(output)
            return finished, True
        _check_begun(output, builder)
        plan = plan_shards(rows, settings)
        tasks = [
            _ShardTask(output / shard_name(name, number), tuple(shard), settings)
            for number, shard in enumerate(plan)
        ]
        progress.start(len(rows))
        try:
            _begin(output, builder)
            built = run_tasks(_build_shard, tasks, num_workers=num_workers, advance=progress.advance)
            manifest = _finish(output, tasks, built, builder, note)
        except OSError as error:
            raise _write_error(error, output) from error
        finally:
            _remove_parts(output)
        _remove_leftovers(output)
    return manifest, False


def plan_shards(rows: Sequence[SourceRow], settings: BuildSettings) -> list[list[PlannedRow]]:
    """Gives every row its key and its shard; looks at every picture's size and at no picture's bytes.

    Raises:
        UserError: a picture is missing, of an unknown kind or empty, or a record cannot be stored.
    """
    sizes = _check_pictures(rows, skip_bad=settings.skip_bad)
    keys = _unique_keys([row.name for row in rows])
    shards, filled = [[]], 0
    for row, key, image_bytes in zip(rows, keys, sizes, strict=True):
        planned = PlannedRow(key, _encode_record(row, key), row.image, image_bytes)
        num_bytes = image_bytes + len(planned.record)
        full = len(shards[-1]) == settings.samples_per_shard
        if settings.bytes_per_shard is not None:
            full = bool(shards[-1]) and filled + num_bytes > settings.bytes_per_shard
        if full:
            shards.append([])
            filled = 0
        shards[-1].append(planned)
        filled += num_bytes
    return shards


def describe_file(path: Path) -> dict[str, str]:
    """A file's name and hash: what a manifest says of it, the same on every machine."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as file:
        return {"name": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


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
            raise _write_error(error, task.path) from error
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
    sizes = np.array([_stored_bytes(row) for row in task.rows])
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
        {**builder, **_left_out_fields(left_out)},
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


def _left_out_fields(left_out: Sequence[str]) -> dict[str, Any]:
    return {"left_out": len(left_out), "left_out_first": list(left_out[:MAX_NAMED])}


def _finished_manifest(output: Path, builder: dict[str, Any]) -> dict[str, Any] | None:
    if not (output / MANIFEST_NAME).is_file():
        return None
    try:
        manifest = _read_manifest(output)
    except UserError:
        raise UserError(f"{output}: not empty; give another --output") from None
    _check_same(output, manifest.get("builder"), builder, "holds shards")
    return manifest


def _check_begun(output: Path, builder: dict[str, Any]) -> None:
    path = output / PLAN_NAME
    if path.is_file():
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            begun = None
        _check_same(output, begun, builder, "holds a build that is not finished")
    elif any(not _is_part(path) for path in output.iterdir()):
        raise UserError(f"{output}: not empty; give another --output")


def _check_same(output: Path, before: Any, now: dict[str, Any], what: str) -> None:
    if not isinstance(before, dict) or before.get("source") != now["source"] or "version" not in before:
        raise UserError(f"{output}: not empty; give another --output")
    names = [name for name in {**now, **before} if not name.startswith("left_out")]
    differing = [name for name in names if before.get(name) != now.get(name)]
    if differing:
        listed = ", ".join(
            f"{name} ({_shown(before.get(name))} there, {_shown(now.get(name))} now)" for name in differing
        )
        raise UserError(f"{output}: {what} of other arguments: {listed}; give another --output, or remove it")


def _shown(value: Any) -> str:
    return f"{value['name']} {value['sha256'][:12]}" if isinstance(value, dict) else str(value)


def _begin(output: Path, builder: dict[str, Any]) -> None:
    _remove_parts(output)
    path = output / PLAN_NAME
    temporary_name(path).write_text(json.dumps(builder, indent=2) + "\n", encoding="utf-8")
    publish(path)


def _is_part(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".part")


def _remove_parts(output: Path) -> None:
    for path in output.iterdir():
        if _is_part(path):
            with contextlib.suppress(OSError):
                path.unlink()


def _remove_leftovers(output: Path) -> None:
    _remove_parts(output)
    (output / PLAN_NAME).unlink(missing_ok=True)


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Keeps a second writer out of a directory as long as this one lives."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{directory}: another call is writing here; wait for it") from None
        except OSError:
            # A file system without locks.
            pass
        yield
    finally:
        os.close(descriptor)


def _write_error(error: OSError, path: Path) -> UserError:
    reason = error.strerror or one_line(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(f"{path}: {reason}; make room and call again, finished shards are kept")
    return UserError(f"{error.filename or path}: {reason}")


def _check_pictures(rows: Sequence[SourceRow], *, skip_bad: bool) -> list[int]:
    """Size of each row's picture in bytes, 0 without one."""
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        sizes = list(pool.map(_file_bytes, [row.image for row in rows]))
    paths = [(row.image, size) for row, size in zip(rows, sizes, strict=True) if row.image is not None]
    if missing := [path for path, size in paths if size is None]:
        raise UserError(
            f"{missing[0]}: no such picture{_others(missing)} of {len(paths)}; look at --images or --root"
        )
    for path, _ in paths:
        if path.suffix.lower() not in MEMBER_OF_SUFFIX:
            known = ", ".join(MEMBER_OF_SUFFIX)
            raise UserError(f"{path}: a picture's name ends in one of {known}; convert it")
    empty = [path for path, size in paths if size == 0]
    if empty and not skip_bad:
        raise UserError(
            f"{empty[0]}: a picture of 0 bytes{_others(empty)}; copy it again, or leave such rows out "
            "with --skip-bad"
        )
    return [size or 0 for size in sizes]


def _others(found: Sequence[Any]) -> str:
    return f" (and {len(found) - 1} others)" if len(found) > 1 else ""


def _file_bytes(path: Path | None) -> int | None:
    """A file's size; None if there is no such file, 0 for no path."""
    if path is None:
        return 0
    try:
        return path.stat().st_size if path.is_file() else None
    except (OSError, ValueError):
        return None


def _encode_record(row: SourceRow, key: str) -> bytes:
    try:
        return json.dumps(row.record, ensure_ascii=False, sort_keys=True).encode()
    except ValueError as error:
        raise UserError(f"sample {key}: its record is not fit for UTF-8: {one_line(error)}") from None


def _unique_keys(names: Sequence[str]) -> list[str]:
    """Keys of plain characters; a number sets names apart that become equal."""
    used: set[str] = set()
    last: dict[str, int] = {}
    keys = []
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:MAX_KEY_LENGTH] or "sample"
        key = stem
        while key in used:
            last[stem] = last.get(stem, 1) + 1
            key = f"{stem}-{last[stem]}"
        used.add(key)
        keys.append(key)
    return keys


def _stored_bytes(row: PlannedRow) -> int:
    """Size of a sample in its shard when the picture is copied: a header block and whole blocks a member."""
    members = [len(row.record), *([] if row.image is None else [row.image_bytes])]
    return sum(BLOCKSIZE * (1 + -(-size // BLOCKSIZE)) for size in members)


def adopt_shards(
    directory: Path, *, skip_bad: bool, overwrite: bool, num_workers: int, progress: Progress, note: Note
) -> dict[str, Any]:
    """Indexes all ``*.tar`` of a directory, in the order of their names; other files are left alone.

    Args:
        directory: holds the shards, as img2dataset and other tools of WebDataset write them.
        skip_bad: leave unusable samples out of the index.
        overwrite: index anew what has a manifest.
        num_workers: processes.
        progress: counts shards.
        note: told what was left out.

    Returns:
        The manifest.

    Raises:
        UserError: there is no shard, one is no whole tar, or a sample is unusable and not skipped.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    with _alone_in(directory):
        paths = _find_shards(directory, overwrite=overwrite)
        progress.start(len(paths))
        tasks = [(path, skip_bad) for path in paths]
        tables = run_tasks(_adopt_shard, tasks, num_workers=num_workers, advance=progress.advance)
        bad = [line for table in tables for line in table.bad]
        for line in bad[:MAX_NAMED]:
            note(f"left out {line}")
        if bad:
            note(f"left out {len(bad)} of {len(bad) + sum(len(table.rows) for table in tables)} samples")
        here = [line.removeprefix(f"{directory}/") for line in bad]
        builder = {
            "source": "index",
            "skip_bad": skip_bad,
            "version": __version__,
            **_left_out_fields(here),
        }
        try:
            return write_index(directory, [path.name for path in paths], tables, builder)
        except OSError as error:
            raise _write_error(error, directory) from error
        finally:
            _remove_parts(directory)


def _find_shards(directory: Path, *, overwrite: bool) -> list[Path]:
    if (directory / PLAN_NAME).is_file() and not (directory / MANIFEST_NAME).is_file():
        raise UserError(
            f"{directory}: holds a build that is not finished; finish it by the call that began it"
        )
    if (directory / MANIFEST_NAME).is_file() and not overwrite:
        raise UserError(f"{directory}: {MANIFEST_NAME} is there already; --overwrite indexes anew")
    paths = sorted(path for path in directory.glob("*.tar") if not path.name.startswith("."))
    if not paths:
        packed = sorted(directory.glob("*.tar.*"))
        hint = f"; {packed[0].name} is compressed: unpack such files to .tar" if packed else ""
        raise UserError(f"{directory}: holds no *.tar{hint}")
    if odd := [path for path in paths if not _PLAIN_FILE_NAME.fullmatch(path.name)]:
        raise UserError(f"{odd[0]}: a shard's name has letters, digits and ._=- only; rename it")
    return paths


def _adopt_shard(task: tuple[Path, bool], advance: Advance) -> ShardTable:
    path, skip_bad = task
    table = scan_shard(path, skip_bad=skip_bad)
    advance(1)
    return table


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
    manifest = _read_manifest(directory)
    shards = manifest["shards"]
    rows = _load_array(directory / INDEX_NAME, np.int64, (manifest["num_samples"], 4))
    lengths = _load_array(directory / LENGTHS_NAME, np.int32, (sum(s["examples"] for s in shards),))
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
    except UserError as error:
        return [str(error)]
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
            members = parse_members(data, where)
            where = f"{where} ({members['__key__']})"
            if text_lengths(parse_record({**members, "__url__": where}))[0] != captions:
                problems.append(f"{where}: not {captions} captions as {INDEX_NAME} says")
            if (reason := _picture_problem(members, decode=task.decode)) is not None:
                problems.append(f"{where}: {reason}")
        except UserError as error:
            problems.append(str(error))
    return problems


def _read_range(file: io.BufferedReader, offset: int, size: int, num_bytes: int) -> bytes:
    """Bytes of a sample; none where a damaged index names a place outside the shard."""
    if offset < 0 or size < 0 or offset + size > num_bytes:
        return b""
    file.seek(offset)
    return file.read(size)


def _picture_problem(members: dict[str, Any], *, decode: bool) -> str | None:
    picture = next((members[name] for name in IMAGE_MEMBERS if name in members), None)
    if picture is None:
        record = parse_record(members)
        named = bool(record.get("file_name") or record.get("image")) and not record.get("image_missing")
        return "its record names a picture, but the shard holds none" if named else None
    if not picture:
        return "a picture of 0 bytes"
    try:
        if decode:
            decode_image(picture)
    except ValueError as error:
        return str(error)
    return None


def _key_in(data: bytes) -> str:
    """The key at the beginning of a sample's bytes, if it can still be read."""
    try:
        return f"({parse_members(data, '')['__key__']})"
    except UserError:
        return "(its key cannot be read)"


def _load_array(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: not an index: {one_line(error)}; make it again") from None
    if array.dtype != dtype or array.shape != shape:
        promised = f"{MANIFEST_NAME} promises {np.dtype(dtype)} {shape}"
        raise UserError(f"{path}: {array.dtype} {array.shape} where {promised}; copy both again")
    return array


def run_tasks(
    function: Callable[[Task, Advance], Result],
    tasks: Sequence[Task],
    *,
    num_workers: int,
    advance: Advance,
) -> list[Result]:
    """Runs ``function(task, advance)`` for every task and returns the results in the tasks' order.

    With one worker, or one task, in this process. An error ends everything; among several it is that of the
    earliest task, whatever the number of workers. No process outlives the call, however it ends.

    Args:
        function: of a module, for it travels to the processes by its name.
        tasks: handed out in order.
        num_workers: processes.
        advance: told of the counts that the function tells.

    Raises:
        UserError: the function's own, or a process was killed.
    """
    if num_workers < 1:
        raise UserError(f"--num-workers {num_workers}: must be at least 1")
    num_workers = min(num_workers, len(tasks))
    if num_workers <= 1:
        return [function(task, advance) for task in tasks]
    results: dict[int, Result] = {}
    errors: dict[int, Exception] = {}
    waiting = iter(enumerate(tasks))
    with _workers(function, num_workers) as connections:
        running: dict[Connection, int] = {}

        def hand_out(connection: Connection) -> None:
            if not errors and (drawn := next(waiting, None)) is not None:
                running[connection] = drawn[0]
                _send(connection, drawn[1])

        for connection in connections:
            hand_out(connection)
        while running and not (errors and min(errors) < min(running.values())):
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                kind, value = _receive(connection)
                if kind == "count":
                    advance(value)
                    continue
                number = running.pop(connection)
                if kind == "error":
                    errors[number] = value
                else:
                    results[number] = value
                    hand_out(connection)
    if errors:
        raise errors[min(errors)]
    return [results[number] for number in range(len(tasks))]


@contextlib.contextmanager
def _workers(function: Callable[..., Any], count: int) -> Iterator[list[Connection]]:
    # Workers come from a small server process: this one may hold threads, which a fork does not survive.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    processes, connections = [], []
    try:
        with _interrupts_held_back():
            for _ in range(count):
                ours, theirs = context.Pipe()
                connections.append(ours)
                with theirs:
                    process = context.Process(target=_work, args=(function, theirs), daemon=True)
                    process.start()
                processes.append(process)
        yield connections
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(END_WITHIN_S)
            if process.is_alive():
                process.kill()
                process.join()
        for connection in connections:
            connection.close()


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Puts Ctrl-C off until the processes have started: they inherit the block, and never see it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Its start would lift the block.
    resource_tracker.ensure_running()
    pressed = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # Another thread of this process may still take the signal.
    handler = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if pressed:
        raise KeyboardInterrupt


def _work(function: Callable[..., Any], connection: Connection) -> None:
    """A worker's life: tasks in, counts and results out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    counter = _Counter(connection)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            result = ("result", function(task, counter.advance))
        except (UserError, OSError) as error:
            result = ("error", UserError(one_line(error)))
        counter.flush()
        connection.send(result)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Counter:
    """Sends counts, but not each of them."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._count = 0
        self._sent = time.monotonic()

    def advance(self, count: int) -> None:
        self._count += count
        if time.monotonic() - self._sent > REPORT_EVERY_S:
            self.flush()

    def flush(self) -> None:
        if self._count:
            self._connection.send(("count", self._count))
        self._count, self._sent = 0, time.monotonic()


def _send(connection: Connection, task: Any) -> None:
    with contextlib.suppress(BrokenPipeError):
        connection.send(task)


def _receive(connection: Connection) -> tuple[str, Any]:
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        raise UserError(
            "a worker process was killed; is there enough memory? Call again, with a smaller --num-workers"
        ) from None
