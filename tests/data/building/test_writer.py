"""The same bytes whatever the processes; builds that go on, and those that must not."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dehvf_ds.config import UserError
from dehvf_ds.data.building import directory
from dehvf_ds.data.building.directory import PLAN_NAME, alone_in, run_tasks
from dehvf_ds.data.building.scan import BadRows
from dehvf_ds.data.building.sources import SourceRow
from dehvf_ds.data.building.writer import BuildSettings, plan_shards
from dehvf_ds.data.index import MANIFEST_NAME, ShardIndex

SCRIPT = Path(__file__).parents[3] / "tools" / "build_shards.py"


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def written(path):
    return path.stat().st_ino, path.stat().st_mtime_ns


def unfinish(out):
    """As a kill leaves a directory: shards, and the plan instead of the manifest."""
    builder = json.loads((out / MANIFEST_NAME).read_text())["builder"]
    facts = {name: value for name, value in builder.items() if not name.startswith("left_out")}
    (out / MANIFEST_NAME).unlink()
    (out / PLAN_NAME).write_text(json.dumps(facts))


@pytest.fixture
def built(run, table, tmp_path):
    """A finished build in ``out``, and the call that made it."""
    call = [*table, "--output", tmp_path / "out"]
    assert run(*call)[0] == 0
    return call


def test_equal_names_get_numbers():
    names = ["a b", "a.b", "a_b", "a_b-2", "", "é" * 100, "a b"]
    rows = [SourceRow(name, None, {}) for name in [*names, *["same"] * 20_000]]
    keys = [row.key for shard in plan_shards(rows, BuildSettings(), BadRows(skip=False)) for row in shard]
    assert keys[:7] == ["a_b", "a_b-2", "a_b-3", "a_b-2-2", "sample", "_" * 80, "a_b-4"]
    assert len(set(keys)) == len(keys)


def test_pictures_are_made_smaller_but_never_larger(run, tmp_path):
    sizes = [(100, 60), (24, 500), (10, 12), (24, 24)]
    for number, size in enumerate(sizes):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    turned = Image.new("RGB", (120, 80))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "4.JPEG", exif=exif, comment=b"c" * 60_000)
    Image.new("RGBA", (80, 80), (0, 0, 0, 0)).save(tmp_path / "5.webp", lossless=True)
    names = [*(f"{number}.png" for number in range(4)), "4.JPEG", "5.webp"]
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{name},x\n" for name in names))
    arguments = ["csv", "--captions", tmp_path / "t.csv", "--images", tmp_path, "--shorter-side", 24]
    assert run(*arguments, "--output", tmp_path / "out")[0] == 0
    members = [ShardIndex(tmp_path / "out").read(row) for row in range(len(names))]
    for row in (1, 2, 3):
        assert members[row]["png"] == (tmp_path / names[row]).read_bytes()
    decoded = [Image.open(io.BytesIO(m.get("jpg") or m["png"])) for m in members]
    assert [image.size for image in decoded] == [(40, 24), *sizes[1:], (24, 36), (24, 24)]
    assert not decoded[4].getexif()
    assert len(members[4]["jpg"]) < 5000
    assert np.asarray(decoded[5].convert("RGB")).min() > 250


def test_finished_shards_are_kept_and_others_built_again(run, table, tmp_path):
    out = tmp_path / "out"
    # Two shards of equal sizes, with a bad picture each.
    rows = "".join(f"{name}.jpg,Text {name[:1]}.\n" for name in ("a", "cut", "b", "c", "empty", "d"))
    (tmp_path / "t.csv").write_text(f"image,caption\n{rows}")
    call = [*table, "--skip-bad", "--output", out]
    assert run(*call)[0] == 0
    shutil.copytree(out, tmp_path / "whole")
    damage = [
        (lambda: None, ""),
        (lambda: (out / "csv-000001.tar").unlink(), ""),
        (lambda: (out / "csv-000001.tar").write_bytes(b"x" * 9000), "not a whole, uncompressed tar"),
        (lambda: shutil.copy(out / "csv-000000.tar", out / "csv-000001.tar"), "not the planned ones"),
        (lambda: os.utime(out / "csv-000001.tar", (0, 0)), "a picture is newer"),
    ]
    for change, reason in damage:
        unfinish(out)
        (out / ".csv-000001.tar.part").write_bytes(b"half")
        change()
        kept, other = written(out / "csv-000000.tar"), out / "csv-000001.tar"
        same = reason == "" and other.exists() and written(other)
        code, _, err = run(*call)
        assert code == 0
        assert reason in err
        assert err.count("built again") == bool(reason)
        assert "left out 2 of 6: 2 undecodable" in err
        assert written(out / "csv-000000.tar") == kept
        assert not same or written(other) == same
        assert contents(out) == contents(tmp_path / "whole")


def test_other_arguments_and_directories_are_refused(run, built, table, tmp_path):
    for finished in (True, False):
        if not finished:
            unfinish(tmp_path / "out")
        before = contents(tmp_path / "out")
        for other, message in (
            (["--samples-per-shard", 5], "samples_per_shard (3 there, 5 now)"),
            (["--no-decode", "--skip-bad"], "skip_bad (False there, True now)"),
        ):
            code, _, err = run(*built, *other)
            assert code == 2
            assert message in err
            assert contents(tmp_path / "out") == before
    (tmp_path / "t.csv").write_text((tmp_path / "t.csv").read_text().replace("Text a", "Text x"))
    assert "captions (t.csv " in run(*built)[2]
    assert "not empty; give another --output" in run(*table, "--output", tmp_path / "images")[2]
    missing = run(*table, "--images", "nowhere", "--output", tmp_path / "new")[2]
    assert "a.jpg: no such picture (4 of 4 are missing); look at --images" in missing
    with alone_in(tmp_path / "out"):
        assert "another call is writing here" in run(*built)[2]


def replaced(images, encoded, *, old=False, kind="JPEG"):
    """Another picture in place of d.jpg, as a JPEG of the same size in bytes."""
    (images / "part").write_bytes(encoded((0, 200, 0), kind).ljust(1000, b"\0"))
    if old:
        os.utime(images / "part", (0, 0))
    (images / "part").rename(images / "d.jpg")


@pytest.mark.parametrize("smaller", [[], ["--shorter-side", 4]])
@pytest.mark.parametrize("how", [{"kind": "BMP"}, {"old": False}, {"old": True}], ids=str)
def test_complete_already_knows_that_pictures_changed(run, table, tmp_path, images, encoded, how, smaller):
    call = [*table, "--output", tmp_path / "out", *smaller]
    assert run(*call)[0] == 0
    before = contents(tmp_path / "out")
    for path in images.iterdir():
        path.touch()
    assert "complete already: 4 samples" in run(*call)[1]
    replaced(images, encoded, **how)
    code, _, err = run(*call)
    assert (code, err.count("\n")) == (2, 1)
    assert "holds shards of other pictures: of csv-000001.tar" in err
    assert contents(tmp_path / "out") == before


def test_complete_already_where_pictures_were_added_or_are_gone(run, table, tmp_path, images):
    call = [*table, "--output", tmp_path / "out", "--skip-bad"]
    (images / "d.jpg").rename(tmp_path / "late.jpg")
    assert run(*call)[0] == 0
    (tmp_path / "late.jpg").rename(images / "d.jpg")
    assert "holds shards of other pictures" in run(*call)[2]
    (images / "d.jpg").unlink()
    assert "complete already" in run(*call)[1]
    # A folder that replaces another may have older times; then the sizes differ.
    (images / "a.jpg").write_bytes((images / "a.jpg").read_bytes() + bytes(1000))
    for path in (tmp_path / "out").glob("*.tar"):
        os.utime(path, (2**32, 2**32))
    before = contents(tmp_path / "out")
    assert "holds shards of other pictures" in run(*call)[2]
    shutil.rmtree(images)
    (tmp_path / "out" / PLAN_NAME).write_text("left by a kill after the manifest")
    _, out, err = run(*call)
    assert "complete already" in out
    assert "no longer there; they were not compared" in err
    assert contents(tmp_path / "out") == before


def double(task):
    if task in ("bad", "worse"):
        raise UserError(f"it is {task}")
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * task


def test_tasks_of_several_processes(capsys, monkeypatch):
    monkeypatch.setattr(directory, "LINE_EVERY_S", 0.0)
    run = partial(run_tasks, double, title="Doubling")
    assert run(range(20), num_workers=3) == list(range(0, 40, 2))
    assert "Doubling: 100%" in capsys.readouterr().err
    assert run([], num_workers=3) == []
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"^it is bad$"):
            run([1, 2, "bad", "worse", 3], num_workers=workers)
    with pytest.raises(UserError, match="a worker process was killed"):
        run([1, "die", 2, 3], num_workers=2)


@pytest.fixture
def many(tmp_path):
    """A build of 240 rows that takes long enough to be interrupted."""
    names = [f"{i:03d}.jpg" for i in range(240)]
    (tmp_path / "many").mkdir()
    for i, name in enumerate(names):
        Image.effect_noise((300, 200), 50 + i % 7).convert("RGB").save(tmp_path / "many" / name, quality=95)
    (tmp_path / "m.csv").write_text("image,caption\n" + "".join(f"{name},Text {name}\n" for name in names))
    table = ["csv", "--captions", tmp_path / "m.csv", "--images", tmp_path / "many"]
    return [*table, "--samples-per-shard", 2, "--shorter-side", 150]


def start(arguments, **options):
    command = map(str, [sys.executable, SCRIPT, *arguments, "--num-workers", 2])
    pipe = subprocess.PIPE
    return subprocess.Popen(list(command), stdout=pipe, stderr=pipe, text=True, **options)


def processes_of(word):
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            found += [path] if word.encode() in path.read_bytes() else []
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_build_goes_on(run, many, tmp_path, number, monkeypatch):
    out, mark = tmp_path / "out", f"mark-{tmp_path.name}"
    monkeypatch.setenv("BUILD_MARK", mark)
    # A shell's background jobs ignore interrupts; this build must not.
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with start([*many, "--output", out], start_new_session=True, preexec_fn=heeded) as process:
        monkeypatch.delenv("BUILD_MARK")
        end = time.monotonic() + 60
        while len(list(out.glob("*.tar"))) < 6:
            assert time.monotonic() < end
            time.sleep(0.002)
        # As a terminal does: every process of the group gets an interrupt.
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        _, err = process.communicate(timeout=30)
    if number == signal.SIGINT:
        assert (process.returncode, err) == (130, "interrupted; the same call again continues\n")
        assert not list(out.glob(".*.part"))
    end = time.monotonic() + 20
    while processes_of(mark):
        assert time.monotonic() < end, "a process outlived the build"
        time.sleep(0.05)
    finished = {path: written(path) for path in out.glob("*.tar")}
    assert 6 <= len(finished) < 120
    assert not (out / MANIFEST_NAME).exists()
    code, text, err = run(*many, "--output", out, "--num-workers", 2)
    assert (code, err) == (0, "")
    assert "240 samples, 240 captions, 240 pictures, 120 shards" in text
    assert {path: written(path) for path in finished} == finished
    # By one process: the same bytes.
    assert run(*many, "--output", tmp_path / "whole")[0] == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_a_full_disk_is_one_line_with_a_remedy(many, tmp_path):
    """A limit on the size of files has the effect of a full disk."""
    out = tmp_path / "out"
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, 20_000))
    with start([*many, "--output", out], preexec_fn=limit) as process:
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err.count("\n")) == (2, 1)
    assert (
        f"{out}: [Errno 27] File too large; free space there and call again: what is finished is kept" in err
    )
    assert "or give another --output" in err
    assert [path.name for path in out.iterdir()] == [PLAN_NAME]
