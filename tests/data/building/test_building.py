from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from dehvf_ds import __version__
from dehvf_ds.config import UserError
from dehvf_ds.data import shards
from dehvf_ds.data.building import plan
from dehvf_ds.data.building.adopt import adopt_shards
from dehvf_ds.data.building.directory import PLAN_NAME, alone_in
from dehvf_ds.data.building.plan import BuildSettings, plan_shards
from dehvf_ds.data.building.sources import SourceRow
from dehvf_ds.data.building.tasks import run_tasks
from dehvf_ds.data.building.verify import verify_shards
from dehvf_ds.data.building.write import build_shards
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.manifest import MANIFEST_NAME
from dehvf_ds.data.records import CheckedRecord
from dehvf_ds.data.shards import ShardRow, write_shard


class Counted:
    """A progress that remembers."""

    def __init__(self):
        self.total = self.done = 0

    def start(self, total):
        self.total = total

    def advance(self, count):
        self.done += count


@pytest.fixture
def notes():
    return []


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "images").mkdir()
    return [source_row(tmp_path / "images" / f"p{i}.png", i) for i in range(10)]


def source_row(path, number=0, size=(30, 20)):
    Image.new("RGB", size, (number, 0, 0)).save(path)
    record = {"image_id": number, "file_name": path.name, "captions": [f"Caption {number}."]}
    return SourceRow(path.stem, path, record)


@pytest.fixture
def build(rows, tmp_path, notes):
    def call(output="out", *, rows=rows, num_workers=1, progress=None, facts=None, name="t", **settings):
        return build_shards(
            rows,
            tmp_path / output,
            name=name,
            settings=BuildSettings(**{"samples_per_shard": 4, **settings}),
            facts=facts or {"source": "test"},
            num_workers=num_workers,
            progress=progress or Counted(),
            note=notes.append,
        )

    return call


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def verify(directory, **options):
    arguments = {"decode": True, "num_workers": 1, "progress": Counted(), **options}
    return verify_shards(directory, **arguments)[1]


def test_bytes_do_not_depend_on_the_processes(build, tmp_path):
    progress = Counted()
    for workers in (1, 2, 3):
        build(f"w{workers}", num_workers=workers, progress=progress)
    first = contents(tmp_path / "w1")
    assert first == contents(tmp_path / "w2") == contents(tmp_path / "w3")
    assert sorted(first) == [
        "index.npy",
        MANIFEST_NAME,
        *(f"t-{i:06d}.tar" for i in range(3)),
        "text_lengths.npy",
    ]
    assert (progress.total, progress.done) == (10, 30)
    assert str(tmp_path).encode() not in first[MANIFEST_NAME]
    assert verify(tmp_path / "w1") == verify(tmp_path / "w2", num_workers=2) == []


@pytest.mark.parametrize(
    ("num_bytes", "sizes"),
    [(1, [1] * 10), (10**9, [10]), (460, [2] * 5)],
)
def test_shards_by_bytes(rows, num_bytes, sizes):
    largest = max(row.image.stat().st_size + len(json.dumps(row.record)) for row in rows)
    assert 100 < largest < 230
    plan = plan_shards(rows, BuildSettings(samples_per_shard=None, bytes_per_shard=num_bytes))
    if num_bytes == 460:
        sums = [sum(row.image_bytes + len(row.record) for row in shard) for shard in plan]
        assert max(sums) <= 460
        assert [row.key for shard in plan for row in shard] == [row.name for row in rows]
    else:
        assert [len(shard) for shard in plan] == sizes


def test_equal_names_get_numbers(tmp_path):
    names = ["a b", "a.b", "a_b", "a_b-2", "", "é" * 100, "a b"]
    plan = plan_shards([SourceRow(name, None, {}) for name in names], BuildSettings())
    keys = [row.key for row in plan[0]]
    assert keys == ["a_b", "a_b-2", "a_b-3", "a_b-2-2", "sample", "_" * 80, "a_b-4"]
    many = plan_shards([SourceRow("same", None, {})] * 20_000, BuildSettings(samples_per_shard=20_000))
    assert len({row.key for row in many[0]}) == 20_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[3].image.unlink(), "p3.png: no such picture of 10; look at --images or --root"),
        (lambda rows: rows[3].image.rename(rows[3].image.with_suffix(".PNG")), r"of 10; rename 'p3\.PNG'"),
        (lambda rows: [row.image.unlink() for row in rows[4:7]], r"p4.png: no such picture \(and 2 others\)"),
        (lambda rows: rows[2].image.write_bytes(b""), "p2.png: a picture of 0 bytes; copy it again"),
        (lambda rows: rows[2].record.update(x="\ud800"), "sample p2: its record is not fit for UTF-8"),
    ],
)
def test_bad_rows_are_found_before_anything_is_written(build, rows, tmp_path, change, message):
    change(rows)
    with pytest.raises(UserError, match=message):
        build()
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("there", ["u\u0308.jpg", "\u00fc.JPG"])
def test_a_picture_of_nearly_the_same_name_is_told(tmp_path, there):
    (tmp_path / there).write_bytes(b"x")
    rows = [SourceRow("a", tmp_path / "\u00fc.jpg", {})]
    with pytest.raises(UserError, match=re.escape(f"no such picture of 1; rename {there!a}, which is there")):
        plan_shards(rows, BuildSettings())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BuildSettings(samples_per_shard=0), "--samples-per-shard 0: must be at least 1"),
        (lambda: BuildSettings(shorter_side=0), "--shorter-side 0"),
        (lambda: BuildSettings(jpeg_quality=101), "at most 100"),
        (lambda: BuildSettings(bytes_per_shard=0), "--bytes-per-shard 0"),
    ],
)
def test_settings_that_cannot_be(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_finished_shards_are_kept(build, tmp_path):
    build("whole")
    build()
    out = tmp_path / "out"
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    facts = {k: v for k, v in manifest["builder"].items() if not k.startswith("left_out")}
    for name in (MANIFEST_NAME, "index.npy", "text_lengths.npy", "t-000001.tar"):
        (out / name).unlink()
    (out / PLAN_NAME).write_text(json.dumps(facts))
    (out / ".t-000001.tar.part").write_bytes(b"half")
    before = {name: (out / name).stat() for name in ("t-000000.tar", "t-000002.tar")}
    progress = Counted()
    build(progress=progress)
    assert progress.done == 10
    for name, stat in before.items():
        assert (out / name).stat().st_ino == stat.st_ino
        assert (out / name).stat().st_mtime_ns == stat.st_mtime_ns
    assert contents(out) == contents(tmp_path / "whole")


def unfinish(out):
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    facts = {k: v for k, v in manifest["builder"].items() if not k.startswith("left_out")}
    (out / MANIFEST_NAME).unlink()
    (out / PLAN_NAME).write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda out: (out / "t-000001.tar").write_bytes(b"x" * 9000), "not a whole, uncompressed tar"),
        (lambda out: shutil.copy(out / "t-000000.tar", out / "t-000001.tar"), "it held other samples"),
        (lambda out: os.utime(out / "t-000001.tar", (0, 0)), "a picture is newer"),
        (
            lambda out: write_shard(
                [
                    ShardRow(key=f"p{i}", members={"json": b'{"captions": ["x"]}', "png": b"y" * 999})
                    for i in range(4, 8)
                ],
                out / "t-000001.tar",
            ),
            "it held other records or pictures",
        ),
    ],
)
def test_shards_that_are_not_the_planned_ones_are_built_again(build, tmp_path, notes, damage, reason):
    build("whole")
    build()
    unfinish(tmp_path / "out")
    damage(tmp_path / "out")
    build()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(notes) == 1
    assert reason in notes[0]


def test_a_finished_directory_is_left_alone(build, tmp_path):
    manifest, was_there = build()
    before = contents(tmp_path / "out")
    (tmp_path / "out" / PLAN_NAME).write_text("left by a kill after the manifest")
    assert not was_there
    assert build() == (manifest, True)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"samples_per_shard": 5}, r"samples_per_shard \(4 there, 5 now\)"),
        ({"shorter_side": 9}, r"shorter_side \(None there, 9 now\)"),
        ({"name": "u"}, r"name \(t there, u now\)"),
        ({"facts": {"source": "test", "split": "val"}}, r"split \(None there, val now\)"),
        (
            {"facts": {"source": "test", "file": {"name": "a.json", "sha256": "f" * 64}}},
            r"file \(None there, a.json ffffffffffff now\)",
        ),
        ({"facts": {"source": "else"}}, "not empty; give another --output"),
    ],
)
def test_other_arguments_are_refused(build, tmp_path, finished, other, message):
    build()
    if not finished:
        unfinish(tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=message):
        build(**other)
    assert contents(tmp_path / "out") == before


def test_other_numbers_of_rows_are_refused(build, rows):
    build()
    with pytest.raises(UserError, match=r"rows \(10 there, 9 now\), pictures \(10 there, 9 now\)"):
        build(rows=rows[:9])


@pytest.mark.parametrize(
    "content", [{"a.txt": "x"}, {MANIFEST_NAME: "{"}, {PLAN_NAME: "{"}, {PLAN_NAME: "[]"}]
)
def test_directories_of_something_else_are_refused(build, tmp_path, content):
    (tmp_path / "out").mkdir()
    for name, text in content.items():
        (tmp_path / "out" / name).write_text(text)
    with pytest.raises(UserError, match="not empty; give another --output"):
        build()
    assert [path.name for path in (tmp_path / "out").iterdir()] == list(content)


def test_two_builds_at_once(build, tmp_path):
    (tmp_path / "out").mkdir()
    with alone_in(tmp_path / "out"), pytest.raises(UserError, match="another call is writing here"):
        build()


def test_pictures_are_made_smaller_but_never_larger(build, tmp_path):
    images = tmp_path / "more"
    images.mkdir()
    sizes = [(100, 60), (60, 100), (24, 500), (10, 12), (24, 24)]
    rows = [source_row(images / f"s{i}.png", i, size) for i, size in enumerate(sizes)]
    turned = Image.new("RGB", (120, 80))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(images / "turned.jpg", exif=exif, comment=b"c" * 60_000)
    Image.new("RGBA", (80, 80), (0, 0, 0, 0)).save(images / "clear.png")
    Image.new("RGBA", (80, 80), (0, 0, 0, 0)).save(images / "clear.webp", lossless=True)
    extra = ["turned.jpg", "clear.png", "clear.webp"]
    rows += [SourceRow(name, images / name, {"captions": ["x"]}) for name in extra]
    build(rows=rows, shorter_side=24, jpeg_quality=80)
    index = ShardIndex(tmp_path / "out")
    members = [index.read(i) for i in range(len(rows))]
    assert "jpg" in members[0]
    assert "png" in members[2]
    for i in (2, 3, 4):
        assert members[i]["png"] == (images / f"s{i}.png").read_bytes()
    decoded = [Image.open(io.BytesIO(m.get("jpg") or m["png"])) for m in members]
    expected = [(40, 24), (24, 40), (24, 500), (10, 12), (24, 24), (24, 36), (24, 24), (24, 24)]
    assert [image.size for image in decoded] == expected
    assert not decoded[5].getexif()
    assert len(members[5]["jpg"]) < 5000
    assert all(np.asarray(decoded[i].convert("RGB")).min() > 250 for i in (6, 7))
    assert index.manifest["builder"]["jpeg_quality"] == 80


@pytest.fixture
def with_bad(rows):
    rows[1].image.write_bytes(rows[1].image.read_bytes()[:60])
    rows[8].image.write_bytes(b"")
    rows[9].image.write_bytes(b"GIF? no")
    return rows


def test_bad_pictures_stop_a_build_that_resizes(build, with_bad, tmp_path):
    with_bad[8].image.write_bytes(b"x")
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"p1\.png: not a readable picture.*--skip-bad"):
            build(f"w{workers}", shorter_side=8, num_workers=workers)
        assert not list((tmp_path / f"w{workers}").glob(".*.part"))
        assert not (tmp_path / f"w{workers}" / MANIFEST_NAME).exists()


def test_bad_pictures_are_left_out_on_demand(build, with_bad, tmp_path, notes):
    for workers in (1, 2):
        build(f"w{workers}", shorter_side=8, skip_bad=True, num_workers=workers)
    first = contents(tmp_path / "w1")
    assert first == contents(tmp_path / "w2")
    builder = json.loads(first[MANIFEST_NAME])["builder"]
    assert (builder["left_out"], builder["left_out_first"]) == (3, ["p8", "p1", "p9"])
    assert builder["left_out_reasons"] == {"undecodable": 3}
    # The last shard of 4, 4 and 2 rows would be empty.
    assert "t-000002.tar" not in first
    assert notes[1].startswith(f"left out {with_bad[1].image}: not a readable picture")
    assert notes[3] == "left out 3 of 10: 3 undecodable"
    unfinish(tmp_path / "w2")
    build("w2", shorter_side=8, skip_bad=True)
    assert contents(tmp_path / "w2") == first


def test_a_picture_that_vanishes_is_one_line(build, rows, monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "picture_sizes", lambda rows: [1] * len(rows))
    rows[5].image.unlink()
    with pytest.raises(UserError, match=r"p5\.png: No such file"):
        build()
    assert not list((tmp_path / "out").glob(".*.part"))


def double(task, advance):
    advance(1)
    if task == "bad" or task == "worse":
        raise UserError(f"it is {task}")
    if task == "die":
        os._exit(9)
    return 2 * task


def test_results_come_in_the_order_of_the_tasks():
    counted = Counted()
    assert run_tasks(double, list(range(20)), num_workers=3, advance=counted.advance) == list(range(0, 40, 2))
    assert counted.done == 20
    assert run_tasks(double, [], num_workers=3, advance=counted.advance) == []


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_first_task_s_error_wins(workers):
    with pytest.raises(UserError, match="it is bad"):
        run_tasks(double, [1, 2, "bad", "worse", 3], num_workers=workers, advance=lambda count: None)


def test_a_killed_process_is_one_line():
    with pytest.raises(UserError, match="a worker process was killed"):
        run_tasks(double, [1, "die", 2, 3], num_workers=2, advance=lambda count: None)


def test_no_workers():
    with pytest.raises(UserError, match="--num-workers 0: must be at least 1"):
        run_tasks(double, [1], num_workers=0, advance=lambda count: None)


def img2dataset(directory, shards=3, samples=4):
    """What img2dataset leaves: tars of jpg, txt and json, statistics and tables beside them."""
    directory.mkdir()
    for shard in range(shards):
        with tarfile.open(directory / f"{shard:05d}.tar", "w") as archive:
            for number in range(samples):
                key = f"{shard:05d}{number:04d}"
                file = io.BytesIO()
                Image.new("RGB", (8, 8), (shard, number, 0)).save(file, "JPEG")
                record = {"url": "http://x", "key": key, "caption": f"Text {key}", "status": "success"}
                texts = {
                    "jpg": file.getvalue(),
                    "json": json.dumps(record).encode(),
                    "txt": f"Text {key}".encode(),
                }
                for suffix, data in texts.items():
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        (directory / f"{shard:05d}_stats.json").write_text("{}")
        (directory / f"{shard:05d}.parquet").write_bytes(b"PAR1")
    return directory


@pytest.fixture
def adopt(notes):
    def call(directory, *, skip_bad=False, overwrite=False, num_workers=1):
        return adopt_shards(
            directory,
            skip_bad=skip_bad,
            overwrite=overwrite,
            num_workers=num_workers,
            progress=Counted(),
            note=notes.append,
        )

    return call


def test_shards_of_img2dataset(adopt, tmp_path):
    directory = img2dataset(tmp_path / "a")
    before = contents(directory)
    manifest = adopt(directory)
    assert (manifest["num_samples"], manifest["num_captions"]) == (12, 12)
    assert manifest["builder"] == {
        "source": "index",
        "skip_bad": False,
        "version": __version__,
        "left_out": 0,
        "left_out_reasons": {},
        "left_out_first": [],
    }
    index = ShardIndex(directory)
    assert [index.read(i)["__key__"] for i in (0, 5, 11)] == ["000000000", "000010001", "000020003"]
    assert index.read(5)["txt"] == b"Text 000010001"
    assert {name: data for name, data in contents(directory).items() if name in before} == before
    assert verify(directory) == []
    with pytest.raises(UserError, match=r"manifest\.json is there already; --overwrite indexes anew"):
        adopt(directory)
    made = contents(directory)
    assert adopt(directory, overwrite=True, num_workers=2) == manifest
    assert contents(directory) == made


def test_bad_samples_of_others(adopt, tmp_path, notes):
    directory = img2dataset(tmp_path / "a")
    with tarfile.open(directory / "00001.tar", "a") as archive:
        picture = tarfile.TarInfo("x.jpg")
        picture.size = 1
        archive.addfile(picture, io.BytesIO(b"j"))
        archive.addfile(tarfile.TarInfo("x.txt"))
    with pytest.raises(UserError, match=r"00001\.tar: sample x: has an empty caption"):
        adopt(directory, num_workers=2)
    assert not (directory / MANIFEST_NAME).exists()
    manifest = adopt(directory, skip_bad=True)
    assert manifest["num_samples"] == 12
    assert manifest["builder"]["left_out_first"][0].startswith("00001.tar: sample x: has an empty caption")
    assert notes[-1] == "left out 1 of 13: 1 without a caption"
    assert verify(directory) == []


def test_verify_knows_pictures_that_were_left_out(adopt, tmp_path):
    directory = img2dataset(tmp_path / "a")
    with tarfile.open(directory / "00001.tar", "a") as archive:
        for name, content in (("x.jpg", b"<html>404</html>"), ("x.txt", b"A dog.")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with pytest.raises(UserError, match="sample x: not a readable picture: it is a web page"):
        adopt(directory)
    assert adopt(directory, skip_bad=True)["builder"]["left_out_reasons"] == {"undecodable": 1}
    assert verify(directory) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "00001.tar").write_bytes((d / "00001.tar").read_bytes()[:3000]), r"00001\.tar"),
        (lambda d: (d / "00001.tar").write_bytes(b"<html>Not found"), r"00001\.tar: not a whole"),
        (
            lambda d: shutil.copy(d / "00000.tar", d / "00001.tar"),
            r"'\d+' \(and 3 others\) stands in 00000\.tar and, the same bytes, in 00001",
        ),
        (lambda d: (d / "00001.tar").rename(d / "a b.tar"), "a shard's name has letters"),
        (
            lambda d: [path.rename(f"{path}.gz") for path in d.glob("*.tar")],
            r"00000\.tar\.gz \(and 2 others\) is compressed",
        ),
        (lambda d: (d / PLAN_NAME).write_text("{}"), "a build that is not finished"),
        (lambda d: shutil.rmtree(d), "no such directory"),
    ],
)
def test_directories_that_cannot_be_adopted(adopt, tmp_path, damage, message):
    directory = img2dataset(tmp_path / "a")
    damage(directory)
    with pytest.raises(UserError, match=message):
        adopt(directory)
    assert not (directory / MANIFEST_NAME).exists()


def edit(path, change):
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def replace_sample(out, members):
    """Another row p5, with an index and a manifest made of it: damage that the hashes do not show."""
    index = ShardIndex(out)
    rows = []
    for number in range(4, 8):
        found = {name: data for name, data in index.read(number).items() if not name.startswith("__")}
        rows.append(ShardRow(key=f"p{number}", members=members(found) if number == 5 else found))
    index.close()
    (out / MANIFEST_NAME).unlink()
    with pytest.MonkeyPatch.context() as patch:
        # As an earlier version looked at them.
        patch.setattr(shards, "read_record", lambda m: CheckedRecord(json.loads(m["json"]), "caption"))
        write_shard(rows, out / "t-000001.tar")
        adopt_shards(
            out,
            skip_bad=False,
            overwrite=True,
            num_workers=1,
            progress=Counted(),
            note=lambda line: None,
            decode=False,
        )


def swap(out):
    first, second, spare = out / "t-000000.tar", out / "t-000001.tar", out / "spare"
    first.rename(spare)
    second.rename(first)
    spare.rename(second)


def flip_picture(data):
    data[data.rindex(b"IHDR") + 6] ^= 1


def flip_padding(data):
    data[-1] ^= 1


def change_index(out, column, name="index.npy"):
    table = np.load(out / name)
    table[(5, column) if table.ndim == 2 else 5] += 512
    np.save(out / name, table)


DAMAGE = {
    "missing": (lambda out: (out / "t-000001.tar").unlink(), [r"t-000001\.tar: no such shard"]),
    "size": (
        lambda out: edit(out / "t-000001.tar", lambda data: data.extend(bytes(512))),
        [r"t-000001\.tar: \d+ bytes where manifest.json promises \d+"],
    ),
    "cut": (
        lambda out: edit(out / "t-000001.tar", lambda data: data.__delitem__(slice(9000, None))),
        [r"000001\.tar"],
    ),
    "flipped": (
        lambda out: edit(out / "t-000001.tar", flip_picture),
        [r"t-000001\.tar: sample \d \(p\d\): not the bytes that the index was made of"],
    ),
    "padding": (
        lambda out: edit(out / "t-000001.tar", flip_padding),
        [r"t-000001\.tar: its bytes are not those that manifest.json was made of"],
    ),
    "swapped": (
        swap,
        [
            r"t-000000\.tar: holds what manifest.json calls t-000001\.tar",
            r"t-000001\.tar: holds what manifest.json calls t-000000\.tar",
        ],
    ),
    "other content": (
        lambda out: edit(out / "t-000001.tar", lambda data: data.__setitem__(slice(None), bytes(len(data)))),
        [r"t-000001\.tar: its bytes are not those that manifest.json was made of"],
    ),
    "no picture": (
        lambda out: replace_sample(out, lambda members: {"json": members["json"]}),
        [r"t-000001\.tar: sample 1 \(p5\): a caption without a picture"],
    ),
    "zero bytes": (
        lambda out: replace_sample(out, lambda members: {**members, "png": b""}),
        [r"sample 1 \(p5\): a picture of 0 bytes"],
    ),
    "undecodable": (
        lambda out: replace_sample(out, lambda members: {**members, "png": members["png"][:50]}),
        [r"sample 1 \(p5\): not a readable picture"],
    ),
    "index offset": (lambda out: change_index(out, 0), [r"index\.npy: not what t-000001\.tar holds"]),
    "index size": (lambda out: change_index(out, 1), [r"index\.npy: not what t-000001\.tar holds"]),
    "index captions": (
        lambda out: change_index(out, 2),
        [r"index\.npy: not what t-000001", r"\(p5\): not 513 captions", "num_captions is not the sum"],
    ),
    "index checksum": (lambda out: change_index(out, 3), [r"index\.npy: not what t-000001\.tar holds"]),
    "lengths": (
        lambda out: change_index(out, 0, "text_lengths.npy"),
        [r"text_lengths\.npy: not what t-000001\.tar holds"],
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_verify_names_the_damage(build, tmp_path, name):
    damage, patterns = DAMAGE[name]
    out = tmp_path / "out"
    build()
    damage(out)
    problems = verify(out)
    assert len(problems) == len(patterns), problems
    for problem, pattern in zip(problems, patterns, strict=True):
        assert re.search(pattern, problem), problem
        assert "\n" not in problem
    assert all(str(out) in problem for problem in problems)


def test_verify_without_decoding(build, tmp_path):
    build()
    replace_sample(tmp_path / "out", lambda members: {**members, "png": b"none"})
    assert len(verify(tmp_path / "out")) == 1
    assert verify(tmp_path / "out", decode=False) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / MANIFEST_NAME).unlink(), "manifest.json: no such file"),
        (lambda out: (out / "index.npy").unlink(), "index.npy: no such file"),
        (lambda out: (out / "index.npy").write_bytes(b"x"), "index.npy: not an index"),
        (lambda out: np.save(out / "index.npy", np.zeros((3, 4), np.int64)), r"promises int64 \(10, 4\)"),
        (lambda out: shutil.rmtree(out), "no such directory"),
    ],
)
def test_verify_needs_manifest_and_index(build, tmp_path, damage, message):
    build()
    damage(tmp_path / "out")
    with pytest.raises(UserError, match=message):
        verify(tmp_path / "out")


def test_verify_never_fails_itself(build, tmp_path):
    """Random bytes are changed in the shards or the index: always lines, never an exception."""
    build()
    out, random_ = tmp_path / "out", random.Random(0)
    whole = contents(out)
    found = 0
    for _ in range(60):
        name = random_.choice(["t-000000.tar", "t-000001.tar", "index.npy", "text_lengths.npy"])
        data = bytearray(whole[name])
        data[random_.randrange(128 if name.endswith("npy") else 0, len(data))] ^= 1 << random_.randrange(8)
        (out / name).write_bytes(data)
        found += bool(verify(out))
        (out / name).write_bytes(whole[name])
    assert found == 60
