from __future__ import annotations

import json
from pathlib import Path

import pytest

from dehvf_ds.config import UserError
from dehvf_ds.data.building.sources import read_coco, read_karpathy, read_llava, read_scienceqa
from dehvf_ds.data.building.tables import read_csv

SCIENCEQA = Path(__file__).resolve().parents[4] / "shared" / "data" / "scienceqa"
ESCAPES = ["../x.jpg", "a/../../x.jpg", "/etc/x.jpg", "a\0.jpg"]


@pytest.fixture
def notes():
    return []


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def one_line(caught, *parts):
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def coco(tmp_path, images, *annotations):
    captions = [{"id": k, "image_id": i, "caption": text} for k, (i, text) in enumerate(annotations)]
    return write(tmp_path / "captions.json", {"images": images, "annotations": captions})


def test_coco_keeps_the_order_of_the_file(tmp_path, notes):
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in (3, 1)]
    path = coco(tmp_path, images, (1, "One."), (3, "Three."), (1, " Uno. "), (3, " "))
    rows = read_coco(path, tmp_path / "images", note=notes.append)
    assert [(row.name, row.record["captions"]) for row in rows] == [
        ("3", ["Three."]),
        ("1", ["One.", "Uno."]),
    ]
    assert rows[0].image == tmp_path / "images" / "3.jpg"
    assert notes == ["1 times: empty caption beside others left out"]


@pytest.mark.parametrize(
    ("images", "annotations", "parts"),
    [
        ([{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}], [], ["id 1 is given to two"]),
        ([{"id": 1, "file_name": "a.jpg"}], [(2, "x")], ["unknown image_id"]),
        (
            [{"id": 1, "file_name": "a.jpg"}],
            [(1, 7)],
            ["a.jpg: has an empty caption, or one that is no text (int 7)"],
        ),
        ([{"id": 1, "file_name": "a.jpg"}], [(1, None)], ["no text (NoneType None)"]),
        ([{"id": 1}], [(1, "x")], ["lacks a field", "file_name"]),
        ([{"id": [], "file_name": "a.jpg"}], [], ["another type"]),
        ([{"id": 1, "file_name": 5}], [], ["name 5 is not a text"]),
        ([{"id": 1, "file_name": ""}], [], ["name is empty"]),
        ([7], [], ["another type"]),
        (None, [], ["another type"]),
    ],
)
def test_coco_mistakes(tmp_path, notes, images, annotations, parts):
    path = coco(tmp_path, images, *annotations)
    with pytest.raises(UserError) as caught:
        read_coco(path, tmp_path, note=notes.append)
    one_line(caught, str(path), *parts)


@pytest.mark.parametrize("name", ESCAPES)
def test_paths_that_leave_the_directory(tmp_path, notes, name):
    images = tmp_path / "images"
    callers = [
        lambda: read_coco(
            coco(tmp_path, [{"id": 1, "file_name": name}], (1, "x")), images, note=notes.append
        ),
        lambda: read_karpathy(
            write(
                tmp_path / "k.json",
                {"images": [{"filename": name, "split": "a", "imgid": 1, "sentences": [{"raw": "x"}]}]},
            ),
            images,
            "a",
            note=notes.append,
        ),
        lambda: read_karpathy(
            write(
                tmp_path / "k.json",
                {"images": [{"filename": "x", "filepath": name, "split": "a", "imgid": 1, "sentences": []}]},
            ),
            images,
            "a",
            note=notes.append,
        ),
        lambda: read_csv(write(tmp_path / "c.csv", f"image,caption\n{name},x\n"), images, note=notes.append),
        lambda: scienceqa(tmp_path, {"5": {"image": name, "split": "train"}}, notes),
        lambda: scienceqa(tmp_path, {"5": {"image": "x.png", "split": name}}, notes),
        lambda: scienceqa(tmp_path, {name: {"image": "x.png", "split": "train"}}, notes),
        lambda: read_llava(
            write(tmp_path / "l.json", [{"id": 4, "image": name, "conversations": TURNS}]), images
        ),
    ]
    for call in callers:
        with pytest.raises(UserError, match="leaves the directory of the pictures"):
            call()


def test_csv_mistakes(tmp_path, notes):
    path = tmp_path / "c.csv"
    for content, part in [
        (b"image,caption\na.jpg,\xff\n", "not UTF-8 at byte 20, line 2"),
        (b'image,caption\na.jpg,"never closed\nb.jpg,x\n', "line 3: not csv"),
        (b'image,caption\na.jpg,"' + b"x" * 200_000 + b'"\n', "line 2: not csv: field larger"),
        (b"image,caption\na.jpg\n", "line 2: 1 fields, not 2"),
        (b"image,caption\n,text\n", "a picture's name is empty"),
        (b"", "its first line is '', not a header"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_csv(path, tmp_path, note=notes.append)
        one_line(caught, str(path), part)
    path.write_bytes(b'\xef\xbb\xbfimage,caption\r\na.jpg,"A ""dog"", here"\r\na.jpg, \r\n')
    rows = read_csv(path, tmp_path, note=notes.append)
    assert rows[0].record == {"image_id": "a", "file_name": "a.jpg", "captions": ['A "dog", here']}
    assert notes == ["1 times: empty caption beside others left out"]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"\xff\xfe{", "not UTF-8"),
        (b"{", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"[]", "needs an object"),
        (b"", "not JSON"),
    ],
)
def test_files_that_are_no_json_objects(tmp_path, notes, content, part):
    path = tmp_path / "problems.json"
    path.write_bytes(content)
    for call in (
        lambda: read_coco(path, tmp_path, note=notes.append),
        lambda: read_karpathy(path, tmp_path, "a", note=notes.append),
        lambda: read_scienceqa(tmp_path, "a", note=notes.append),
    ):
        with pytest.raises(UserError) as caught:
            call()
        one_line(caught, str(path), part)


def scienceqa(root, problems, notes, *, captions=None, **options):
    write(root / "problems.json", problems)
    write(root / "pid_splits.json", {"train": list(problems), "minitest": list(problems)[:1]})
    if captions is not None:
        options["captions"] = write(root / "captions.json", captions)
    return read_scienceqa(root, "train", note=notes.append, **options)


PROBLEM = {"question": "?", "choices": ["x", "y"], "answer": 1, "hint": "", "grade": "grade2"}
PROBLEM |= {"subject": "social science"}
PROBLEMS = {
    "7": PROBLEM | {"image": "image.png", "split": "val"},
    "12": PROBLEM | {"image": None, "split": "train"},
    "9": PROBLEM | {"image": "choice.png", "split": "train"},
}


def test_scienceqa_pictures_lie_in_the_problems_own_split(tmp_path, notes):
    rows = scienceqa(tmp_path, PROBLEMS, notes)
    images = tmp_path / "images"
    assert [row.image for row in rows] == [images / "val/7/image.png", None, images / "train/9/choice.png"]
    assert [row.name for row in rows] == ["000007", "000012", "000009"]
    assert "image_caption" not in rows[0].record
    assert len(read_scienceqa(tmp_path, "minitest", note=notes.append)) == 1
    assert notes == []


def test_scienceqa_captions_of_pictures(tmp_path, notes):
    rows = scienceqa(tmp_path, PROBLEMS, notes, captions={"captions": {"7": "A map.", "12": "Not shown."}})
    assert [row.record.get("image_caption") for row in rows] == ["A map.", None, None]
    assert notes == [f"1 of 2 pictures have no caption in {tmp_path / 'captions.json'}"]
    for wrong in ({}, {"captions": []}, {"captions": {"7": 5}}):
        with pytest.raises(UserError, match=r"not captions of ScienceQA"):
            scienceqa(tmp_path, PROBLEMS, notes, captions=wrong)


def test_scienceqa_missing_pictures(tmp_path, notes):
    rows = scienceqa(tmp_path, PROBLEMS, notes, allow_missing_images=True)
    assert [row.image for row in rows] == [None] * 3
    assert [row.record.get("image_missing") for row in rows] == [True, None, True]
    assert notes == ["2 of 2 pictures are missing; their problems are text only"]


def test_scienceqa_numbers_and_repeated_names_in_a_split(tmp_path, notes):
    scienceqa(tmp_path, PROBLEMS, notes)
    write(tmp_path / "pid_splits.json", {"train": [12, "7"]})
    assert [r.name for r in read_scienceqa(tmp_path, "train", note=notes.append)] == ["000012", "000007"]
    write(tmp_path / "pid_splits.json", {"train": ["12", 12]})
    with pytest.raises(UserError, match=r"problem 12: pid_splits\.json names it twice"):
        read_scienceqa(tmp_path, "train", note=notes.append)
    for wrong in ("12", None, 5, {"12": 1}):
        write(tmp_path / "pid_splits.json", {"train": wrong})
        with pytest.raises(UserError, match=r"train is .*, not a list of problems"):
            read_scienceqa(tmp_path, "train", note=notes.append)


def test_a_picture_is_one_row(tmp_path, notes):
    """As the references of an evaluation have it; it would be scored twice."""
    images = [{"id": i, "file_name": name} for i, name in enumerate(["a.jpg", "./a.jpg"])]
    with pytest.raises(UserError, match=r"\./a\.jpg: the picture stands twice"):
        read_coco(coco(tmp_path, images, (0, "A."), (1, "B.")), tmp_path, note=notes.append)
    entries = [
        {"filename": "a.jpg", "imgid": i, "split": "train", "sentences": [{"raw": "A."}]} for i in range(2)
    ]
    path = write(tmp_path / "k.json", {"images": [*entries, {"split": ["train"]}]})
    with pytest.raises(UserError, match=r"images\[1\]: a\.jpg: the picture stands twice"):
        read_karpathy(path, tmp_path, "train", note=notes.append)
    annotation = {"id": 1, "image_id": 0, "caption": "A."}
    path = write(tmp_path / "twice.json", {"images": images[:1], "annotations": [annotation] * 2})
    with pytest.raises(UserError, match="annotation 1 stands twice"):
        read_coco(path, tmp_path, note=notes.append)


def test_names_that_stand_twice_in_a_file(tmp_path, notes):
    path = write(tmp_path / "captions.json", '{"images": [], "images": [], "annotations": []}')
    with pytest.raises(UserError, match=r"captions\.json: not JSON: the name 'images' stands twice"):
        read_coco(path, tmp_path, note=notes.append)


@pytest.mark.parametrize(
    ("problems", "part"),
    [
        ({"7": 5}, "another type"),
        ({"7": {"image": "a.png"}}, "lacks a field"),
        ({"7": PROBLEM | {"image": 5, "split": "a"}}, "name 5 is not a text"),
    ],
)
def test_scienceqa_mistakes(tmp_path, notes, problems, part):
    with pytest.raises(UserError) as caught:
        scienceqa(tmp_path, problems, notes)
    one_line(caught, part, str(tmp_path / "problems.json"))


def test_scienceqa_numbers_that_are_none(tmp_path, notes):
    rows = scienceqa(tmp_path, {"b-1": PROBLEM}, notes)
    assert rows[0].name == "b-1"


WORDS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}]
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_llava(tmp_path, suffix):
    records = [
        {"id": "000033", "image": "coco/train2017/000033.jpg", "conversations": TURNS * 3},
        {"id": "text", "conversations": WORDS, "model": "x"},
        {"id": 5, "image": ["b.png"], "conversations": TURNS},
        {"image": "", "conversations": [{"from": "system", "value": "s"}, *WORDS]},
    ]
    content = json.dumps(records) if suffix == "json" else "\n".join(map(json.dumps, records)) + "\n\n"
    rows = read_llava(write(tmp_path / f"chat.{suffix}", content), tmp_path)
    assert [row.record for row in rows] == records
    assert [row.name for row in rows] == ["000033", "text", "5", "000000004"]
    assert [row.image for row in rows] == [
        tmp_path / "coco/train2017/000033.jpg",
        None,
        tmp_path / "b.png",
        None,
    ]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"id": 1}, ["needs a list of rows"]),
        ([7], ["row 1: is no object"]),
        ([{"id": "q7"}], ["id 'q7'", 'has no conversations, a list of {"from":', "its fields are id"]),
        ([{"id": "q7", "messages": []}], ["id 'q7'", "has no conversations", "its fields are id, messages"]),
        ([{"id": "q7", "conversations": []}], ["id 'q7'", "has no turns"]),
        (
            [{"id": "q7", "conversations": ["hello"]}],
            ["id 'q7'", 'not {"from": "human" or "gpt", "value": TEXT} (it holds str)'],
        ),
        ([{"id": "q7", "conversations": [{"from": "human"}]}], ["id 'q7'", "value is NoneType, not a text"]),
        (
            [{"id": "q7", "conversations": TURNS, "image": ["a.jpg", "b.jpg"]}],
            ["id 'q7'", "2 pictures; one picture"],
        ),
        ([{"id": "q7", "conversations": TURNS, "image": {"path": "a"}}], ["id 'q7'", "is not a text"]),
    ],
)
def test_llava_mistakes(tmp_path, content, parts):
    path = write(tmp_path / "l.json", content)
    with pytest.raises(UserError) as caught:
        read_llava(path, tmp_path)
    one_line(caught, str(path), *parts)


def test_llava_lines_are_numbered(tmp_path):
    path = write(tmp_path / "l.jsonl", json.dumps({"id": 1, "conversations": WORDS}) + "\n\n{\n")
    with pytest.raises(UserError) as caught:
        read_llava(path, tmp_path)
    one_line(caught, f"{path}, line 3: not JSON")


@pytest.mark.skipif(not SCIENCEQA.is_dir(), reason=f"ScienceQA's problems are not at {SCIENCEQA}")
def test_real_scienceqa(notes):
    splits = json.loads((SCIENCEQA / "pid_splits.json").read_text())
    for split, pids in splits.items():
        options = {"captions": SCIENCEQA / "captions.json", "allow_missing_images": True}
        rows = read_scienceqa(SCIENCEQA, split, note=notes.append, **options)
        assert [row.record["pid"] for row in rows] == pids
        assert all(bool(row.record["image"]) == ("image_caption" in row.record) for row in rows)
