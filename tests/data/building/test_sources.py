"""Annotation files: what is read of them, and what would be a silent fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dehvf_ds.config import UserError
from dehvf_ds.data.building.sources import (
    BadRows,
    read_coco,
    read_csv,
    read_karpathy,
    read_llava,
    read_scienceqa,
)

SCIENCEQA = Path(__file__).resolve().parents[4] / "shared" / "data" / "scienceqa"
STRICT = BadRows(skip=False)
WORDS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}]
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
PROBLEM = {"question": "?", "choices": ["x", "y"], "answer": 1, "hint": "", "grade": "grade2"}
PROBLEM |= {"subject": "social science"}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def coco(root, images, *annotations):
    captions = [{"id": k, "image_id": i, "caption": text} for k, (i, text) in enumerate(annotations)]
    path = write(root / "captions.json", {"images": images, "annotations": captions})
    return read_coco(path, root / "images", bad=STRICT)


def karpathy(root, *entries, split="train"):
    base = {"imgid": 1, "split": "train", "sentences": [{"raw": "A."}, {"raw": "B."}]}
    path = write(root / "dataset.json", {"images": [base | entry for entry in entries]})
    return read_karpathy(path, root / "images", split, bad=STRICT)


def scienceqa(root, problems, pids=None, **options):
    write(root / "problems.json", problems)
    write(root / "pid_splits.json", {"train": list(problems) if pids is None else pids})
    return read_scienceqa(root, "train", bad=STRICT, **options)


def csv(root, content, bad=STRICT):
    path = root / "table.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    rows = read_csv(path, root / "images", bad=bad)
    assert all(row.image == root / "images" / row.record["file_name"] for row in rows)
    return {row.record["file_name"]: row.record["captions"] for row in rows}


def llava(root, content, suffix="json"):
    return read_llava(write(root / f"chat.{suffix}", content), root / "images", bad=STRICT)


def test_coco_keeps_the_order_of_the_file(tmp_path):
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in (3, 1)]
    rows = coco(tmp_path, images, (1, "One."), (3, "Three."), (1, " Uno é. "))
    assert [(row.name, row.image, row.record["captions"]) for row in rows] == [
        ("3", tmp_path / "images/3.jpg", ["Three."]),
        ("1", tmp_path / "images/1.jpg", ["One.", "Uno é."]),
    ]
    assert rows[1].record["image_id"] == 1


def test_karpathy_splits_folders_and_ids(tmp_path):
    (tmp_path / "images/val2014").mkdir(parents=True)
    (tmp_path / "images/val2014/a.jpg").touch()
    entries = [
        {"filename": "a.jpg", "filepath": "val2014", "cocoid": 77},
        {"filename": "b.jpg", "filepath": "val2014", "split": "restval"},
        {"filename": "c.jpg", "split": "test"},
    ]
    found = [
        (row.image, row.record["image_id"]) for row in karpathy(tmp_path, *entries, split="train+restval")
    ]
    assert found == [(tmp_path / "images/val2014/a.jpg", 77), (tmp_path / "images/b.jpg", 1)]
    with pytest.raises(UserError, match=r"no split 'dev'; it has restval \(1\), test \(1\), train \(1\)"):
        karpathy(tmp_path, *entries, split="train+dev")


def test_scienceqa_pictures_captions_and_names(tmp_path, capsys):
    problems = {
        "7": PROBLEM | {"image": "image.png", "split": "val"},
        "12": PROBLEM | {"image": None, "split": "train"},
        "b-1": PROBLEM | {"image": "choice.png", "split": "train"},
    }
    captions = write(tmp_path / "captions.json", {"captions": {"7": "A map.", "12": "Not shown."}})
    rows = scienceqa(tmp_path, problems, ["7", 12, "b-1"], captions=captions)
    folder = tmp_path / "images"
    assert [row.image for row in rows] == [folder / "val/7/image.png", None, folder / "train/b-1/choice.png"]
    assert [(row.name, row.record["pid"]) for row in rows] == [
        ("000007", "7"),
        ("000012", "12"),
        ("b-1", "b-1"),
    ]
    assert [row.record.get("image_caption") for row in rows] == ["A map.", None, None]
    assert capsys.readouterr().err == f"note: 1 of 2 pictures have no caption in {captions}\n"
    missing = scienceqa(tmp_path, problems, allow_missing_images=True)
    assert [(row.image, row.record.get("image_missing")) for row in missing] == [
        (None, True),
        (None, None),
        (None, True),
    ]
    assert "2 of 2 pictures are missing; their problems are text only" in capsys.readouterr().err
    with pytest.raises(UserError, match="not captions of ScienceQA"):
        scienceqa(tmp_path, problems, captions=write(tmp_path / "c.json", {"captions": {"7": 5}}))


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
    rows = llava(
        tmp_path, records if suffix == "json" else "\n\n".join(map(json.dumps, records)) + "\n", suffix
    )
    folder = tmp_path / "images"
    assert [row.record for row in rows] == records
    assert [row.name for row in rows] == ["000033", "text", "5", "000000004"]
    assert [row.image for row in rows] == [folder / "coco/33.jpg", None, folder / "b.png", None]


PICTURE = {"id": 0, "file_name": "a.jpg"}
ENTRY = {"filename": "a.jpg"}
MISTAKES = {
    "two pictures of one id": (
        lambda d: coco(d, [PICTURE, PICTURE | {"file_name": "b.jpg"}]),
        "id 0 is given to two",
    ),
    "an annotation of no picture": (lambda d: coco(d, [PICTURE], (2, "x")), "unknown image_id"),
    "a picture named twice": (
        lambda d: coco(d, [PICTURE, {"id": 1, "file_name": "./a.jpg"}], (0, "A."), (1, "B.")),
        r"\./a\.jpg: the picture stands twice",
    ),
    "a picture named twice by Karpathy": (
        lambda d: karpathy(d, ENTRY, ENTRY),
        r"images\[1\]: a\.jpg: the picture stands twice",
    ),
    "a caption that is a number": (lambda d: coco(d, [PICTURE], (0, 7)), r"a.jpg: .*no text \(int 7\)"),
    "an entry without a field": (lambda d: coco(d, [{"id": 1}]), r"images\[0\]: .*KeyError 'file_name'"),
    "a list that is none": (lambda d: coco(d, None), "not COCO captions: needs an object with lists images"),
    "a name that is a number": (lambda d: coco(d, [PICTURE | {"file_name": 5}]), "name 5 is not a text"),
    "a name that is empty": (lambda d: coco(d, [PICTURE | {"file_name": ""}]), "name is empty"),
    "a problem named twice": (
        lambda d: scienceqa(d, {"12": PROBLEM}, ["12", 12]),
        "problem 12: .*names it twice",
    ),
    "a split that is no list": (
        lambda d: scienceqa(d, {"12": PROBLEM}, "12"),
        "not splits of ScienceQA with",
    ),
    "a line that is no JSON": (
        lambda d: llava(d, json.dumps({"conversations": WORDS}) + "\n\n{\n", "jsonl"),
        r"chat\.jsonl, line 3: cannot be read: JSONDecodeError",
    ),
    "lines in a .json": (lambda d: llava(d, "{}\n{}\n"), "a file of one row a line is .jsonl"),
    "no conversations": (
        lambda d: llava(d, [{"id": "q7", "messages": []}]),
        "row 1: has no conversations.*id, messages",
    ),
    "a name twice in an object": (lambda d: llava(d, '[{"id": 1, "id": 2}]'), "the name 'id' stands twice"),
    "brackets without end": (lambda d: llava(d, "[" * 200_000), "not JSON"),
    "no file": (lambda d: read_coco(d / "no.json", d, bad=STRICT), "no.json: no such file"),
    "a quote that never ends": (
        lambda d: csv(d, 'image,caption\na.jpg,"never\nb.jpg,x\n'),
        "line 3: not csv",
    ),
    "two columns of one name": (
        lambda d: csv(d, "image\tcaption\tImage\na\tb\tc"),
        "its header names image twice",
    ),
    "no header": (lambda d: csv(d, "a.jpg,One.\n"), "its first line is 'a.jpg,One.', not a header with"),
    "a header without captions": (lambda d: csv(d, "image;label\n"), "its first line is 'image;label', not"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_that_names_the_place(tmp_path, name):
    read, message = MISTAKES[name]
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path)
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith(f"{tmp_path}/")


@pytest.mark.parametrize("name", ["../x.jpg", "a/../../x.jpg", "/etc/x.jpg", "a\0.jpg"])
@pytest.mark.parametrize(
    "read",
    [
        lambda d, name: coco(d, [{"id": 1, "file_name": name}], (1, "x")),
        lambda d, name: karpathy(d, {"filename": name}),
        lambda d, name: karpathy(d, {"filename": "x", "filepath": name}),
        lambda d, name: csv(d, f"image,caption\n{name},x\n"),
        lambda d, name: scienceqa(d, {"5": PROBLEM | {"image": name, "split": "train"}}),
        lambda d, name: scienceqa(d, {"5": PROBLEM | {"image": "x.png", "split": name}}),
        lambda d, name: scienceqa(d, {name: PROBLEM | {"image": "x.png", "split": "train"}}),
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
    "plain": 'image,caption\na.jpg,One.\na.jpg,"Two, three."\nb/c.png,Four.\n',
    "case and space": ' Image , CAPTION \n a.jpg , One.\na.jpg,"Two, three."\nb/c.png,Four.',
    "mark and dos": '\ufeffimage,caption\r\na.jpg,One.\r\na.jpg,"Two, three."\r\nb/c.png,Four.\r\n',
    "quoted header": '"image","caption"\n"a.jpg","One."\n"a.jpg","Two, three."\n"b/c.png","Four."\n',
    "blank lines": '\n\nimage,caption\n\na.jpg,One.\n  \na.jpg,"Two, three."\n,\nb/c.png,Four.\n\n\n',
    "open_clip": "filepath\ttitle\na.jpg\tOne.\na.jpg\tTwo, three.\nb/c.png\tFour.\n",
    "excel": "sep=;\nFile Name;Text\na.jpg;One.\na.jpg;Two, three.\nb/c.png;Four.\n",
    "flickr30k": (
        "image_name| comment_number| comment\na.jpg| 0| One.\na.jpg| 1| Two, three.\nb/c.png| 0| Four.\n"
    ),
    "other columns": 'id,caption,x,image\n1,One.,x,a.jpg\n2,"Two, three.",y,a.jpg\n3,Four.,x,b/c.png\n',
    "index column": ',image,caption\n0,a.jpg,One.\n1,a.jpg,"Two, three."\n2,b/c.png,Four.\n',
    "a space before quotes": ('image, caption\na.jpg, "One."\na.jpg, "Two, three."\nb/c.png, "Four."\n'),
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


@pytest.mark.parametrize(("other", "told"), [("test", True), ("train", False)])
def test_a_column_of_splits_is_told(tmp_path, capsys, other, told):
    assert len(csv(tmp_path, f"image,caption,Split\na.jpg,One.,train\nb.jpg,Two.,{other}\n")) == 2
    assert ("split (test (1), train (1)), which is not looked at" in capsys.readouterr().err) is told


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        *((line, "without a caption") for line in ("c.jpg,", "c.jpg,nan", "c.jpg,NULL", 'c.jpg,"\ufeff"')),
        *((line, "of damaged text") for line in ("c.jpg,a\x00b", "c.jpg,\x1b[1m")),
        *((line, "with an unreadable record") for line in ("c.jpg", "c.jpg,one, two")),
        *((line, "with an unusable name") for line in (",one", "../c.jpg,one", "/etc/c.jpg,one")),
    ],
)
def test_bad_lines_of_a_table(tmp_path, line, reason):
    content, bad = f"image,caption\na.jpg,One.\n{line}\nb.jpg,Two.\n", BadRows(skip=True)
    assert csv(tmp_path, content, bad) == {"a.jpg": ["One."], "b.jpg": ["Two."]}
    assert bad.counts == {reason: 1}
    with pytest.raises(UserError, match=r"table\.csv, line 3.*--skip-bad") as caught:
        csv(tmp_path, content)
    assert str(caught.value).isprintable()
