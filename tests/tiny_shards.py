"""Shard directories for tests, without files to build them from."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from dehvf_ds.data.building.directory import write_index
from dehvf_ds.data.building.scan import shard_name, write_shard
from dehvf_ds.data.shards import ShardRow


def write_shards(
    rows: Iterable[ShardRow], output: Path, *, name: str, samples_per_shard: int, builder: dict[str, Any]
) -> dict[str, Any]:
    """Writes rows as a shard directory in this process; returns the manifest."""
    output.mkdir(parents=True, exist_ok=True)
    names, tables = [], []
    rows = iter(rows)
    while group := list(islice(rows, samples_per_shard)):
        names.append(shard_name(name, len(names)))
        tables.append(write_shard(group, output / names[-1]))
    return write_index(output, names, tables, builder)


def picture_bytes(colour: tuple[int, int, int] = (200, 30, 10)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 5), colour).save(file, "PNG")
    return file.getvalue()


def caption_row(number: int, *, captions: int = 2) -> ShardRow:
    texts = [f"The dog {number} runs {k}." for k in range(captions)]
    record = {"image_id": number, "file_name": f"{number}.png", "captions": texts}
    members = {"json": json.dumps(record).encode(), "png": picture_bytes((number % 256, 0, 0))}
    return ShardRow(key=f"row{number}", members=members)
