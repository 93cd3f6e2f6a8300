"""Shards of captions and of problems for evaluations; some pictures are cut off."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image
from tiny_shards import write_shards

from dehvf_ds.data.shards import ShardRow

PROBLEM = {"question": "Which?", "choices": ["red", "blue"], "answer": 1, "hint": ""}
PROBLEM |= {"subject": "natural science", "grade": "grade3"}


def picture(number: int) -> bytes:
    content = io.BytesIO()
    Image.linear_gradient("L").rotate(number * 40).convert("RGB").save(content, "PNG")
    return content.getvalue()


def problems(output: Path, records: list[dict[str, Any]], broken: tuple[int, ...] = ()) -> Path:
    """A row a record; one that names a picture has one."""
    rows = []
    for i, record in enumerate(records):
        members = {"json": json.dumps(record).encode()}
        if record.get("image") or record.get("file_name"):
            members["png"] = picture(i)[: 60 if i in broken else None]
        rows.append(ShardRow(key=f"{i:03d}", members=members))
    write_shards(rows, output, name="x", samples_per_shard=2, builder={})
    return output


def captions(output: Path, texts: list[str], broken: tuple[int, ...] = ()) -> Path:
    """A picture and two captions a row."""
    records = [
        {"captions": [text, f"{text} again"], "file_name": f"val/{i}.png"} for i, text in enumerate(texts)
    ]
    return problems(output, records, broken)


def annotations(path: Path, names: list[str], caption: str = "a text") -> Path:
    """COCO's file of pictures with two captions each: ``CAPTION of NAME``, and that with white space."""
    captions = [f"{caption} of {name}" for name in names]
    content = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [
            {"image_id": i, "caption": text}
            for i, told in enumerate(captions)
            for text in (told, f" {told}!\n")
        ],
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
