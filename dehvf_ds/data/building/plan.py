"""Which row goes into which shard, under which key: decided before a picture is read."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tarfile import BLOCKSIZE

from dehvf_ds.config import UserError
from dehvf_ds.data.building.left_out import BadRows
from dehvf_ds.data.building.sources import SourceRow
from dehvf_ds.data.damage import BAD_RECORD, NO_PICTURE, UNDECODABLE, one_line
from dehvf_ds.data.members import IMAGE_MEMBERS

MEMBER_OF_SUFFIX = {f".{kind}": kind for kind in IMAGE_MEMBERS} | {".jpeg": "jpg"}
MAX_KEY_LENGTH = 80
STAT_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """How rows become shards.

    Attributes:
        samples_per_shard: samples of a shard; None where ``bytes_per_shard`` says when one is full.
        bytes_per_shard: largest sum of the source files' sizes in a shard (a single larger row is one, too).
        shorter_side: pictures with a longer one are resized to this shorter side and stored as JPEG.
        jpeg_quality: quality of those, 1 to 100.
        skip_bad: leave out rows that cannot be used.
        decode: decode every picture, to find those that are not whole.
    """

    samples_per_shard: int | None = 1000
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
        if self.jpeg_quality > 100:
            raise UserError(f"--jpeg-quality {self.jpeg_quality}: must be at most 100")


@dataclass(frozen=True)
class PlannedRow:
    """One sample of the plan: its key, its record as it is stored, its picture and that file's size."""

    key: str
    record: bytes
    image: Path | None
    image_bytes: int


def plan_shards(
    rows: Sequence[SourceRow], settings: BuildSettings, bad: BadRows | None = None
) -> list[list[PlannedRow]]:
    """Gives every row its key and its shard; looks at every picture's size and at no picture's bytes.

    Keys do not depend on which rows are left out.

    Args:
        rows: the samples.
        settings: how rows become shards.
        bad: takes rows whose picture is missing, of an unknown kind or empty, or whose record cannot be
            stored.

    Raises:
        UserError: such a row is not to be left out.
    """
    bad = bad or BadRows(skip=settings.skip_bad)
    sizes = picture_sizes(rows)
    missing = sum(size is None for size in sizes), sum(row.image is not None for row in rows)
    keys = _unique_keys([row.name for row in rows])
    shards, filled = [[]], 0
    for row, key, image_bytes in zip(rows, keys, sizes, strict=True):
        try:
            record = json.dumps(row.record, ensure_ascii=False, sort_keys=True).encode()
        except ValueError as error:
            bad.add(key, f"sample {key}: its record is not fit for UTF-8: {one_line(error)}", BAD_RECORD)
            continue
        if problem := _picture_problem(row.image, image_bytes, missing):
            bad.add(key, f"{row.image}: {problem[0]}", problem[1])
            continue
        planned = PlannedRow(key, record, row.image, image_bytes or 0)
        num_bytes = planned.image_bytes + len(record)
        full = len(shards[-1]) == settings.samples_per_shard
        if settings.bytes_per_shard is not None:
            full = bool(shards[-1]) and filled + num_bytes > settings.bytes_per_shard
        if full:
            shards.append([])
            filled = 0
        shards[-1].append(planned)
        filled += num_bytes
    return shards


def stored_bytes(row: PlannedRow) -> int:
    """Size of a sample in its shard when the picture is copied: a header block and whole blocks a member."""
    members = [len(row.record), *([] if row.image is None else [row.image_bytes])]
    return sum(BLOCKSIZE * (1 + -(-size // BLOCKSIZE)) for size in members)


def describe_file(path: Path) -> dict[str, str]:
    """A file's name and hash: what a manifest says of it, the same on every machine."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as file:
        return {"name": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def picture_sizes(rows: Sequence[SourceRow]) -> list[int | None]:
    """Size of each row's picture in bytes; 0 for a row without one, None where there is no such file."""
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        return list(pool.map(_file_bytes, [row.image for row in rows]))


def _picture_problem(path: Path | None, size: int | None, missing: tuple[int, int]) -> tuple[str, str] | None:
    """What is wrong with a row's picture, and a word to count it by."""
    if path is None:
        return None
    if size is None:
        others = f" (and {missing[0] - 1} others)" if missing[0] > 1 else ""
        near = _near(path)
        remedy = "look at --images or --root" if near is None else f"rename {near.name!a}, which is there"
        return f"no such picture{others} of {missing[1]}; {remedy}", NO_PICTURE
    if path.suffix.lower() not in MEMBER_OF_SUFFIX:
        known = ", ".join(f".{kind}" for kind in ("jpg", "png", "webp", "gif", "bmp", "tif", "avif", "jp2"))
        return f"a picture's name ends in one of {known}, ..; convert it", UNDECODABLE
    return ("a picture of 0 bytes; copy it again", UNDECODABLE) if size == 0 else None


def _near(path: Path) -> Path | None:
    """A file whose name differs in its Unicode form (macOS has its own) or in the case of its ending."""
    names = {unicodedata.normalize(form, path.name) for form in ("NFC", "NFD")}
    names |= {path.stem + change(path.suffix) for change in (str.lower, str.upper)}
    near = (path.with_name(name) for name in sorted(names - {path.name}))
    return next((other for other in near if _file_bytes(other) is not None), None)


def _file_bytes(path: Path | None) -> int | None:
    """A file's size; None if there is no such file, 0 for no path."""
    if path is None:
        return 0
    try:
        return path.stat().st_size if path.is_file() else None
    except (OSError, ValueError):
        return None


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
