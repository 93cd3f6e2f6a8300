"""A directory of shards: each sample from its own bytes, and parts that do not fit are refused."""

from __future__ import annotations

import gc
import json
import pickle

import numpy as np
import pytest
import webdataset

from dehvf_ds.config import UserError
from dehvf_ds.data.index import INDEX_NAME, LENGTHS_NAME, MANIFEST_NAME, ShardIndex

SHARD = "tiny-000001.tar"


def test_every_sample_is_read_from_its_own_bytes(make_shards):
    index = ShardIndex(make_shards(10, 4))
    assert len(index) == 10
    assert (index.shard_rows, index.shard_examples) == ((4, 4, 2), (8, 8, 4))
    assert index.captions.tolist() == [2] * 10
    assert index.text_lengths.tolist() == [len("The dog 0 runs 0.")] * 20
    copy = pickle.loads(pickle.dumps(index))
    assert len(pickle.dumps(index)) < 1000
    for i in (0, 9, 3, 4, 7):
        members = index.read(i)
        assert members["__key__"] == f"row{i}"
        assert json.loads(members["json"])["image_id"] == i
        assert members["png"].startswith(b"\x89PNG")
        assert copy.read(i) == members
    for outside in (-1, 10):
        with pytest.raises(IndexError):
            index.read(outside)


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
    path.write_text(path.read_text().replace(SHARD, "../x.tar"))


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
