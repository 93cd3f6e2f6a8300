"""Shards of other tools indexed, and shards read again: what is wrong is named, and nothing else."""

from __future__ import annotations

import io
import random
import re
import shutil
from typing import Any

import numpy as np
import pytest
from PIL import Image
from webdataset import ShardWriter

from dehvf_ds.data.building.directory import PLAN_NAME
from dehvf_ds.data.index import MANIFEST_NAME, ShardIndex
from dehvf_ds.data.records import read_record


@pytest.fixture
def downloaded(tmp_path, encoded):
    """What img2dataset leaves: tars, statistics, rows whose download failed, a web page."""

    def call(*, failed=(), page=None):
        (tmp_path / "cc").mkdir()
        with ShardWriter(f"{tmp_path}/cc/%05d.tar", maxcount=3, verbose=0) as writer:
            for number in range(6):
                key = f"{number // 3:05d}{number % 3:04d}"
                record = {"url": "http://x", "caption": f"Text {key}", "key": key, "status": "success"}
                picture = b"<html>404</html>" if key == page else encoded((number // 3, number % 3, 0))
                members: dict[str, Any] = {"jpg": picture}
                if key in failed:
                    members, record["status"] = {}, "failed_to_download"
                writer.write({"__key__": key, **members, "txt": record["caption"], "json": record})
        (tmp_path / "cc" / "00000_stats.json").write_text("{}")
        return tmp_path / "cc"

    return call


def test_shards_of_img2dataset(run, downloaded):
    directory = downloaded()
    (directory / "val").mkdir()
    # 00000.tar.gz is unpacked already.
    for name in ("val/00000.tar", "00000.tar.gz", "val/00002.TGZ"):
        shutil.copy(directory / "00000.tar", directory / name)
    (directory / "00001.tar").rename(directory / "00001.TAR")
    before = {path: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    _, out, err = run("index", directory)
    assert f"{directory}: 6 samples, 6 captions, 6 pictures, 2 shards" in out
    assert err.startswith(f"note: not indexed: 2 other shards, as {directory / 'val/00000.tar'}; unpack")
    index = ShardIndex(directory)
    assert [index.read(row)["__key__"] for row in (0, 5)] == ["000000000", "000010002"]
    assert {path: path.read_bytes() for path in before} == before
    code, out, err = run("verify", directory)
    assert (code, out, err) == (0, f"{directory}: 2 shards, 6 samples, all as the manifest says\n", "")
    made = (directory / MANIFEST_NAME).read_bytes()
    assert "--overwrite rebuilds the index" in run("index", directory)[2]
    assert run("index", directory, "--overwrite", "--num-workers", 2)[0] == 0
    assert (directory / MANIFEST_NAME).read_bytes() == made


def test_failed_downloads_and_undecodable_pictures(run, downloaded):
    directory = downloaded(failed=["000000001", "000010002"], page="000010000")
    code, _, err = run("index", directory)
    assert (code, err.count("\n")) == (2, 1)
    assert "00000.tar: sample 000000001: a caption without a picture (its download: failed_to_download" in err
    code, _, err = run("index", directory, "--skip-bad")
    assert code == 0
    assert "note: left out 3 of 6: 2 without a picture, 1 undecodable" in err
    index = ShardIndex(directory)
    assert index.manifest["builder"]["left_out_first"][0].startswith("00000.tar: sample 000000001: ")
    for row in range(len(index)):
        members = index.read(row)
        assert read_record(members).record["captions"] == [f"Text {members['__key__']}"]
        colour = Image.open(io.BytesIO(members["jpg"])).getpixel((0, 0))
        assert abs(colour[0] - int(members["__key__"][4])) < 3
    # Whoever verifies knows what was left out, with its pictures decoded or not.
    assert run("verify", directory)[0] == run("verify", directory, "--no-decode")[0] == 0
    assert run("index", directory, "--overwrite", "--skip-bad", "--no-decode")[0] == 0
    assert run("verify", directory, "--no-decode")[0] == 0
    code, out, _ = run("verify", directory)
    assert (code, out.count("\n")) == (2, 1)
    assert "00001.tar: sample 000010000: not a readable picture: it is a web page" in out


def test_shards_that_number_their_keys_anew(run, tmp_path, encoded):
    for shard in range(2):
        with ShardWriter(f"{tmp_path}/x{shard}-%d.tar", maxcount=100, verbose=0) as writer:
            for number in range(2):
                text = f"Text {shard} {number}"
                writer.write({"__key__": f"{number:06d}", "jpg": encoded((shard, number, 0)), "txt": text})
    assert "note: the shards number their keys anew; a sample's key is SHARD/KEY" in run("index", tmp_path)[2]
    index = ShardIndex(tmp_path)
    keys = [index.read(row)["__key__"] for row in range(4)]
    assert keys == [f"x{shard}-0/{number:06d}" for shard in range(2) for number in range(2)]
    assert read_record(index.read(2)).record["captions"] == ["Text 1 0"]
    assert run("verify", tmp_path)[0] == 0


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (lambda d: (d / "00001.tar").write_bytes(b"x" * 3000), ["00001.tar: not a whole"]),
        (
            lambda d: shutil.copy(d / "00000.tar", d / "00001.tar"),
            ["sample '000000000' is in 00000.tar and, with the same bytes, in 00001.tar"],
        ),
        (lambda d: (d / "00001.tar").rename(d / "a b.tar"), ["a shard's name has letters"]),
        (
            lambda d: [p.rename(f"{p}.gz") for p in d.glob("*.tar")],
            ["00000.tar.gz (and 1 others) is compressed"],
        ),
        # Without it half of the data would be missing.
        (lambda d: (d / "00001.tar").rename(d / "00001.tar.zstd"), ["00001.tar.zstd is compressed"]),
        (lambda d: (d / PLAN_NAME).write_text("{}"), ["an unfinished build"]),
        (shutil.rmtree, ["no such directory"]),
    ],
)
def test_directories_that_cannot_be_indexed(run, downloaded, damage, messages):
    directory = downloaded()
    damage(directory)
    code, _, err = run("index", directory, "--skip-bad")
    assert code == 2
    assert all(message in err for message in messages), err
    assert not (directory / MANIFEST_NAME).exists()


def edit(path, change):
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def change_index(out, column, name="index.npy"):
    table = np.load(out / name)
    table[(2, column) if table.ndim == 2 else 2] += 512
    np.save(out / name, table)


TAR = "csv-000000.tar"
CHANGED = r"csv-000000\.tar: its bytes are not those that manifest.json was made of; copy it again"
INDEX = r"index\.npy: not what csv-000000\.tar holds"


@pytest.mark.parametrize(
    ("damage", "patterns"),
    [
        (lambda out: (out / TAR).unlink(), [r"csv-000000\.tar: cannot be read: No such file"]),
        (lambda out: edit(out / TAR, lambda d: d.__delitem__(slice(4000, None))), [CHANGED]),
        (lambda out: edit(out / TAR, lambda d: d.__setitem__(d.index(b"Text b"), 7)), [CHANGED]),
        *((lambda out, column=column: change_index(out, column), [INDEX]) for column in (0, 1, 3)),
        (lambda out: change_index(out, 2), [INDEX, "num_captions is not"]),
        (lambda out: change_index(out, 0, "text_lengths.npy"), [r"text_lengths\.npy: not what csv-0"]),
        (lambda out: (out / "index.npy").write_bytes(b"x"), []),
        (lambda out: (out / MANIFEST_NAME).unlink(), []),
    ],
)
def test_verify_names_the_damage(run, table, tmp_path, damage, patterns):
    assert run(*table, "--output", tmp_path / "out")[0] == 0
    damage(tmp_path / "out")
    code, out, err = run("verify", tmp_path / "out")
    problems = out.splitlines()
    assert (code, len(problems), err.count("\n")) == (2, len(patterns), 1)
    assert not patterns or f"2 shards, 4 samples: {len(patterns)} of them damaged" in err
    for problem, pattern in zip(problems, patterns, strict=True):
        assert re.search(pattern, problem), problem
        assert problem.startswith(str(tmp_path / "out"))


def test_verify_finds_any_flipped_bit_and_never_fails_itself(run, table, tmp_path):
    assert run(*table, "--output", tmp_path / "out")[0] == 0
    out, draw = tmp_path / "out", random.Random(0)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    for _ in range(60):
        name = draw.choice([TAR, "csv-000001.tar", "index.npy", "text_lengths.npy"])
        data = bytearray(whole[name])
        data[draw.randrange(128 if name.endswith("npy") else 0, len(data))] ^= 1 << draw.randrange(8)
        (out / name).write_bytes(data)
        code, text, _ = run("verify", out)
        assert code == 2
        assert text
        (out / name).write_bytes(whole[name])
