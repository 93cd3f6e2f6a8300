"""Annotation files: what is read of them, and what would be a silent fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dehvf_ds.config import UserError
from dehvf_ds.data.building.scan import BadRows
from dehvf_ds.data.building.sources import read_coco, read_csv, read_karpathy, read_llava, read_scienceqa

SCIENCEQA = Path(__file__).resolve().parents[4] / "shared" / "data" / "scienceqa"
STRICT = BadRows(skip=False)
WORDS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}]
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
PROBLEM = {"question": "?", "choices": ["x", "y"], "answer": 1, "hint": "", "grade": "grade2"}
PROBLEM |= {"subject": "social science", "split": "train"}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def coco(root, images, *annotations):
    captions = [{"image_id": i, "caption": text, "id": (*ids, None)[0]} for i, text, *ids in annotations]
    path = write(root / "captions.json", {"images": images, "annotations": captions})
    return read_coco(path, root / "images", bad=STRICT)


def karpathy(root, *entries, split="train"):
    base = {"imgid": 1, "split": "train", "sentences": [{"raw": "A."}, {"raw": "B."}]}
    path = write(root / "dataset.json", {"images": [base | entry for entry in entries]})
    return read_karpathy(path, root / "images", split, bad=STRICT)


def scienceqa(root, problems, pids=None, bad=STRICT, **options):
    write(root / "problems.json", problems)
    write(root / "pid_splits.json", {"train": list(problems) if pids is None else pids})
    return read_scienceqa(root, "train", bad=bad, **options)


def csv(root, content):
    rows = read_csv(write(root / "table.csv", content), root / "images", bad=STRICT)
    assert all(row.image == root / "images" / row.record["file_name"] for row in rows)
    return {row.record["file_name"]: row.record["captions"] for row in rows}


def llava(root, content, suffix="json"):
    return read_llava(write(root / f"chat.{suffix}", content), root / "images", bad=STRICT)


def test_coco_keeps_the_order_of_the_file(tmp_path):
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in (3, 1)]
    rows = coco(tmp_path, images, (1, "One."), (3, "Three."), (1, " Uno é. "))
    found = [(row.name, row.image, row.record["image_id"], row.record["captions"]) for row in rows]
    assert found == [
        ("3", tmp_path / "images/3.jpg", 3, ["Three."]),
        ("1", tmp_path / "images/1.jpg", 1, ["One.", "Uno é."]),
    ]


def test_karpathy_splits_folders_and_ids(tmp_path):
    (tmp_path / "images/val2014").mkdir(parents=True)
    (tmp_path / "images/val2014/a.jpg").touch()
    entries = [
        {"filename": "a.jpg", "filepath": "val2014", "cocoid": 77},
        {"filename": "b.jpg", "filepath": "val2014", "split": "restval"},
        {"filename": "c.jpg", "split": "test"},
    ]
    rows = karpathy(tmp_path, *entries, split="train+restval")
    found = [(row.image, row.record["image_id"]) for row in rows]
    assert found == [(tmp_path / "images/val2014/a.jpg", 77), (tmp_path / "images/b.jpg", 1)]
    with pytest.raises(UserError, match=r"no split 'dev'; it has restval \(1\), test \(1\), train \(1\)"):
        karpathy(tmp_path, *entries, split="train+dev")


def test_scienceqa_pictures_captions_and_names(tmp_path):
    problems = {
        "7": PROBLEM | {"image": "image.png", "split": "val"},
        "12": PROBLEM | {"image": None},
        "b-1": PROBLEM | {"image": "choice.png"},
    }
    captions = write(tmp_path / "captions.json", {"captions": {"7": "A map.", "12": "Not shown."}})
    bad = BadRows(skip=False)
    rows = scienceqa(tmp_path, problems, ["7", 12, "b-1"], captions=captions, bad=bad)
    images = tmp_path / "images"
    assert [(row.name, row.record["pid"], row.image, row.record.get("image_caption")) for row in rows] == [
        ("000007", "7", images / "val/7/image.png", "A map."),
        ("000012", "12", None, None),
        ("b-1", "b-1", images / "train/b-1/choice.png", None),
    ]
    assert bad.notes == {"problem whose picture has no caption in captions.json": 1}
    missing = scienceqa(tmp_path, problems, allow_missing_images=True, bad=bad)
    assert [row.image for row in missing] == [None] * 3
    assert [row.record.get("image_missing") for row in missing] == [True, None, True]
    assert bad.notes["problem whose picture is missing, text only"] == 2


@pytest.mark.skipif(not SCIENCEQA.is_dir(), reason=f"ScienceQA's problems are not at {SCIENCEQA}")
def test_real_scienceqa():
    for split, pids in json.loads((SCIENCEQA / "pid_splits.json").read_text()).items():
        options = {"captions": SCIENCEQA / "captions.json", "allow_missing_images": True}
        rows = read_scienceqa(SCIENCEQA, split, bad=STRICT, **options)
        assert [row.record["pid"] for row in rows] == pids
        assert all(bool(row.record["image"]) == ("image_caption" in row.record) for row in rows)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_llava(tmp_path, suffix):
    records = [
        {"id": "000033", "image": "coco/33.jpg", "conversations": TURNS * 3},
        {"id": "text", "conversations": WORDS, "model": "x"},
        {"id": 5, "image": ["b.png"], "conversations": TURNS},
        {"image": "", "conversations": [{"from": "system", "value": "s"}, *WORDS]},
    ]
    content = records if suffix == "json" else "\n\n".join(map(json.dumps, records)) + "\n"
    rows = llava(tmp_path, content, suffix)
    assert [row.record for row in rows] == records
    assert [row.name for row in rows] == ["000033", "text", "5", "000000004"]
    images = tmp_path / "images"
    assert [row.image for row in rows] == [images / "coco/33.jpg", None, images / "b.png", None]


PICTURE, ENTRY = {"id": 0, "file_name": "a.jpg"}, {"filename": "a.jpg"}
SAME = {"id": 1, "file_name": "./a.jpg"}


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda d: coco(d, [PICTURE, PICTURE | {"file_name": "b.jpg"}]), "id 0 belongs to two pictures"),
        (lambda d: coco(d, [PICTURE], (2, "x")), "names an unknown image_id"),
        (lambda d: coco(d, [PICTURE], (0, "A.", 5), (0, "A.", 5)), "annotation 5 occurs twice"),
        (lambda d: coco(d, [PICTURE, SAME], (0, "A."), (1, "B.")), r"\./a\.jpg: the picture occurs twice"),
        (lambda d: karpathy(d, ENTRY, ENTRY), r"images\[1\]: a\.jpg: the picture occurs twice"),
        (lambda d: coco(d, [PICTURE], (0, 7)), r"a\.jpg: .*no text \(7\)"),
        (lambda d: coco(d, [{"id": 1}]), r"images\[0\]: .*KeyError 'file_name'"),
        (lambda d: coco(d, [PICTURE | {"file_name": 5}], (0, "A.")), "cannot be read: TypeError"),
        (lambda d: coco(d, None), "not COCO captions: needs an object with lists images"),
        (lambda d: scienceqa(d, {"12": PROBLEM}, ["12", 12]), "problem 12: .*names it twice"),
        (lambda d: scienceqa(d, {"12": PROBLEM}, "12"), "not splits of ScienceQA with"),
        (
            lambda d: scienceqa(d, {}, captions=write(d / "c.json", {"captions": {"7": 5}})),
            "not captions of ScienceQA",
        ),
        (lambda d: llava(d, json.dumps({"conversations": WORDS}) + "\n\n{\n", "jsonl"), "line 3: cannot be"),
        (lambda d: llava(d, "{}\n{}\n"), "a file of one row a line is .jsonl"),
        (lambda d: llava(d, [{"id": "q7", "messages": []}]), "row 1: has no conversations.*id, messages"),
        (lambda d: llava(d, '[{"id": 1, "id": 2}]'), "the key 'id' occurs twice"),
        (lambda d: llava(d, "[" * 200_000), "not JSON"),
        (lambda d: read_coco(d / "no.json", d, bad=STRICT), "no.json: no such file"),
        (lambda d: csv(d, 'image,caption\na.jpg,"never\nb.jpg,x\n'), "line 3: not csv"),
        (lambda d: csv(d, "image\tcaption\tImage\na\tb\tc"), "its header names image twice"),
        (lambda d: csv(d, "a.jpg,One.\n"), "its first line is 'a.jpg,One.', not a header with"),
    ],
)
def test_mistakes_are_one_line_that_names_the_place(tmp_path, read, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path)
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith(f"{tmp_path}/")


@pytest.mark.parametrize("name", ["../x.jpg", "a/../../x.jpg", "/etc/x.jpg"])
@pytest.mark.parametrize(
    "read",
    [
        lambda d, name: coco(d, [{"id": 1, "file_name": name}], (1, "x")),
        lambda d, name: karpathy(d, {"filename": "x", "filepath": name}),
        lambda d, name: csv(d, f"image,caption\n{name},x\n"),
        lambda d, name: scienceqa(d, {"5": PROBLEM | {"image": "x.png", "split": name}}),
        lambda d, name: scienceqa(d, {name: PROBLEM | {"image": "x.png"}}),
        lambda d, name: llava(d, [{"id": 4, "image": name, "conversations": TURNS}]),
    ],
)
def test_paths_that_leave_the_directory(tmp_path, read, name):
    with pytest.raises(UserError, match="leaves the directory of the pictures"):
        read(tmp_path, name)


def test_absolute_names_inside_the_pictures(tmp_path):
    name = str(tmp_path / "images" / "a.jpg")
    assert csv(tmp_path, f"filepath\ttitle\n{name}\tOne.\n") == {name: ["One."]}
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "images")
    for folder in (tmp_path / "link", tmp_path / "x" / ".." / "images"):
        assert len(read_csv(tmp_path / "table.csv", folder, bad=STRICT)) == 1


TABLES = {
    "case and space": ' Image , CAPTION \n a.jpg , One.\na.jpg,"Two, three."\nb/c.png,Four.',
    "mark and dos": '\ufeffimage,caption\r\na.jpg,One.\r\na.jpg,"Two, three."\r\nb/c.png,Four.\r\n',
    "blank lines": '\n\nimage,caption\n\na.jpg,One.\n  \na.jpg,"Two, three."\n,\nb/c.png,Four.\n\n\n',
    "open_clip": "filepath\ttitle\na.jpg\tOne.\na.jpg\tTwo, three.\nb/c.png\tFour.\n",
    "excel": "sep=;\nFile Name;Text\na.jpg;One.\na.jpg;Two, three.\nb/c.png;Four.\n",
    "flickr30k": "image_name| n| comment\na.jpg| 0| One.\na.jpg| 1| Two, three.\nb/c.png| 0| Four.\n",
    "index column": ',image,x,caption\n0,a.jpg,,One.\n1,a.jpg,y,"Two, three."\n2,b/c.png,,Four.\n',
    "a space before quotes": 'image, caption\na.jpg, "One."\na.jpg, "Two, three."\nb/c.png, "Four."\n',
    "separators at the end": 'image,caption\na.jpg,One.,\na.jpg,"Two, three.",,\nb/c.png,Four.\n',
    "bars, all quoted": '"image"|"caption"\n"a.jpg"|"One."\n"a.jpg"|"Two, three."\n"b/c.png"|"Four."\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_many_programs(tmp_path, name):
    assert csv(tmp_path, TABLES[name]) == {"a.jpg": ["One.", "Two, three."], "b/c.png": ["Four."]}


@pytest.mark.parametrize(
    ("line", "caption"),
    [
        ('image,caption\na.jpg,"A ""dog""\nin two lines"\n', 'A "dog"\nin two lines'),
        # Flickr30k quotes nothing: a quote is a character. pandas quotes what has one, and doubles it.
        ('image_name| n| comment\na.jpg| 0| " A sign "\n', '" A sign "'),
        ('image_name| n| comment\na.jpg|1|"Open.\n', '"Open.'),
        ('image|caption\na.jpg|"A ""dog"" runs."\n', 'A "dog" runs.'),
    ],
)
def test_quotes_and_line_breaks(tmp_path, line, caption):
    assert csv(tmp_path, line) == {"a.jpg": [caption]}


def test_a_column_of_splits_is_named(tmp_path, capsys):
    for other, named in (("test", True), ("train", False)):
        assert len(csv(tmp_path, f"image,caption,Split\na.jpg,One.,train\nb.jpg,Two.,{other}\n")) == 2
        assert ("split (test (1), train (1)), which is not used" in capsys.readouterr().err) is named
