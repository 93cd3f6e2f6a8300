"""Rows find their references by their pictures' names, whatever file they were published in."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path

import pytest
from evaluation.tiny_data import annotations

from dehvf_ds.config import UserError
from dehvf_ds.evaluation.dataset import load_references, match_references

STEMS = ["a", "a b", "a_b", "a%20b", "ä", "a\u0308", "Ä", "犬", "a.b", "1.5 mm", "x|y", "#1", "-", "a'b", "A"]
FOLDERS = ["", "val2014/", "train2014/", "val 2014/", "ü/", "u\u0308/", "a/b/"]
ENDINGS = [".jpg", ".JPG", ".jpeg", ".png", ".PNG"]


def write(path: Path, names: list[str], *, karpathy: bool) -> Path:
    """A published file with two captions a picture; in Karpathy's every third one belongs to val."""
    annotations(path, names)
    if karpathy:
        entries = []
        for i, name in enumerate(names):
            folder, _, last = name.rpartition("/")
            sentences = [{"raw": f"a text of {name}"}, {"raw": f" a text of {name}! "}]
            entry = {"filename": last, "split": "test" if i % 3 else "val", "cocoid": i}
            entries.append(entry | {"sentences": sentences} | ({"filepath": folder} if folder else {}))
        path.write_text(json.dumps({"images": entries}), encoding="utf-8")
    return path


@pytest.mark.parametrize("karpathy", [False, True])
def test_every_row_finds_its_own_references_whatever_its_pictures_name(
    tmp_path: Path, karpathy: bool
) -> None:
    draw = random.Random(0)
    # Karpathy's pictures may lie without their folders, so their names alone must differ.
    folders = FOLDERS[1:2] if karpathy else FOLDERS
    names = draw.sample([f + s + e for f in folders for s in STEMS for e in ENDINGS], 70)
    path = write(tmp_path / "x.json", names, karpathy=karpathy)
    found = load_references(path, "test+val")
    assert list(found) == names
    rows = draw.sample(names, 50)
    matched = match_references(found, {f"key {name}": name for name in rows})
    assert matched == {f"key {name}": [f"a text of {name}", f"a text of {name}!"] for name in rows}
    if karpathy:
        assert list(load_references(path, "val")) == names[::3]


def test_unusable_entries_are_left_out_with_a_note(tmp_path: Path, capsys) -> None:
    content = json.loads(write(tmp_path / "x.json", ["a.jpg", "b.jpg"], karpathy=False).read_text())
    content["annotations"][0]["caption"] = None
    content["annotations"].append({"image_id": 7, "caption": "of nothing"})
    (tmp_path / "x.json").write_text(json.dumps(content))
    assert list(load_references(tmp_path / "x.json", None)) == ["b.jpg"]
    printed = capsys.readouterr().err
    assert "a.jpg" in printed
    assert "annotation None names an unknown image_id" in printed


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ("val2014/x.jpg", "x.jpg"),
        ("coco/val2014/x.jpg", "val2014/x.jpg"),
        ("x.JPG", "x.png"),
        ("x", "x.jpg"),
        ("ü/ä 1.jpg", unicodedata.normalize("NFD", "ü/ä 1.JPEG")),
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
    ],
)
def test_no_row_is_scored_against_anothers_references(rows, references, message) -> None:
    with pytest.raises(UserError, match=message):
        match_references({name: ["x"] for name in references}, {name: name for name in rows})
