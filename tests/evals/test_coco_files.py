from __future__ import annotations

import json
from pathlib import Path

import pytest

from dehvf_ds.config import UserError
from dehvf_ds.data.building.plan import BuildSettings, plan_shards
from dehvf_ds.data.building.sources import read_coco, read_karpathy
from dehvf_ds.evals.coco_files import load_references

OFFICIAL = {
    "images": [
        {"id": 42, "file_name": "COCO_val2014_000000000042.jpg"},
        {"id": 7, "file_name": "COCO_val2014_000000000007.jpg"},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "caption": "A dog. "},
        {"id": 2, "image_id": 42, "caption": "Ein Vögelchen."},
        {"id": 3, "image_id": 7, "caption": "A brown dog."},
    ],
}
KARPATHY = {
    "images": [
        {
            "filename": f"COCO_val2014_{i:012d}.jpg",
            "split": split,
            "cocoid": i,
            "sentences": [{"raw": f"{i}."}],
        }
        for i, split in enumerate(["test", "val", "test", "restval"])
    ]
}


def write(folder: Path, content: object) -> Path:
    path = folder / "captions.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def shard_keys(folder: Path, rows) -> list[str]:
    for row in rows:
        row.image.write_bytes(b"x")
    return [row.key for shard in plan_shards(rows, BuildSettings()) for row in shard]


def test_official_file(tmp_path) -> None:
    path = write(tmp_path, OFFICIAL)
    references = load_references(path)
    assert references == {
        "COCO_val2014_000000000042": ["Ein Vögelchen."],
        "COCO_val2014_000000000007": ["A dog. ", "A brown dog."],
    }
    assert list(references) == shard_keys(tmp_path, read_coco(path, tmp_path, note=print))


def test_karpathys_splits(tmp_path) -> None:
    path = write(tmp_path, KARPATHY)
    assert load_references(path, "test") == {
        "COCO_val2014_000000000000": ["0."],
        "COCO_val2014_000000000002": ["2."],
    }
    both = load_references(path, "val+restval")
    assert list(both) == shard_keys(tmp_path, read_karpathy(path, tmp_path, "val+restval", note=print))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"].append(c["images"][1]), "1 image ids stand more than once, 7 the first"),
        (
            lambda c: c["images"].append({"id": 8, "file_name": "x/COCO_val2014_000000000007.png"}),
            "1 file names stand more than once, COCO_val2014_000000000007 the first",
        ),
        (lambda c: c["annotations"].append(c["annotations"][2]), "1 annotation ids .* 3 the first"),
        (lambda c: c["annotations"].pop(1), "1 pictures have no caption, COCO_val2014_000000000042.jpg"),
        (lambda c: c["annotations"][1].update(caption=" "), "1 pictures have no caption"),
        (lambda c: c["images"].pop(), "2 annotations are of no picture, id 1 the first"),
        (lambda c: c["annotations"][2].update(caption=None), "lacks a field or has another type"),
        (lambda c: c["images"][0].pop("file_name"), "lacks a field or has another type: KeyError"),
        (lambda c: c["images"][0].update(id=[1]), "lacks a field or has another type"),
        (lambda c: c.pop("images"), "has no list of images"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, message) -> None:
    content = json.loads(json.dumps(OFFICIAL))
    change(content)
    with pytest.raises(UserError, match=rf"captions\.json: .*{message}"):
        load_references(write(tmp_path, content))


def test_splits_that_are_not_there(tmp_path) -> None:
    for split in ("dev", "val+dev", None):
        with pytest.raises(UserError, match=r"is none of restval \(1\), test \(2\), val \(1\)"):
            load_references(write(tmp_path, KARPATHY), split)
    with pytest.raises(UserError, match="have no splits"):
        load_references(write(tmp_path, OFFICIAL), "test")


def test_files_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load_references(tmp_path / "captions.json")
    (tmp_path / "captions.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load_references(tmp_path / "captions.json")
