"""A caption is read with its own picture, or refused, or left out: whatever way a tar was put together."""

from __future__ import annotations

import io
import itertools
import json
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dehvf_ds.config import UserError
from dehvf_ds.data.building.scan import scan_shard
from dehvf_ds.data.records import read_record
from dehvf_ds.data.shards import (
    IMAGE_MEMBERS,
    DamagedSample,
    parse_members,
    picture_name,
    split_name,
)


def caption(key: str) -> bytes:
    return json.dumps({"caption": f"Text of {key}."}).encode()


def picture(key: str) -> bytes:
    return f"picture of {key}".encode()


def tar(path, *members, mode="w"):
    """Members as (name, bytes), (name, bytes, kind of tar member) or (name, link's target, kind)."""
    with tarfile.open(path, mode) as archive:
        for name, content, *kind in members:
            info = tarfile.TarInfo(name)
            info.type = kind[0] if kind else tarfile.REGTYPE
            if isinstance(content, str):
                info.linkname = content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def found_in(path, table) -> dict[str, bytes]:
    """The picture of each caption; every row is a caption of its own key."""
    data, pictures = path.read_bytes(), {}
    for offset, size, _, _ in table.rows.tolist():
        members = parse_members(data[offset : offset + size], "here")
        key, name = members["__key__"], picture_name(members)
        assert read_record(members).record["captions"] == [f"Text of {key}."]
        assert name is not None
        pictures[key] = members[name]
    return pictures


def check(path, good: str, bad: int, message: str = "") -> None:
    """Good keys are read right; bad ones are refused in one line, and left out on demand."""
    table = scan_shard(path, skip_bad=True)
    assert found_in(path, table) == {key: picture(key) for key in good}
    assert len(table.bad) == bad, table.bad
    assert table.num_pictures == len(table.rows)
    if not bad:
        assert found_in(path, scan_shard(path)) == {key: picture(key) for key in good}
        return
    with pytest.raises(UserError, match=message) as caught:
        scan_shard(path)
    assert str(path) in str(caught.value)
    assert "--skip-bad" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", [*IMAGE_MEMBERS, "JPG", "Png", "input.jpg", "0.PNG"])
def test_every_kind_of_picture_is_read(tmp_path, ending):
    members = [(f"{key}.{ending}", picture(key)) for key in "ab"]
    texts = [(f"{key}.json", caption(key)) for key in "ab"]
    check(tar(tmp_path / "a.tar", *itertools.chain(*zip(members, texts, strict=True))), "ab", 0)


def test_a_picture_and_a_text_of_other_numbers_are_no_sample(tmp_path):
    one = [("b.001.jpg", picture("b")), ("b.002.json", caption("b"))]
    path = tar(tmp_path / "a.tar", ("a.7.jpg", picture("a")), ("a.7.json", caption("a")), *one)
    check(path, "a", 1, r"sample b: holds \.001\.jpg beside \.002\.json, which are of two samples")


@pytest.mark.parametrize("ending", ["heic", "svg", "jxl", "psd", "pdf", "xyz", "npy"])
def test_other_kinds_are_refused(tmp_path, ending):
    path = tar(
        tmp_path / "a.tar",
        ("a.jpg", picture("a")),
        ("a.json", caption("a")),
        (f"b.{ending}", b"?"),
        ("b.json", caption("b")),
    )
    check(path, "a", 1, rf"sample b: (\.{ending} is no kind of picture|a caption without a picture)")


LEFT_BEHIND = [
    "._a.jpg",
    "._a.json",
    ".DS_Store",
    "__MACOSX/._a.jpg",
    "__MACOSX/a.json",
    "Thumbs.db",
    "x/.hidden.jpg",
]
LEFT_BEHIND += [
    "PaxHeader/a.jpg",
    "PaxHeaders.12/a.json",
    "./PaxHeaders/b.txt",
    "desktop.ini",
    "__meta__/x.json",
]


def test_what_other_programs_leave_beside_files_is_no_sample(tmp_path):
    own = [
        ("./a.jpg", picture("a")),
        ("./a.json", caption("a")),
        ("b.png", picture("b")),
        ("b.json", caption("b")),
    ]
    for place in range(len(own) + 1):
        others = [(name, b"junk") for name in LEFT_BEHIND] + [("folder.jpg", "", tarfile.DIRTYPE)]
        check(tar(tmp_path / "a.tar", *own[:place], *others, *own[place:]), "ab", 0)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
@pytest.mark.parametrize("order", [0, 1])
def test_links_are_no_pictures(tmp_path, kind, order):
    linked = [("b.jpg", "a.jpg", kind), ("b.json", caption("b"))][:: 1 - 2 * order]
    path = tar(tmp_path / "a.tar", ("a.jpg", picture("a")), ("a.json", caption("a")), *linked)
    check(
        path, "a", 1, "sample b: its .jpg is a (link to 'a.jpg'|device or pipe), not a file; .* --dereference"
    )


@pytest.mark.parametrize(
    "names", [("b.jpg", "b.png"), ("b.jpg", "b.mask.png"), ("b.0.jpg", "b.1.jpg"), ("b.jpg", "b.jpg")]
)
def test_several_pictures(tmp_path, names):
    members = [("a.jpg", picture("a")), ("a.json", caption("a")), *((name, b"?") for name in names)]
    check(
        tar(tmp_path / "a.tar", *members, ("b.json", caption("b"))), "a", 1, "holds (2 pictures|two members)"
    )


@pytest.mark.parametrize("order", ["pictures first", "texts first", "two folders"])
def test_members_that_do_not_stand_side_by_side(tmp_path, order):
    pictures = [(f"{key}.jpg", picture(key)) for key in "abc"]
    texts = [(f"{key}.json", caption(key)) for key in "abc"]
    if order == "two folders":
        pictures, texts = (
            [(f"{folder}/{name}", data) for name, data in m] for folder, m in (("i", pictures), ("t", texts))
        )
    members = [*texts, *pictures] if order == "texts first" else [*pictures, *texts]
    # Where the last picture and the first text are neighbours of one key, that sample is whole.
    good = {"pictures first": "", "texts first": "", "two folders": ""}[order]
    check(tar(tmp_path / "a.tar", *members), good, 6, r"side by side|without a picture")


@pytest.mark.parametrize("order", ["pictures first", "texts first"])
def test_chats_whose_pictures_stand_elsewhere_are_not_text_only(tmp_path, order):
    """Their records do not speak of a picture; that another member has their key tells that there is one."""
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}]
    pictures = [(f"{key}.jpg", picture(key)) for key in "abc"]
    texts = [(f"{key}.json", json.dumps({"conversations": turns}).encode()) for key in "abc"]
    alone = ("d.json", texts[0][1])
    members = [*texts, alone, *pictures] if order == "texts first" else [*pictures, alone, *texts]
    path = tar(tmp_path / "a.tar", *members)
    table = scan_shard(path, skip_bad=True)
    assert (len(table.rows), table.num_pictures, len(table.bad)) == (1, 0, 6)
    with pytest.raises(UserError, match="side by side"):
        scan_shard(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_order_of_members_gives_another_picture(tmp_path, data):
    """Any order, with members missing or doubled: a caption has its own picture, or is left out."""
    whole = [
        (f"{key}.{end}", picture(key) if end == "jpg" else caption(key))
        for key in "abc"
        for end in ("jpg", "json")
    ]
    members = data.draw(st.lists(st.sampled_from(whole), max_size=8))
    path = tar(tmp_path / "a.tar", *members)
    found = found_in(path, scan_shard(path, skip_bad=True))
    assert found == {key: picture(key) for key in found}
    neighbours = {a[0][0] for a, b in itertools.pairwise(members) if a[0][0] == b[0][0] and a[0] != b[0]}
    assert set(found) <= neighbours
    if [name for name, _ in members] == [name for name, _ in whole[: len(members)]] and len(members) % 2 == 0:
        assert set(found) == neighbours


@pytest.mark.parametrize("padding", [10240, 1024, 512, 5 * 1024 * 1024])
def test_tars_joined_by_cat_are_read_to_the_end(tmp_path, padding):
    parts = []
    for key in "abc":
        part = tar(tmp_path / f"{key}.tar", (f"{key}.jpg", picture(key)), (f"{key}.json", caption(key)))
        parts.append(part.read_bytes().rstrip(b"\0"))
        parts[-1] += bytes(-len(parts[-1]) % 512 + padding)
    path = tmp_path / "joined.tar"
    path.write_bytes(b"".join(parts))
    check(path, "abc", 0)
    # The sample that follows an archive's end is none of the one before it.
    split = [
        tar(tmp_path / "x.tar", ("d.jpg", picture("d"))),
        tar(tmp_path / "y.tar", ("d.json", caption("d"))),
    ]
    path.write_bytes(b"".join([*parts, *(part.read_bytes() for part in split)]))
    check(path, "abc", 2, r"lacks its \.json|without a picture")


@pytest.mark.parametrize("tail", [b"junk" * 200, b"\0" * 700 + b"x" * 3000, b"<html>" + bytes(600)])
def test_other_bytes_after_the_end_are_no_whole_tar(tmp_path, tail):
    path = tar(tmp_path / "a.tar", ("a.jpg", picture("a")), ("a.json", caption("a")))
    path.write_bytes(path.read_bytes() + tail)
    for skip_bad in (False, True):
        with pytest.raises(UserError, match="not a whole, uncompressed tar"):
            scan_shard(path, skip_bad=skip_bad)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer: git lfs pull"),
        (b"\n<!DOCTYPE html><html>" + b"x" * 600, "a web page"),
        (b"\x1f\x8b" + bytes(600), "packed by gzip: unpack it"),
        (b"", "copy it again"),
    ],
)
def test_what_else_lies_under_a_shards_name_is_told(tmp_path, data, told):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(UserError, match=f"not a whole, uncompressed tar: .*; .*{told}"):
        scan_shard(tmp_path / "a.tar")


@pytest.mark.parametrize("name", ["a\udcffb.json", "a\nb.json", "x/\x07.jpg"])
def test_names_that_nothing_can_be_called_by(name):
    with pytest.raises(DamagedSample, match="rename it") as caught:
        split_name(name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.jpg", ("a", "jpg")),
        ("v1.0/x y/ü é.JPG", ("v1.0/x y/ü é", "jpg")),
        ("s0.input.Jpg", ("s0", "input.jpg")),
        ("./a/b.json", ("a/b", "json")),
        ("a/.b.json", None),
        ("a/._b.jpg", None),
    ],
)
def test_names(name, parts):
    assert split_name(name) == parts
