from __future__ import annotations

import io
import json
import random
import shutil
import tarfile

import numpy as np
import pytest
from tiny_shards import write_shards

from dehvf_ds.atomic import part_of as temporary_name
from dehvf_ds.config import UserError
from dehvf_ds.data.building.scan import find_key, hash_keys, scan_shard, write_index, write_shard
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.records import parse_record, text_lengths
from dehvf_ds.data.shards import (
    DamagedSample,
    ShardRow,
    parse_members,
)

NUM_ROWS = 6
NUM_MUTATIONS = 240


def row(number: int, *, size: int = 700, **record) -> ShardRow:
    texts = [f"Caption {number} {'x' * number}.", "Zwei é."]
    members = {"json": json.dumps({"image_id": number, "captions": texts, **record}).encode()}
    if size:
        members["jpg"] = random.Random(number).randbytes(size + 400 * number)
    return ShardRow(key=f"row{number}", members=members)


def write_tar(path, *members, form=tarfile.USTAR_FORMAT):
    """Members as (name, bytes), as another program would write them."""
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_what_is_written_is_scanned(tmp_path):
    path = tmp_path / "a.tar"
    problem = {"question": "Why?", "choices": ["a", "bc"], "answer": 1, "hint": "", "grade": "grade2"}
    problem |= {"subject": "social science"}
    table = write_shard([row(0), row(1), row(2, size=0, captions=[], image_id=None, **problem)], path)
    assert table.rows[:, 2].tolist() == [2, 2, 0]
    assert (table.num_pictures, table.tasks) == (2, {"caption": 2, "scienceqa": 1})
    assert table.text_lengths.tolist() == [11, 7, 12, 7, 7]
    assert table.num_bytes == path.stat().st_size
    assert [find_key(path, int(value)) for value in table.key_hashes] == ["row0", "row1", "row2"]
    assert table.key_hashes.tolist() == hash_keys(["row0", "row1", "row2"]).tolist()
    offset, size = table.rows[1, :2].tolist()
    members = parse_members(path.read_bytes()[offset : offset + size], "here")
    assert members["jpg"] == row(1).members["jpg"]
    again = scan_shard(path)
    assert (again.sha256, again.rows.tolist()) == (table.sha256, table.rows.tolist())


def test_same_rows_same_bytes(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_shard([row(0), row(1)], tmp_path / name)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_a_shard_has_its_name_only_when_it_is_whole(tmp_path):
    path = tmp_path / "a.tar"

    def rows():
        yield row(0)
        assert not path.exists()
        assert temporary_name(path).exists()
        yield row(1)

    write_shard(rows(), path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "a b", "../a", "/a", "a\n"])
def test_keys_that_do_not_fit(tmp_path, key):
    with pytest.raises(UserError, match="empty, or has a dot, slash or space"):
        write_shard([ShardRow(key=key, members={"json": b"{}"})], tmp_path / "a.tar")
    assert not (tmp_path / "a.tar").exists()


GOOD = b'{"captions": ["One."]}'


def sample(key, record=GOOD):
    return [(f"{key}.jpg", b"j"), (f"{key}.json", record)]


BAD_SAMPLES = {
    "no text": ([("b.jpg", b"j")], "lacks its .json"),
    "not JSON": (sample("b", b"{"), "its text is not usable"),
    "a list": (sample("b", b"[]"), "not an object"),
    "not UTF-8": (sample("b", b'{"a": "\xff"}'), "its text is not usable"),
    "txt not UTF-8": ([("b.jpg", b"j"), ("b.txt", b"\xff")], "its text is not usable: not UTF-8 at byte 0"),
    "txt of UTF-16": ([("b.jpg", b"j"), ("b.txt", "a dog".encode("utf-16"))], "it looks like UTF-16"),
    "empty caption": ([("b.jpg", b"j"), ("b.txt", b"  ")], "has an empty caption"),
    "number as caption": (sample("b", b'{"captions": [3]}'), "has an empty caption, or one that is no text"),
    "captions a text": (sample("b", b'{"captions": "One."}'), "captions is str, not a list"),
    "nothing to learn": (sample("b", b'{"url": "x"}'), "has no caption, nor conversations"),
    "key twice": ([*sample("b"), *sample("c"), *sample("b")], "key 'b' is given to two samples"),
    "member twice": ([*sample("b"), ("b.json", GOOD)], "holds two members .json"),
    "a name that leaves": ([("../b.json", GOOD)], "inside the archive"),
    "no ending": ([("b", GOOD)], "inside the archive"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_bad_samples_are_named_or_left_out(tmp_path, name):
    members, message = BAD_SAMPLES[name]
    path = write_tar(tmp_path / "a.tar", *sample("a"), *members, *sample("z"))
    with pytest.raises(UserError, match=message) as caught:
        scan_shard(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    table = scan_shard(path, skip_bad=True)
    assert len(table.bad) == 1
    assert message in table.bad[0].line
    keys = [find_key(path, int(value)) for value in table.key_hashes]
    assert (keys[0], keys[-1]) == ("a", "z")


def test_damage_is_called_by_the_shown_name(tmp_path):
    path = write_tar(tmp_path / "a.tar", ("a.json", b"{"))
    with pytest.raises(UserError, match=r"shown\.tar: sample a: its text"):
        scan_shard(path, shown_as=tmp_path / "shown.tar")


@pytest.mark.parametrize("name", ["../a.json", "/a.json", "x/../../a.json", "no_extension"])
def test_members_that_leave_the_archive(tmp_path, name):
    path = write_tar(tmp_path / "a.tar", (name, GOOD))
    with pytest.raises(UserError, match="inside the archive"):
        scan_shard(path)
    assert [bad.reason for bad in scan_shard(path, skip_bad=True).bad] == ["with an unusable name"]


def test_img2dataset_and_long_names(tmp_path):
    members = [
        ("000000000.jpg", b"j"),
        ("000000000.json", b'{"caption": "From json.", "key": "000000000", "width": 3}'),
        ("000000000.txt", b"From txt."),
        ("deep/er/000000001.JPG", b"j"),
        ("deep/er/000000001.JSON", b'{"caption": "Alone."}'),
        ("x" * 180 + ".gif", b"g"),
        ("x" * 180 + ".txt", "Länge".encode()),
    ]
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        if form == tarfile.USTAR_FORMAT:
            path = write_tar(tmp_path / "a.tar", *members[:5], form=form)
        else:
            path = write_tar(tmp_path / "a.tar", *members, form=form)
        table = scan_shard(path)
        assert table.text_lengths.tolist()[:2] == [9, 6]
        data = path.read_bytes()
        offset, size = table.rows[-1, :2].tolist()
        assert set(parse_members(data[offset : offset + size], "")) >= {"__key__"}
        assert parse_record(parse_members(data[: table.rows[0, 1]], ""))["captions"] == ["From txt."]


def test_text_lengths():
    assert text_lengths({"captions": ["abc", "d"]}) == (2, (3, 1))
    assert text_lengths({"question": "ab", "hint": "c", "choices": ["d", "ef"]}) == (0, (6,))
    assert text_lengths(
        {"conversations": [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "c"}]}
    ) == (
        0,
        (3,),
    )
    assert text_lengths({}) == (0, (0,))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[: data.rindex(b"ustar") - 257],
        lambda data: data[:1000],
        lambda data: b"",
        lambda data: b"no tar" * 999,
    ],
)
def test_no_whole_tar(tmp_path, damage):
    path = tmp_path / "a.tar"
    write_shard([row(i) for i in range(NUM_ROWS)], path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"a\.tar"):
        scan_shard(path)
    with pytest.raises(UserError, match="not a whole, uncompressed tar"):
        scan_shard(path, skip_bad=True)


def test_a_compressed_tar_is_refused(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.json"))
    with pytest.raises(UserError, match=r"not a whole, uncompressed tar.*packed by gzip: unpack it"):
        scan_shard(path)


def test_empty_archive(tmp_path):
    assert len(scan_shard(write_tar(tmp_path / "a.tar")).rows) == 0
    with pytest.raises(UserError, match="no sample"):
        write_index(tmp_path, ["a.tar"], [scan_shard(tmp_path / "a.tar")], {})


def mutate(data: bytes, random_: random.Random) -> bytes:
    """Flipped bytes, a cut, two blocks swapped, some doubled, some removed, zeros, noise, another header."""
    content, block = bytearray(data), tarfile.BLOCKSIZE
    places = range(len(data) // block)
    kind = random_.randrange(8)
    at, other = (random_.choice(places) * block for _ in range(2))
    if kind == 0:
        for _ in range(random_.choice((1, 1, 4))):
            content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
    elif kind == 1:
        del content[random_.choice((at, random_.randrange(len(content)))) :]
    elif kind == 2:
        content[at : at + block], content[other : other + block] = (
            data[other : other + block],
            data[at : at + block],
        )
    elif kind == 3:
        content[at:at] = data[other : other + random_.randint(1, 6) * block]
    elif kind == 4:
        del content[at : at + random_.randint(1, 6) * block]
    elif kind == 5:
        content[at : at + block] = bytes(block)
    elif kind == 6:
        content[at : at + block] = random_.randbytes(block)
    else:
        # A header whose sum is right and whose name, size or kind is another.
        headers = [o * block for o in places if data[o * block + 257 : o * block + 262] == b"ustar"]
        at = random_.choice(headers)
        header = content[at : at + block]
        start, stop = random_.choice([(3, 4), (4, 6), (128, 135), (156, 157), (345, 350)])
        value = random_.choice([b"0", b"9", b"7777", b"../", b"L", b"x", b"S", b"-1", b"\xff", b"row3.jpg"])
        header[start:stop] = value[: stop - start].ljust(stop - start, b"0")
        header[148:156] = b" " * 8
        header[148:156] = f"{sum(header):06o}\0 ".encode()
        content[at : at + block] = header
    return bytes(content)


def test_damage_gives_the_right_sample_or_one_error(tmp_path):
    """No mutation gives a traceback, or another sample's picture."""
    source, work = tmp_path / "source", tmp_path / "work"
    rows = [row(i) for i in range(NUM_ROWS)]
    expected = {r.key: r.members for r in rows}
    write_shards(rows, source, name="a", samples_per_shard=NUM_ROWS, builder={})
    shutil.copytree(source, work)
    path, whole = work / "a-000000.tar", (source / "a-000000.tar").read_bytes()
    refused = read_right = 0
    messages: list[str] = []
    for seed in range(NUM_MUTATIONS):
        mutated = mutate(whole, random.Random(seed))
        path.write_bytes(mutated)
        with ShardIndexOf(work) as index:
            for number in range(NUM_ROWS):
                try:
                    members = index.read(number)
                except DamagedSample as error:
                    refused += 1
                    messages.append(str(error))
                else:
                    read_right += 1
                    assert members["__key__"] == f"row{number}", seed
                    assert {name: members[name] for name in ("jpg", "json")} == expected[f"row{number}"], seed
        for skip_bad in (False, True):
            try:
                table = scan_shard(path, skip_bad=skip_bad)
            except UserError as error:
                messages.append(str(error))
                continue
            assert len(table.rows) == len(table.key_hashes), seed
            for offset, size, _, _ in table.rows.tolist():
                assert set(parse_members(mutated[offset : offset + size], "")) > {"__key__"}, seed
    assert min(refused, read_right) > NUM_MUTATIONS
    assert all(message and "\n" not in message for message in messages)


class ShardIndexOf:
    def __init__(self, directory):
        self.index = ShardIndex(directory)

    def __enter__(self):
        return self.index

    def __exit__(self, *_):
        self.index.close()


def test_a_flipped_index_gives_no_other_sample(tmp_path):
    """Offsets and sizes of the index are changed instead of the shard."""
    rows = [row(i) for i in range(NUM_ROWS)]
    write_shards(rows, tmp_path, name="a", samples_per_shard=NUM_ROWS, builder={})
    whole = np.load(tmp_path / "index.npy")
    random_ = random.Random(0)
    for _ in range(60):
        table = whole.copy()
        # Offset, size, captions, checksum; the low 20 bits of each.
        place = random_.randrange(NUM_ROWS), random_.randrange(4)
        table[place] ^= 1 << random_.randrange(20)
        np.save(tmp_path / "index.npy", table)
        with ShardIndexOf(tmp_path) as index:
            for number in range(NUM_ROWS):
                try:
                    members = index.read(number)
                except UserError:
                    continue
                assert members["jpg"] == rows[number].members["jpg"]


def test_an_index_of_huge_sizes(tmp_path):
    write_shards([row(0)], tmp_path, name="a", samples_per_shard=1, builder={})
    table = np.load(tmp_path / "index.npy")
    table[0, 1] = 1 << 60
    np.save(tmp_path / "index.npy", table)
    with ShardIndexOf(tmp_path) as index, pytest.raises(UserError):
        index.read(0)


FOREIGN_RECORDS = {
    "choices a number": b'{"question": "Why?", "choices": 5}',
    "turns a number": b'{"conversations": 5}',
    "turn without a text": b'{"conversations": [{"from": "human"}]}',
    "deep": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "half a surrogate": b'{"captions": ["\\ud800"]}',
    "huge number": b'{"a": ' + b"9" * 5000 + b"}",
    "captions an object": b'{"captions": {"a": 1}}',
}


@pytest.mark.parametrize("name", FOREIGN_RECORDS)
def test_odd_records_are_taken_or_refused(tmp_path, name):
    path = write_tar(tmp_path / "a.tar", *sample("a", FOREIGN_RECORDS[name]))
    table = scan_shard(path, skip_bad=True)
    assert len(table.rows) + len(table.bad) == 1


def test_a_name_that_is_no_utf8(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as archive:
        info = tarfile.TarInfo("naïve.json")
        info.size = len(GOOD)
        archive.addfile(info, io.BytesIO(GOOD))
    table = scan_shard(path, skip_bad=True)
    assert len(table.rows) + len(table.bad) == 1
