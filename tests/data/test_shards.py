"""A caption is read with its own picture, or refused, or left out, however a tar was put together."""

from __future__ import annotations

import io
import itertools
import json
import random
import tarfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_shards import write_shards

from dehvf_ds.config import UserError
from dehvf_ds.data.building.scan import find_key, scan_shard, write_shard
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.records import read_record
from dehvf_ds.data.shards import (
    BAD_NAME,
    BAD_RECORD,
    BAD_TEXT,
    IMAGE_MEMBERS,
    KEY_TWICE,
    NO_CAPTION,
    NO_PICTURE,
    SEVERAL_PICTURES,
    UNDECODABLE,
    DamagedSample,
    ShardRow,
    parse_members,
    picture_name,
)

NUM_ROWS = 6
TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}]
CHAT = json.dumps({"conversations": TURNS}).encode()


def caption(key: str) -> bytes:
    return json.dumps({"caption": f"Text of {key}."}).encode()


def picture(key: str) -> bytes:
    return f"picture of {key}".encode()


def sample(key: str, *, ending: str = "jpg", record: bytes | None = None) -> list[tuple[str, bytes]]:
    return [(f"{key}.{ending}", picture(key)), (f"{key}.json", caption(key) if record is None else record)]


def tar(path, *members, form: int = tarfile.GNU_FORMAT, encoding: str = "utf-8"):
    """Members as (name, bytes), (name, bytes, kind of tar member) or (name, link's target, kind)."""
    with tarfile.open(path, "w", format=form, encoding=encoding) as archive:
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


def check(path, good: str, bad: int, message: str = "") -> list[str]:
    """Good keys are read right; bad ones are refused in one line, and left out on demand; their reasons."""
    table = scan_shard(path, skip_bad=True)
    assert found_in(path, table) == {key: picture(key) for key in good}
    assert len(table.bad) == bad, table.bad
    assert table.num_pictures == len(table.rows)
    if not bad:
        assert scan_shard(path).rows.tolist() == table.rows.tolist()
        return []
    with pytest.raises(UserError, match=message) as caught:
        scan_shard(path)
    assert str(path) in str(caught.value)
    assert "--skip-bad" in str(caught.value)
    assert str(caught.value).isprintable()
    return [left_out.reason for left_out in table.bad]


def test_every_kind_of_picture_is_read(tmp_path):
    keys = [chr(ord("a") + number) for number in range(len(IMAGE_MEMBERS) + 4)]
    endings = (*IMAGE_MEMBERS, "JPG", "Png", "input.jpg", "0.PNG")
    members = [sample(key, ending=ending) for key, ending in zip(keys, endings, strict=True)]
    check(tar(tmp_path / "a.tar", *itertools.chain(*members)), "".join(keys), 0)


def named(names: str) -> list[tuple[str, bytes]]:
    """Members of b: captions under .json, and pictures."""
    return [(name, caption("b") if name.endswith("json") else picture("b")) for name in names.split(" ")]


TEXT = ("b.json", caption("b"))
BAD = [
    (named("b.001.jpg b.002.json"), r"holds \.001\.jpg beside \.002\.json, which are of two", BAD_NAME),
    ([("b.heic", b"?"), ("b.json", CHAT)], r"\.heic is not a supported picture format", NO_PICTURE),
    (
        [("b.jpg", "a.jpg", tarfile.LNKTYPE), TEXT],
        "its .jpg is a link to 'a.jpg', .* --dereference",
        NO_PICTURE,
    ),
    ([("b.jpg", "a.jpg", tarfile.FIFOTYPE), TEXT], "its .jpg is a device or pipe", NO_PICTURE),
    (named("b.jpg b.mask.png b.json"), "holds 2 pictures", SEVERAL_PICTURES),
    (named("b.jpg b.jpg b.json"), "holds two members .jpg; keep one", BAD_RECORD),
    (named("b.jpg"), r"lacks its \.json or \.txt", NO_CAPTION),
    (named("b.jpg b.0.txt b.1.txt"), r"holds 2 members \.txt \(\.0\.txt, \.1\.txt\)", BAD_RECORD),
    (sample("b", record=b"[]"), "not an object", BAD_RECORD),
    ([("b.jpg", b"j"), ("b.txt", b"\xff")], "its text is not usable: not UTF-8 at byte 0", BAD_TEXT),
    (sample("b", record=b'{"url": "x"}'), "has no caption, nor conversations", NO_CAPTION),
    ([("b.jpg", b""), TEXT], "a picture of 0 bytes", UNDECODABLE),
    ([*sample("y"), *sample("a")], "key 'a' is given to two samples", KEY_TWICE),
    (named("../b.json"), "not KEY.EXTENSION inside the archive", BAD_NAME),
    (named("b"), "not KEY.EXTENSION inside the archive", BAD_NAME),
    (named("b\n.json"), "its name is not UTF-8, or has control characters; rename it", BAD_NAME),
]


@pytest.mark.parametrize(("members", "message", "reason"), BAD, ids=range(len(BAD)))
def test_bad_samples_are_named_or_left_out(tmp_path, members, message, reason):
    path = tar(tmp_path / "a.tar", *sample("a"), *members, *sample("z"))
    assert check(path, "ayz" if reason == KEY_TWICE else "az", 1, message) == [reason]


def test_what_other_programs_leave_beside_files_is_no_sample(tmp_path):
    own = [*sample("a"), *sample("b", ending="png")]
    names = ["._a.jpg", "._a.json", ".DS_Store", "__MACOSX/._a.jpg", "__MACOSX/a.json", "Thumbs.db"]
    names += ["x/.hidden.jpg", "PaxHeader/a.jpg", "PaxHeaders.12/a.json", "./PaxHeaders/b.txt"]
    others = [(name, b"junk") for name in (*names, "desktop.ini", "__meta__/x.json")]
    for place in range(len(own) + 1):
        folder = ("folder.jpg", "", tarfile.DIRTYPE)
        check(tar(tmp_path / "a.tar", *own[:place], *others, folder, *own[place:]), "ab", 0)


@pytest.mark.parametrize("folders", [("", ""), ("i/", "t/")], ids=["beside", "in folders"])
def test_no_chat_is_text_only_because_its_picture_lies_elsewhere(tmp_path, folders):
    """Records of chats do not mention a picture; that another member has their key reveals one."""
    pictures = [(f"{folders[0]}{key}.jpg", picture(key)) for key in "abc"]
    path = tar(tmp_path / "a.tar", *pictures, *((f"{folders[1]}{key}.json", CHAT) for key in "abc"))
    table = scan_shard(path, skip_bad=True)
    # In folders the keys differ, so only the pictures are reported.
    assert (len(table.rows), len(table.bad)) == ((3, 3) if folders[0] else (0, 6))
    with pytest.raises(UserError, match=r"side by side|without a picture"):
        scan_shard(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_order_of_members_gives_another_picture(tmp_path, data):
    """Any order, with members missing or doubled: a caption has its own picture, or is left out."""
    whole = [member for key in "abc" for member in sample(key)]
    members = data.draw(st.lists(st.sampled_from(whole), max_size=8))
    path = tar(tmp_path / "a.tar", *members)
    found = found_in(path, scan_shard(path, skip_bad=True))
    assert found == {key: picture(key) for key in found}
    neighbours = {a[0][0] for a, b in itertools.pairwise(members) if a[0][0] == b[0][0] and a[0] != b[0]}
    assert set(found) <= neighbours
    if members == whole[: len(members)] and len(members) % 2 == 0:
        assert set(found) == neighbours


@pytest.mark.parametrize("padding", [10240, 512, 5 * 1024 * 1024])
def test_tars_joined_by_cat_are_read_to_the_end(tmp_path, padding):
    parts = []
    for key in "abc":
        part = tar(tmp_path / f"{key}.tar", *sample(key)).read_bytes().rstrip(b"\0")
        parts.append(part + bytes(-len(part) % 512 + padding))
    path = tmp_path / "joined.tar"
    path.write_bytes(b"".join(parts))
    check(path, "abc", 0)
    # The sample that follows an archive's end is none of the one before it.
    split = [tar(tmp_path / "x.tar", member) for member in sample("d")]
    path.write_bytes(b"".join([*parts, *(part.read_bytes() for part in split)]))
    check(path, "abc", 2, r"lacks its \.json|without a picture")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data + b"\0" * 700 + b"x" * 3000, ""),
        (lambda data: data.rstrip(b"\0").ljust(6 * 2048, b"\0"), "its end is missing"),
        (lambda data: data[:1000], ""),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer: git lfs pull"),
        (lambda data: b"\n<!DOCTYPE html><html>" + b"x" * 600, "a web page"),
    ],
)
def test_no_whole_tar(tmp_path, damage, message):
    path = tar(tmp_path / "a.tar", *(member for key in "abcdef" for member in sample(key)))
    path.write_bytes(damage(path.read_bytes()))
    for skip_bad in (False, True):
        with pytest.raises(UserError, match=rf"a\.tar: not a whole, uncompressed tar: .*{message}"):
            scan_shard(path, skip_bad=skip_bad)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_folders_and_other_encodings(tmp_path, form):
    long = "x" * (180 if form != tarfile.USTAR_FORMAT else 80)
    deep = [("v1.0/x y/1.JPG", picture("v1.0/x y/1")), ("./v1.0/x y/1.JSON", caption("v1.0/x y/1"))]
    path = tar(tmp_path / "a.tar", *deep, *sample(long), ("naïve.json", CHAT), form=form, encoding="latin-1")
    table = scan_shard(path, skip_bad=True)
    # A name that is not UTF-8 is refused; pax writes it as UTF-8 in any case.
    assert len(table.bad) == (form != tarfile.PAX_FORMAT)
    keys = [
        parse_members(path.read_bytes()[o : o + size], "")["__key__"] for o, size, _, _ in table.rows.tolist()
    ]
    assert keys[:2] == ["v1.0/x y/1", long]


def row(number: int) -> ShardRow:
    record = {"captions": [f"Caption {number} {'x' * number}.", "Zwei é."]}
    jpg = random.Random(number).randbytes(700 + 400 * number)
    return ShardRow(key=f"row{number}", members={"json": json.dumps(record).encode(), "jpg": jpg})


def test_what_is_written_is_scanned(tmp_path):
    path = tmp_path / "a.tar"
    problem = {"question": "Why?", "choices": ["a", "bc"], "answer": 1, "hint": "x", "grade": "grade2"}
    records = {"p": problem | {"subject": "social science"}, "c": {"conversations": TURNS}}
    rows = [row(0), row(1)]
    rows += [ShardRow(key=key, members={"json": json.dumps(r).encode()}) for key, r in records.items()]
    # It has its name only when it is whole.
    table = write_shard((each for each in rows if not path.exists()), path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar"]
    assert table.rows[:, 2].tolist() == [2, 2, 0, 0]
    assert (table.num_pictures, table.tasks) == (2, {"caption": 2, "scienceqa": 1, "chat": 1})
    assert table.text_lengths.tolist() == [11, 7, 12, 7, 8, 11]
    assert table.num_bytes == path.stat().st_size
    assert [find_key(path, int(value)) for value in table.key_hashes] == ["row0", "row1", "p", "c"]
    offset, size = table.rows[1, :2].tolist()
    assert parse_members(path.read_bytes()[offset : offset + size], "")["jpg"] == row(1).members["jpg"]
    assert write_shard(rows, tmp_path / "b.tar").sha256 == table.sha256


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "a b", "a\n"])
def test_keys_that_do_not_fit(tmp_path, key):
    with pytest.raises(UserError, match="empty, or has a dot, slash or space"):
        write_shard([ShardRow(key=key, members={"json": b"{}"})], tmp_path / "a.tar")
    assert not list(tmp_path.iterdir())


def mutate(data: bytes, draw: random.Random) -> bytes:
    """Flipped bits, a cut, blocks inserted, removed or overwritten, or a changed header."""
    content, block = bytearray(data), tarfile.BLOCKSIZE
    places = range(len(data) // block)
    at, other = (draw.choice(places) * block for _ in range(2))
    kind = draw.randrange(6)
    if kind == 0:
        for _ in range(draw.choice((1, 1, 4))):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del content[draw.choice((at, draw.randrange(len(content)))) :]
    elif kind == 2:
        content[at:at] = data[other : other + draw.randint(1, 6) * block]
    elif kind == 3:
        del content[at : at + draw.randint(1, 6) * block]
    elif kind == 4:
        content[at : at + block] = draw.choice((bytes(block), draw.randbytes(block), data[other:][:block]))
    else:
        # A header with a right checksum but another name, size or kind.
        at = draw.choice([o * block for o in places if data[o * block + 257 : o * block + 262] == b"ustar"])
        header = content[at : at + block]
        start, stop = draw.choice([(3, 4), (4, 6), (128, 135), (156, 157), (345, 350)])
        value = draw.choice([b"0", b"9", b"7777", b"../", b"L", b"x", b"S", b"-1", b"\xff", b"row3.jpg"])
        header[start:stop] = value[: stop - start].ljust(stop - start, b"0")
        header[148:156] = b" " * 8
        header[148:156] = f"{sum(header):06o}\0 ".encode()
        content[at : at + block] = header
    return bytes(content)


def test_damage_gives_the_right_sample_or_one_error(tmp_path):
    """No change of shard or index gives a traceback, or another sample's picture."""
    rows = [row(i) for i in range(NUM_ROWS)]
    write_shards(rows, tmp_path, name="a", samples_per_shard=NUM_ROWS, builder={})
    path = tmp_path / "a-000000.tar"
    whole, table = path.read_bytes(), np.load(tmp_path / "index.npy")
    messages: list[str] = []
    read_right, num_tries = 0, 300
    for seed in range(num_tries):
        draw, changed = random.Random(seed), table.copy()
        if is_shard := seed % 5 != 0:
            path.write_bytes(mutate(whole, draw))
        else:
            # Offset, size, captions or checksum.
            changed[draw.randrange(NUM_ROWS), draw.randrange(4)] ^= 1 << draw.randrange(61)
            path.write_bytes(whole)
        np.save(tmp_path / "index.npy", changed)
        index = ShardIndex(tmp_path)
        for number in range(NUM_ROWS):
            try:
                members = index.read(number)
            except DamagedSample as error:
                messages.append(str(error))
            else:
                read_right += 1
                assert members["__key__"] == f"row{number}", seed
                assert {name: members[name] for name in ("jpg", "json")} == rows[number].members, seed
        index.close()
        for skip_bad in (False, True) if is_shard else ():
            try:
                scanned = scan_shard(path, skip_bad=skip_bad)
            except UserError as error:
                messages.append(str(error))
                continue
            for offset, size, _, _ in scanned.rows.tolist():
                assert set(parse_members(path.read_bytes()[offset : offset + size], "")) > {"__key__"}, seed
    assert read_right > num_tries
    assert len(messages) > num_tries
    assert all(str(path) in m or f"{tmp_path}: {path.name}: sample " in m for m in messages)
    assert all("\n" not in message for message in messages)
