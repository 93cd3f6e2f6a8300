"""A directory of shards: each sample from its own bytes, and parts that do not fit are refused."""

from __future__ import annotations

import gc
import json
import pickle
import tarfile

import numpy as np
import pytest
import webdataset
from tiny_shards import caption_row, write_shards

from dehvf_ds.config import UserError
from dehvf_ds.data.index import INDEX_NAME, LENGTHS_NAME, MANIFEST_NAME, ShardIndex
from dehvf_ds.data.shards import ShardRow


def test_every_sample_is_read_from_its_own_bytes(make_shards):
    index = ShardIndex(make_shards(10, 4))
    assert len(index) == 10
    assert (index.shard_rows, index.shard_examples) == ((4, 4, 2), (8, 8, 4))
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
    copy = pickle.loads(pickle.dumps(index))
    assert copy.read(3) == index.read(3)
    assert len(pickle.dumps(index)) < 1000
    with pytest.raises(IndexError):
        index.read(10)


# webdataset leaves its files for the collector to close.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_shards_are_ordinary_webdataset_shards(make_shards):
    urls = [str(path) for path in sorted(make_shards(5, 3).glob("*.tar"))]
    keys = [s["__key__"] for s in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)]
    gc.collect()
    assert keys == [f"row{i}" for i in range(5)]


def set_in_manifest(**fields):
    def change(directory):
        path = directory / MANIFEST_NAME
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def rename(directory):
    path = directory / MANIFEST_NAME
    path.write_text(path.read_text().replace("tiny-000001.tar", "../x.tar"))


SHARD = "tiny-000001.tar"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.rename(d.with_name("x")), r"no such directory; build shards with tools/build_shards.py"),
        (lambda d: (d / MANIFEST_NAME).unlink(), r"manifest.json: no such file; build shards"),
        (lambda d: (d / MANIFEST_NAME).write_text("{"), r"manifest.json: not a manifest"),
        (lambda d: (d / MANIFEST_NAME).write_text("{}"), r"not a manifest of shards: KeyError"),
        (set_in_manifest(format_version=99), r"format version 99, this program reads 3"),
        (set_in_manifest(num_samples=11), r"num_samples 11 is not the sum"),
        (set_in_manifest(num_samples=0, shards=[]), r"it names no sample"),
        (rename, r"shard name '../x.tar' is not a plain file name"),
        (lambda d: (d / INDEX_NAME).unlink(), r"index.npy: no such file"),
        (lambda d: (d / LENGTHS_NAME).unlink(), r"text_lengths.npy: no such file"),
        (lambda d: (d / INDEX_NAME).write_bytes(b"no numpy"), r"index.npy: not an index"),
        (
            lambda d: np.save(d / INDEX_NAME, np.load(d / INDEX_NAME)[:-1]),
            r"int64 \(9, 4\) where manifest.json promises int64 \(10, 4\)",
        ),
        (lambda d: (d / SHARD).unlink(), rf"{SHARD}: no such shard"),
        (
            lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes()[:-512]),
            rf"{SHARD}: \d+ bytes where manifest.json promises \d+; copy the shard again",
        ),
    ],
)
def test_broken_directories_are_refused_in_one_line(make_shards, damage, message):
    directory = make_shards(10, 4)
    damage(directory)
    with pytest.raises(UserError, match=message) as caught:
        ShardIndex(directory).check_sizes()
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)


def test_writing_is_deterministic_and_leaves_no_part(tmp_path, make_shards):
    make_shards(6, 4).rename(tmp_path / "other")
    second = make_shards(6, 4)
    names = sorted(path.name for path in second.iterdir())
    assert names == [INDEX_NAME, MANIFEST_NAME, LENGTHS_NAME, "tiny-000000.tar", "tiny-000001.tar"]
    for name in names:
        assert (tmp_path / "other" / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no sample to index"),
        ([caption_row(number) for number in (0, 1, 0)], "key 'row0' is given to two samples"),
        (
            [caption_row(number) for number in (0, 1, 2, 3, 0)],
            r"'row0' is in x-000000.tar and, with the same bytes, in x-000001.tar",
        ),
        ([ShardRow(key="a", members={"json": b"[]"})], "text is not usable: not an object; repair it"),
    ],
)
def test_unfit_rows(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        write_shards(rows, tmp_path / "out", name="x", samples_per_shard=3, builder={})
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()
