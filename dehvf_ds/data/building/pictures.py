"""The samples of one planned shard, with their pictures read, checked and made smaller."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dehvf_ds.config import UserError
from dehvf_ds.data.building.plan import MEMBER_OF_SUFFIX, BuildSettings, PlannedRow
from dehvf_ds.data.building.tasks import Advance
from dehvf_ds.data.damage import one_line
from dehvf_ds.data.images import decode_image
from dehvf_ds.data.shards import ShardRow


@dataclass(frozen=True)
class ShardTask:
    """A shard to write: its file, its samples, and how their pictures are stored."""

    path: Path
    rows: tuple[PlannedRow, ...]
    settings: BuildSettings


def read_rows(
    task: ShardTask, left_out: list[tuple[str, str]], advance: Advance | None = None
) -> Iterator[ShardRow]:
    """Yields a shard's samples; those of a bad picture go to ``left_out`` (key and line) where they may.

    Raises:
        UserError: a picture is bad, and is not to be left out.
    """
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
