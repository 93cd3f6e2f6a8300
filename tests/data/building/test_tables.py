from __future__ import annotations

import json

import pytest

from dehvf_ds.config import UserError
from dehvf_ds.data.building.left_out import BadRows
from dehvf_ds.data.building.tables import read_csv


@pytest.fixture
def read(tmp_path):
    """Pictures and captions of a table of this content."""

    def call(content, *, skip=False, notes=None):
        path = tmp_path / "table.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        bad = BadRows(skip=skip)
        rows = read_csv(path, tmp_path / "images", note=[].append if notes is None else notes.append, bad=bad)
        assert all(row.image == tmp_path / "images" / row.record["file_name"] for row in rows)
        return {row.record["file_name"]: row.record["captions"] for row in rows}, bad.counts

    return call


EXPECTED = {"a.jpg": ["One.", "Two, three."], "b/c.png": ["Four."]}
TABLES = {
    "plain": 'image,caption\na.jpg,One.\na.jpg,"Two, three."\nb/c.png,Four.\n',
    "case and space": ' Image , CAPTION \n a.jpg , One.\na.jpg,"Two, three."\nb/c.png,Four.',
    "mark": '\ufeffimage,caption\na.jpg,One.\na.jpg,"Two, three."\nb/c.png,Four.\n',
    "dos": 'image,caption\r\na.jpg,One.\r\na.jpg,"Two, three."\r\nb/c.png,Four.\r\n',
    "quoted header": '"image","caption"\n"a.jpg","One."\n"a.jpg","Two, three."\n"b/c.png","Four."\n',
    "blank lines": '\n\nimage,caption\n\na.jpg,One.\n  \na.jpg,"Two, three."\n,\nb/c.png,Four.\n\n\n',
    "tabs": "image\tcaption\na.jpg\tOne.\na.jpg\tTwo, three.\nb/c.png\tFour.\n",
    "open_clip": "filepath\ttitle\na.jpg\tOne.\na.jpg\tTwo, three.\nb/c.png\tFour.\n",
    "semicolons": "File Name;Text\na.jpg;One.\na.jpg;Two, three.\nb/c.png;Four.\n",
    "flickr30k": (
        "image_name| comment_number| comment\na.jpg| 0| One.\na.jpg| 1| Two, three.\nb/c.png| 0| Four.\n"
    ),
    "other columns": 'id,caption,split,image\n1,One.,x,a.jpg\n2,"Two, three.",y,a.jpg\n3,Four.,x,b/c.png\n',
    "index column": ',image,caption\n0,a.jpg,One.\n1,a.jpg,"Two, three."\n2,b/c.png,Four.\n',
    "a space before quotes": ('image, caption\na.jpg, "One."\na.jpg, "Two, three."\nb/c.png, "Four."\n'),
    "excel": "sep=;\nimage;caption\na.jpg;One.\na.jpg;Two, three.\nb/c.png;Four.\n",
    "separators at the end": 'image,caption\na.jpg,One.,\na.jpg,"Two, three.",,\nb/c.png,Four.\n',
    "bars, all quoted": '"image"|"caption"\n"a.jpg"|"One."\n"a.jpg"|"Two, three."\n"b/c.png"|"Four."\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_many_programs(read, name):
    assert read(TABLES[name]) == (EXPECTED, {})


def test_quotes_and_line_breaks(read):
    content = 'image,caption\na.jpg,"A ""dog""\nin two lines"\nb/c.png,Four.\n'
    assert read(content)[0]["a.jpg"] == ['A "dog"\nin two lines']
    # Flickr30k quotes nothing: a quote is a character.
    content = 'image_name| comment_number| comment\na.jpg| 0| " A sign "\na.jpg|1|"Open.\n'
    assert read(content)[0]["a.jpg"] == ['" A sign "', '"Open.']


def test_bars_and_doubled_quotes(read):
    assert read('image|caption\na.jpg|"A ""dog"" runs."\n')[0] == {"a.jpg": ['A "dog" runs.']}


@pytest.mark.parametrize(("other", "told"), [("test", ["test (1), train (1)"]), ("train", [])])
def test_a_column_of_splits_is_told(read, other, told):
    notes = []
    found, _ = read(f"image,caption,Split\na.jpg,One.,train\nb.jpg,Two.,{other}\n", notes=notes)
    assert len(found) == 2
    assert len(notes) == len(told)
    assert all(part in note for part, note in zip(told, notes, strict=True))


@pytest.mark.parametrize(
    ("header", "name"), [("image,caption,caption", "caption"), ("image\tcaption\tImage", "image")]
)
def test_two_columns_of_one_name(read, header, name):
    with pytest.raises(UserError, match=f"its header names {name} twice"):
        read(f"{header}\na.jpg,x,y\n")


@pytest.mark.parametrize(
    ("start", "kind"), [(b"PK\x03\x04", "spreadsheet"), (b"PAR1", "parquet"), (b"\x1f\x8b", "gzip")]
)
def test_other_kinds_of_files_are_named(read, start, kind):
    with pytest.raises(UserError, match=kind):
        read(start + bytes(range(256)))


@pytest.mark.parametrize(
    "header", ["picture_id,label", "a.jpg,One.", "image", "caption;text", "a.jpg#0\tOne."]
)
def test_the_header_that_was_found_is_named(read, header):
    with pytest.raises(UserError, match="its first line is ") as caught:
        read(f"{header}\nx,y\n")
    assert repr(header) in str(caught.value)
    assert "image,caption" in str(caught.value)


ROWS = {
    "without a caption": ["c.jpg,", "c.jpg, ", "c.jpg,nan", "c.jpg,NULL", 'c.jpg,"\ufeff"'],
    "of damaged text": ["c.jpg,a\x00b", "c.jpg,\x1b[1m"],
    "with an unreadable record": ["c.jpg", "c.jpg,one, two"],
    "with an unusable name": [",one", "../c.jpg,one", "/etc/c.jpg,one"],
}


@pytest.mark.parametrize(
    ("reason", "line"), [(reason, line) for reason, lines in ROWS.items() for line in lines]
)
def test_bad_lines(read, tmp_path, reason, line):
    content = f"image,caption\na.jpg,One.\n{line}\nb.jpg,Two.\n"
    assert read(content, skip=True) == ({"a.jpg": ["One."], "b.jpg": ["Two."]}, {reason: 1})
    with pytest.raises(UserError, match=r"table\.csv, line 3.*--skip-bad") as caught:
        read(content)
    assert str(caught.value).isprintable()


def test_empty_captions_beside_others(read):
    notes = []
    assert read("image,caption\na.jpg,One.\na.jpg,\na.jpg,nan\n", notes=notes)[0] == {"a.jpg": ["One."]}
    assert notes == ["2 times: empty caption beside others left out"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-32"])
def test_other_encodings_are_one_line(read, encoding):
    with pytest.raises(UserError, match=r"table\.csv: not UTF-8 at byte \d+.*iconv -f") as caught:
        read("image,caption\na.jpg,Ein Bär.\n".encode(encoding))
    assert str(caught.value).isprintable()


def test_absolute_names_inside_the_pictures(read, tmp_path):
    name = str(tmp_path / "images" / "a.jpg")
    assert json.dumps(read(f"filepath\ttitle\n{name}\tOne.\n")[0]) == json.dumps({name: ["One."]})
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "images")
    table = tmp_path / "table.csv"
    for images in (tmp_path / "link", tmp_path / "x" / ".." / "images"):
        assert len(read_csv(table, images, note=print)) == 1
