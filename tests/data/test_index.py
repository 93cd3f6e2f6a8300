from __future__ import annotations

import gc
import json
import pickle
import re
import tarfile

import numpy as np
import pytest
import webdataset
from tiny_shards import caption_row, write_shards

from dehvf_ds.config import UserError
from dehvf_ds.data.index import INDEX_NAME, LENGTHS_NAME, MANIFEST_NAME, ShardIndex
from dehvf_ds.data.shards import DamagedSample, ShardRow


def test_every_sample_is_read_from_its_own_bytes(make_shards):
    index = ShardIndex(make_shards(10, 4))
    assert len(index) == 10
    assert index.shard_rows == (4, 4, 2)
    assert index.shard_examples == (8, 8, 4)
    assert index.captions.tolist() == [2] * 10
    assert index.text_lengths.tolist() == [len("The dog 0 runs 0.")] * 20
    assert index.num_without_captions == 0
    for i in (0, 9, 3, 4, 7):
        members = index.read(i)
        assert members["__key__"] == f"row{i}"
        assert json.loads(members["json"])["image_id"] == i
        assert members["png"].startswith(b"\x89PNG")
    name, offset, size = index.locate(5)
    assert name == "tiny-000001.tar"
    assert offset % tarfile.BLOCKSIZE == size % tarfile.BLOCKSIZE == 0


# webdataset leaves its files for the collector to close.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_shards_are_ordinary_webdataset_shards(make_shards):
    directory = make_shards(5, 3)
    urls = [str(path) for path in sorted(directory.glob("*.tar"))]
    keys = [s["__key__"] for s in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)]
    gc.collect()
    assert keys == [f"row{i}" for i in range(5)]


def test_index_travels_to_a_worker_by_directory(make_shards):
    index = ShardIndex(make_shards())
    index.read(0)
    copy = pickle.loads(pickle.dumps(index))
    assert copy.read(3) == index.read(3)
    assert len(pickle.dumps(index)) < 1000


def test_sample_number_out_of_range(make_shards):
    with pytest.raises(IndexError):
        ShardIndex(make_shards(3)).locate(3)


def _break(directory, what):
    manifest = json.loads((directory / MANIFEST_NAME).read_text())
    shard = directory / "tiny-000001.tar"
    if what == "no manifest":
        (directory / MANIFEST_NAME).unlink()
    elif what == "no json":
        (directory / MANIFEST_NAME).write_text("{")
    elif what == "no fields":
        (directory / MANIFEST_NAME).write_text("{}")
    elif what == "version":
        (directory / MANIFEST_NAME).write_text(json.dumps({**manifest, "format_version": 99}))
    elif what == "sum":
        (directory / MANIFEST_NAME).write_text(json.dumps({**manifest, "num_samples": 11}))
    elif what == "no index":
        (directory / INDEX_NAME).unlink()
    elif what == "bad index":
        (directory / INDEX_NAME).write_bytes(b"no numpy")
    elif what == "no lengths":
        (directory / LENGTHS_NAME).unlink()
    elif what == "other name":
        text = (directory / MANIFEST_NAME).read_text()
        (directory / MANIFEST_NAME).write_text(text.replace("tiny-000001.tar", "../x.tar"))
    elif what == "short index":
        np.save(directory / INDEX_NAME, np.load(directory / INDEX_NAME)[:-1])
    elif what == "no shard":
        shard.unlink()
    elif what == "cut shard":
        shard.write_bytes(shard.read_bytes()[:-512])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no manifest", r"manifest.json: no such file; build shards"),
        ("no json", r"manifest.json: not a manifest"),
        ("no fields", r"manifest.json: not a manifest of shards: KeyError"),
        ("version", r"format version 99, this program reads 3"),
        ("other name", r"shard name '../x.tar' is not a plain file name"),
        ("no lengths", r"text_lengths.npy: no such file"),
        ("sum", r"num_samples 11 is not the sum"),
        ("no index", r"index.npy: no such file"),
        ("bad index", r"index.npy: not an index"),
        ("short index", r"index.npy: int64 \(9, 4\) where manifest.json promises int64 \(10, 4\)"),
        ("no shard", r"tiny-000001.tar: no such shard"),
        ("cut shard", r"tiny-000001.tar: \d+ bytes where manifest.json promises \d+; copy the shard again"),
    ],
)
def test_broken_directories_are_refused_in_one_line(make_shards, what, message):
    directory = make_shards(10, 4)
    _break(directory, what)
    with pytest.raises(UserError, match=message) as caught:
        ShardIndex(directory).check_sizes()
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)


def test_missing_directory(tmp_path):
    with pytest.raises(
        UserError, match=r"absent: no such directory; build shards with tools/build_shards.py"
    ):
        ShardIndex(tmp_path / "absent")


@pytest.mark.parametrize("place", ["first header", "last header", "record", "picture", "padding"])
def test_any_changed_byte_is_noticed(make_shards, place):
    directory = make_shards(4, 4)
    name, offset, size = ShardIndex(directory).locate(1)
    data = bytearray((directory / name).read_bytes())
    # json is the first member, png the second; each has one block of header.
    at = {
        "first header": 1,
        "record": 512 + 30,
        "last header": 1025,
        "picture": 1536 + 40,
        "padding": size - 1,
    }
    data[offset + at[place]] ^= 1
    (directory / name).write_bytes(bytes(data))
    index = ShardIndex(directory)
    assert index.read(0)["__key__"] == "row0"
    with pytest.raises(DamagedSample, match=re.escape(f"{directory}: {name}: sample 1")):
        index.read(1)


def test_index_of_other_shards_gives_no_other_sample(make_shards):
    directory = make_shards(8, 4)
    np.save(directory / INDEX_NAME, np.roll(np.load(directory / INDEX_NAME), 4, axis=0))
    index = ShardIndex(directory)
    for row in range(8):
        with pytest.raises(DamagedSample):
            index.read(row)


def test_a_sample_in_two_shards_is_named(tmp_path):
    rows = [caption_row(number) for number in (0, 1, 2, 0)]
    with pytest.raises(
        UserError, match=r"'row0' stands in x-000000.tar and, the same bytes, in x-000001.tar; remove one"
    ):
        write_shards(rows, tmp_path / "out", name="x", samples_per_shard=2, builder={})
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()


def test_writing_is_deterministic_and_leaves_no_part(tmp_path, make_shards):
    first = make_shards(6, 4)
    first.rename(tmp_path / "other")
    second = make_shards(6, 4)
    names = sorted(path.name for path in second.iterdir())
    assert names == [
        "index.npy",
        "manifest.json",
        "text_lengths.npy",
        "tiny-000000.tar",
        "tiny-000001.tar",
    ]
    for name in names:
        assert (tmp_path / "other" / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no sample to index"),
        ([ShardRow(key="a.b", members={"json": b"{}"})], "dot, slash or space"),
        ([caption_row(number) for number in (0, 1, 0)], "key 'row0' is given to two samples"),
        ([ShardRow(key="a", members={"json": b"[]"})], "text is not usable: not an object; repair it"),
        ([ShardRow(key="a", members={"json": b'{"captions": [" "]}', "png": b"p"})], "has an empty caption"),
    ],
)
def test_unfit_rows(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        write_shards(rows, tmp_path / "out", name="x", samples_per_shard=3, builder={})
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()
