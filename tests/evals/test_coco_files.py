from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path

import pytest

from dehvf_ds.config import UserError
from dehvf_ds.data.building.sources import BadRows, SourceRow, read_coco, read_csv, read_karpathy
from dehvf_ds.data.building.writer import BuildSettings, plan_shards
from dehvf_ds.evals.coco_files import load_references, match_references

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


def planned(rows: list[SourceRow]) -> dict[str, dict]:
    """The records that shards would hold, by key."""
    for row in rows:
        assert row.image is not None
        row.image.parent.mkdir(parents=True, exist_ok=True)
        row.image.write_bytes(b"x")
    return {
        row.key: json.loads(row.record)
        for shard in plan_shards(rows, BuildSettings(), BadRows(skip=False))
        for row in shard
    }


def names_of(records: dict[str, dict]) -> dict[str, str]:
    return {key: record["file_name"] for key, record in records.items()}


def test_official_file(tmp_path) -> None:
    path = write(tmp_path, OFFICIAL)
    references = load_references(path)
    assert references == {
        "COCO_val2014_000000000042.jpg": ["Ein Vögelchen."],
        "COCO_val2014_000000000007.jpg": ["A dog. ", "A brown dog."],
    }
    records = planned(read_coco(path, tmp_path, bad=BadRows(skip=False)))
    assert list(match_references(references, names_of(records))) == list(records)
    # Another tool's shards have keys alone.
    stem = "COCO_val2014_000000000007"
    assert match_references(references, {stem: stem}) == {stem: ["A dog. ", "A brown dog."]}


def test_karpathys_splits(tmp_path) -> None:
    path = write(tmp_path, KARPATHY)
    assert load_references(path, "test") == {
        "COCO_val2014_000000000000.jpg": ["0."],
        "COCO_val2014_000000000002.jpg": ["2."],
    }
    both = load_references(path, "val+restval")
    records = planned(read_karpathy(path, tmp_path, "val+restval", bad=BadRows(skip=False)))
    assert list(match_references(both, names_of(records))) == list(records)


STEMS = [
    "a",
    "a b",
    "a_b",
    "a%20b",
    "ä",
    "a\u0308",
    "Ä",
    "犬",
    "a.b",
    "1.5 mm",
    "x|y",
    "#1",
    "a+b",
    "-",
    "a'b",
    "A",
]
FOLDERS = ["", "val2014/", "train2014/", "val 2014/", "ü/", "u\u0308/", "a/b/"]
ENDINGS = [".jpg", ".JPG", ".jpeg", ".png", ".PNG"]


@pytest.mark.parametrize("seed", range(12))
def test_every_row_finds_its_own_references_whatever_its_pictures_name(tmp_path, seed: int) -> None:
    draw = random.Random(seed)
    names = draw.sample([f + s + e for f in FOLDERS for s in STEMS for e in ENDINGS], 60)
    split, karpathy, official = [], {"images": []}, {"images": [], "annotations": []}
    for i, name in enumerate(names):
        captions = [f"picture {i}", f"number {i}"]
        folder, slash, last = name.rpartition("/")
        split.append(draw.choice(["test", "val"]))
        sentences = [{"raw": caption} for caption in captions]
        placed = {"filepath": folder} if slash else {}
        karpathy["images"].append(
            {"filename": last, "split": split[-1], "cocoid": i, "sentences": sentences, **placed}
        )
        official["images"].append({"id": i, "file_name": name})
        official["annotations"] += [{"image_id": i, "caption": caption} for caption in captions]
    (tmp_path / "table.csv").write_text(
        "image,caption\n" + "".join(f"{n},picture {i}\n{n},number {i}\n" for i, n in enumerate(names))
    )
    (tmp_path / "karpathy.json").write_text(json.dumps(karpathy))
    path, images = write(tmp_path, official), tmp_path / "images"
    built = {
        "coco": planned(read_coco(path, images, bad=BadRows(skip=False))),
        "karpathy": planned(
            read_karpathy(tmp_path / "karpathy.json", images, "test", bad=BadRows(skip=False))
        ),
        "csv": planned(read_csv(tmp_path / "table.csv", images, bad=BadRows(skip=False))),
    }
    read = [load_references(path), load_references(tmp_path / "karpathy.json", "test+val")]
    for records in built.values():
        assert len(records) in (60, split.count("test"))
        for references in read:
            found = match_references(references, names_of(records))
            assert found == {key: record["captions"] for key, record in records.items()}


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ("x.jpg", "val2014/x.jpg"),
        ("val2014/x.jpg", "x.jpg"),
        ("coco/val2014/x.jpg", "val2014/x.jpg"),
        ("x.JPG", "x.jpg"),
        ("x.jpg", "x.png"),
        ("x", "x.jpg"),
        ("ä 1.jpg", unicodedata.normalize("NFD", "ä 1.JPEG")),
        ("ü/x.jpg", unicodedata.normalize("NFD", "ü/x.jpg")),
    ],
)
def test_names_of_one_picture(row: str, reference: str) -> None:
    others = {"val2014/y.jpg": ["no"], "x y.jpg": ["no"], "xx.jpg": ["no"]}
    assert match_references({**others, reference: ["yes"]}, {"key": row}) == {"key": ["yes"]}


@pytest.mark.parametrize(
    ("rows", "references", "message"),
    [
        (["val2014/x.jpg"], ["train2014/x.jpg"], "lack 1 of 1 evaluated pictures, val2014/x.jpg the first"),
        (["1.5 mm.jpg"], ["1.jpg"], "lack 1 of 1"),
        (["a%20b.jpg"], ["a b.jpg", "a_b.jpg"], "lack 1 of 1"),
        (["x.jpg"], ["a/x.jpg", "b/x.jpg"], "x.jpg: .* have several such pictures: a/x.jpg, b/x.jpg"),
        (["x.jpg"], ["x.png", "x.webp"], "several such pictures"),
        (["a/x.jpg", "b/x.jpg"], ["x.jpg"], "a/x.jpg and b/x.jpg of the rows are both x.jpg"),
        (["x.jpg", "y.jpg"], ["x.jpg"], "lack 1 of 2 evaluated pictures, y.jpg the first; .* another split"),
    ],
)
def test_no_row_is_scored_against_anothers_references(rows, references, message) -> None:
    with pytest.raises(UserError, match=message):
        match_references({name: ["x"] for name in references}, {name: name for name in rows})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"].append(c["images"][1]), "1 image ids stand more than once, 7 the first"),
        (
            lambda c: c["images"].append({"id": 8, "file_name": "COCO_val2014_000000000007.jpg"}),
            "1 file names stand more than once, COCO_val2014_000000000007.jpg the first",
        ),
        (lambda c: c["annotations"].append(c["annotations"][2]), "1 annotation ids .* 3 the first"),
        (lambda c: c["annotations"].clear(), "no picture has a caption"),
        (lambda c: c["images"].pop(), "2 annotations are of no picture, image_id 7 the first"),
        (lambda c: c["annotations"][2].update(caption=None), "a caption of .*7.jpg is None, not a text"),
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


def test_pictures_without_a_caption_are_left_out_as_the_builder_does(tmp_path) -> None:
    content = json.loads(json.dumps(OFFICIAL))
    content["annotations"][1]["caption"] = " "
    content["annotations"].append({"id": 99, "image_id": 7, "caption": "nan"})
    path, bad = write(tmp_path, content), BadRows(skip=True)
    rows = planned(read_coco(path, tmp_path, bad=bad))
    assert list(load_references(path)) == ["COCO_val2014_000000000007.jpg"]
    assert list(rows) == ["COCO_val2014_000000000007"]
    references = load_references(path)["COCO_val2014_000000000007.jpg"]
    assert [text.strip() for text in references] == rows["COCO_val2014_000000000007"]["captions"]


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
