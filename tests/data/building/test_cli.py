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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from dehvf_ds.data.building import cli
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.members import IMAGE_MEMBERS

SCRIPT = Path(__file__).parents[3] / "tools" / "build_shards.py"
FLICKR = SCRIPT.parents[1].parent / "shared" / "data" / "flickr8k"


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@dataclass
class Row:
    key: str
    image: Image.Image | None
    record: dict


def read_all(index):
    for number in range(len(index)):
        members = index.read(number)
        picture = next((members[name] for name in IMAGE_MEMBERS if name in members), None)
        image = None if picture is None else Image.open(io.BytesIO(picture))
        yield Row(members["__key__"], image, json.loads(members["json"]))


def picture(path, colour=(9, 9, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), colour).save(path)
    return path


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def coco(tmp_path):
    for i in (1, 2, 3):
        picture(tmp_path / "images" / f"COCO_{i}.jpg", (i, i, i))
    return write_json(
        tmp_path / "captions.json",
        {
            "images": [{"id": i, "file_name": f"COCO_{i}.jpg"} for i in (2, 1)],
            "annotations": [
                {"id": 7, "image_id": 1, "caption": " One é.\n"},
                {"id": 8, "image_id": 2, "caption": "Two."},
                {"id": 9, "image_id": 1, "caption": "Uno."},
                {"id": 10, "image_id": 2, "caption": " "},
            ],
        },
    )


def test_coco(run, coco, tmp_path):
    arguments = ["coco", "--annotations", coco, "--images", tmp_path / "images"]
    code, out, err = run(
        *arguments, "--output", tmp_path / "out", "--samples-per-shard", 1, "--name", "train"
    )
    assert code == 0, err
    assert "2 samples, 3 captions, 2 pictures, 2 shards" in out
    assert err == "note: 1 times: empty caption beside others left out\n"
    index = ShardIndex(tmp_path / "out")
    samples = list(read_all(index))
    assert [s.key for s in samples] == ["COCO_2", "COCO_1"]
    assert samples[1].record == {"image_id": 1, "file_name": "COCO_1.jpg", "captions": ["One é.", "Uno."]}
    assert index.captions.tolist() == [1, 2]
    assert index.read(0)["jpg"] == (tmp_path / "images" / "COCO_2.jpg").read_bytes()
    assert index.locate(0)[0] == "train-000000.tar"
    assert index.manifest["builder"]["annotations"]["name"] == "captions.json"
    assert str(tmp_path) not in json.dumps(index.manifest)
    assert index.manifest["builder"]["samples_per_shard"] == 1


def test_same_input_same_bytes(run, coco, tmp_path):
    for name in ("a", "b"):
        assert (
            run("coco", "--annotations", coco, "--images", tmp_path / "images", "--output", tmp_path / name)[
                0
            ]
            == 0
        )
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.fixture
def karpathy(tmp_path):
    picture(tmp_path / "images" / "val2014" / "a.jpg")
    picture(tmp_path / "images" / "b.b.jpg")
    picture(tmp_path / "images" / "c.jpeg")

    def image(name, split, number, **more):
        sentences = [{"raw": f"{name} {k}", "tokens": []} for k in range(2)]
        return {"filename": name, "split": split, "imgid": number, "sentences": sentences, **more}

    images = [
        image("a.jpg", "train", 0, filepath="val2014", cocoid=77),
        image("b.b.jpg", "restval", 1),
        image("c.jpeg", "test", 2),
    ]
    return write_json(tmp_path / "dataset_coco.json", {"dataset": "coco", "images": images})


@pytest.mark.parametrize(
    ("split", "keys", "ids"),
    [("train", ["a"], [77]), ("train+restval", ["a", "b_b"], [77, 1]), ("test", ["c"], [2])],
)
def test_karpathy(run, karpathy, tmp_path, split, keys, ids):
    arguments = ["karpathy", "--dataset", karpathy, "--images", tmp_path / "images", "--split", split]
    code, _, err = run(*arguments, "--output", tmp_path / "out")
    assert code == 0, err
    samples = list(read_all(ShardIndex(tmp_path / "out")))
    assert [s.key for s in samples] == keys
    assert [s.record["image_id"] for s in samples] == ids
    assert all(s.image is not None and len(s.record["captions"]) == 2 for s in samples)


def test_csv(run, tmp_path):
    for name in ("a.b.jpg", "a_b.png"):
        picture(tmp_path / "images" / name)
    table = tmp_path / "captions.txt"
    table.write_text('image,caption\na.b.jpg,"A dog, running ."\na_b.png,A cat .\na.b.jpg,Dog .\n')
    code, _, err = run(
        "csv", "--captions", table, "--images", tmp_path / "images", "--output", tmp_path / "out"
    )
    assert code == 0, err
    samples = list(read_all(ShardIndex(tmp_path / "out")))
    assert [(s.key, s.record["captions"]) for s in samples] == [
        ("a_b", ["A dog, running .", "Dog ."]),
        ("a_b-2", ["A cat ."]),
    ]


@pytest.fixture
def scienceqa(tmp_path):
    base = {"question": "?", "choices": ["x", "y"], "answer": 0, "hint": "", "split": "test"}
    base |= {"grade": "grade2", "subject": "social science"}
    problems = {"3": {**base, "image": "image.png"}, "12": {**base, "image": None}}
    write_json(tmp_path / "problems.json", problems)
    write_json(tmp_path / "pid_splits.json", {"test": ["12", "3"], "minitest": ["3", "4"]})
    return tmp_path


def test_scienceqa(run, scienceqa, tmp_path):
    picture(scienceqa / "images" / "test" / "3" / "image.png")
    code, out, err = run("scienceqa", "--root", scienceqa, "--split", "test", "--output", tmp_path / "out")
    assert (code, err) == (0, "")
    samples = list(read_all(ShardIndex(tmp_path / "out")))
    assert [(s.key, s.record["pid"], s.image is None) for s in samples] == [
        ("000012", "12", True),
        ("000003", "3", False),
    ]
    assert "2 samples, 0 captions, 1 pictures" in out


def test_scienceqa_without_pictures(run, scienceqa, tmp_path):
    arguments = ["scienceqa", "--root", scienceqa, "--split", "test", "--output", tmp_path / "out"]
    code, _, err = run(*arguments)
    assert code == 2
    assert err.startswith(f"error: {scienceqa / 'images/test/3/image.png'}: no such picture of 1")
    code, _, err = run(*arguments, "--allow-missing-images")
    assert code == 0
    assert "1 of 1 pictures are missing" in err
    samples = list(read_all(ShardIndex(tmp_path / "out")))
    assert samples[1].record["image_missing"] is True
    assert samples[1].image is None


def one_line_error(result, *parts):
    code, _, err = result
    err = "".join(line for line in err.splitlines(keepends=True) if not line.startswith("note: "))
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


def test_mistakes_are_one_line(run, coco, karpathy, scienceqa, tmp_path):
    images, out = tmp_path / "images", ["--output", tmp_path / "out"]
    coco_with = ["coco", "--images", images, *out, "--annotations"]
    csv_with = ["csv", "--images", images, *out, "--captions"]

    one_line_error(run(*coco_with, tmp_path / "no.json"), "no.json: no such file")
    one_line_error(
        run(*coco_with, karpathy), "not COCO captions: needs an object with images and annotations"
    )
    one_line_error(run(*coco_with, write_json(tmp_path / "l.json", [])), "not COCO captions")
    (tmp_path / "bad.json").write_text("{")
    one_line_error(run(*coco_with, tmp_path / "bad.json"), "bad.json: not JSON")
    stray = {"images": [], "annotations": [{"id": 4, "image_id": 5, "caption": "x"}]}
    one_line_error(run(*coco_with, write_json(tmp_path / "s.json", stray)), "unknown image_id")
    shape = {"images": [{"id": 1}], "annotations": []}
    one_line_error(
        run(*coco_with, write_json(tmp_path / "f.json", shape)), "an entry lacks a field", "file_name"
    )

    one_line_error(
        run("karpathy", "--dataset", karpathy, "--images", images, "--split", "train+dev", *out),
        "has no split 'dev'; it has restval (1), test (1), train (1)",
    )
    one_line_error(run("scienceqa", "--root", scienceqa, "--split", "dev", *out), "it has test, minitest")
    one_line_error(
        run("scienceqa", "--root", scienceqa, "--split", "minitest", *out), "problem 4: it is not there"
    )

    table = tmp_path / "t.csv"
    table.write_text("file,label\n")
    one_line_error(run(*csv_with, table), "its first line is 'file,label', not a header with")
    table.write_text("image,caption\na.jpg,one, two\n")
    one_line_error(run(*csv_with, table), "line 2: 3 fields, not 2")
    table.write_text("image,caption\nx.jpg,one\ny.jpg,two\nz.jpg,three\n")
    one_line_error(run(*csv_with, table), "x.jpg: no such picture (and 2 others) of 3")
    (images / "x.heic").write_bytes(b"x")
    table.write_text("image,caption\nx.heic,one\n")
    one_line_error(run(*csv_with, table), "x.heic", "convert it", "--skip-bad")
    table.write_text("image,caption\n")
    one_line_error(run(*csv_with, table), "no sample to write")

    arguments = ["coco", "--annotations", coco, "--images", images]
    one_line_error(run(*arguments, "--output", images), "not empty; give another --output")
    one_line_error(run(*arguments, *out, "--samples-per-shard", 0), "must be at least 1")
    one_line_error(run(*arguments, "--output", coco), str(coco))
    one_line_error(run(*arguments), "required: --output")
    one_line_error(run(*arguments, *out, "--samples-per-shard", "x"), "invalid int value")
    one_line_error(run(*arguments, *out, "--bytes-per-shard", "5Q"), "'5Q' is no size; write 500M")
    one_line_error(
        run(*arguments, *out, "--bytes-per-shard", "1G", "--samples-per-shard", "9"), "not allowed with"
    )
    one_line_error(run(*arguments, *out, "--num-workers", "0"), "--num-workers 0: must be at least 1")
    one_line_error(run(*arguments, *out, "--name", "a/b"), "--name 'a/b'")
    one_line_error(run(*arguments, *out, "--shorter-side", "0"), "--shorter-side 0: must be at least 1")
    one_line_error(run("coca"), "invalid choice: 'coca'")
    one_line_error(run("verify", tmp_path), "manifest.json: no such file")
    one_line_error(run("index", tmp_path), "holds no *.tar")


def test_llava(run, tmp_path):
    picture(tmp_path / "images" / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    talk = [{**turns[0], "value": "What?"}, turns[1]]
    rows = [{"id": "x", "image": "a.png", "conversations": turns}, {"id": "x", "conversations": talk * 2}]
    chats = ["llava", "--json", write_json(tmp_path / "c.json", rows), "--images", tmp_path / "images"]
    code, out, err = run(*chats, "--output", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "2 samples, 0 captions, 1 pictures, 1 shards" in out
    samples = list(read_all(ShardIndex(tmp_path / "out")))
    assert [(s.key, s.image is None, s.record) for s in samples] == [
        ("x", False, rows[0]),
        ("x-2", True, rows[1]),
    ]
    rows[1]["id"] = "lonely"
    del rows[1]["conversations"]
    write_json(tmp_path / "c.json", rows)
    one_line_error(run(*chats, "--output", tmp_path / "new"), "row 2: id 'lonely': has no conversations")


def test_the_same_call_again(run, coco, tmp_path):
    arguments = ["coco", "--annotations", coco, "--images", tmp_path / "images", "--output", tmp_path / "out"]
    assert run(*arguments)[0] == 0
    code, out, _ = run(*arguments)
    assert code == 0
    assert "out: complete already: 2 samples, 3 captions" in out
    one_line_error(run(*arguments, "--bytes-per-shard", "1.5K"), "bytes_per_shard (None there, 1500 now)")
    content = json.loads(coco.read_text())
    content["annotations"][0]["caption"] = "Another."
    write_json(coco, content)
    one_line_error(run(*arguments), "annotations (captions.json ", "give another --output")


def test_index_and_verify(run, coco, tmp_path):
    out = tmp_path / "out"
    arguments = ["coco", "--annotations", coco, "--images", tmp_path / "images"]
    assert run(*arguments, "--output", out, "--samples-per-shard", "1")[0] == 0
    code, text, err = run("verify", out)
    assert (code, text, err) == (0, f"{out}: 2 shards, 2 samples, all as the manifest says\n", "")
    (out / "coco-000001.tar").unlink()
    code, text, err = run("verify", out, "--no-decode", "--num-workers", "1")
    assert code == 2
    assert text == f"{out / 'coco-000001.tar'}: no such shard; copy it again\n"
    assert err == f"error: {out}: 2 shards, 2 samples: 1 of them damaged\n"
    one_line_error(run("index", out), "--overwrite")
    code, text, _ = run("index", out, "--overwrite")
    assert (code, "1 samples, 1 captions, 1 pictures, 1 shards" in text) == (0, True)
    assert run("verify", out)[0] == 0


def test_verify_says_twenty_lines(run, coco, tmp_path, monkeypatch):
    lines = [f"{i}: \udcff\nbroken" for i in range(25)]
    monkeypatch.setattr(cli, "verify_shards", lambda *_, **__: ({"shards": [], "num_samples": 0}, lines))
    code, text, _ = run("verify", tmp_path)
    assert code == 2
    assert text.splitlines()[19:] == ["19: \\udcff broken", "and 5 others"]


@pytest.fixture
def many(tmp_path):
    """Pictures and a table of 240 rows: enough for a build to be interrupted."""
    names = [f"{i:03d}.jpg" for i in range(240)]
    (tmp_path / "images").mkdir()
    for i, name in enumerate(names):
        Image.effect_noise((300, 200), 50 + i % 7).convert("RGB").save(tmp_path / "images" / name, quality=95)
    lines = "\n".join(f"{name},Text {name}" for name in names)
    (tmp_path / "captions.csv").write_text(f"image,caption\n{lines}\n")
    table = ["--captions", tmp_path / "captions.csv", "--images", tmp_path / "images"]
    return ["csv", *table, "--samples-per-shard", "2", "--shorter-side", "150"]


def start(arguments, **options):
    command = [sys.executable, SCRIPT, *arguments, "--num-workers", "2"]
    pipe = subprocess.PIPE
    return subprocess.Popen([str(part) for part in command], stdout=pipe, stderr=pipe, text=True, **options)


def wait_for_shards(directory, count):
    end = time.monotonic() + 60
    while len(found := list(directory.glob("*.tar"))) < count:
        assert time.monotonic() < end
        time.sleep(0.002)
    return found


def processes_of(word):
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if word in path.read_bytes().decode(errors="replace"):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_build_goes_on(run, many, tmp_path, number, monkeypatch):
    out, mark = tmp_path / "out", f"mark-{tmp_path.name}"
    # On a busy machine a build may end before its signal comes: once more then.
    for _ in range(5):
        shutil.rmtree(out, ignore_errors=True)
        monkeypatch.setenv("BUILD_MARK", mark)
        # What runs in a shell's background is told to ignore interrupts; this build is to heed them.
        heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        with start([*many, "--output", out], start_new_session=True, preexec_fn=heeded) as process:
            monkeypatch.delenv("BUILD_MARK")
            wait_for_shards(out, 6)
            if number == signal.SIGINT:
                # As a terminal does: every process of the group gets it.
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            _, err = process.communicate(timeout=30)
        if process.returncode != 0:
            break
    if number == signal.SIGINT:
        assert (process.returncode, err) == (130, "interrupted; the same call again goes on\n")
        assert not list(out.glob(".*.part"))
    end = time.monotonic() + 20
    while processes_of(mark):
        assert time.monotonic() < end, "a process outlived the build"
        time.sleep(0.05)
    finished = {path: path.stat() for path in out.glob("*.tar")}
    assert 6 <= len(finished) < 120
    assert not (out / "manifest.json").exists()
    code, text, err = run(*many, "--output", out, "--num-workers", "1")
    assert (code, err) == (0, "")
    assert "240 samples, 240 captions, 240 pictures, 120 shards" in text
    for path, stat in finished.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    assert run(*many, "--output", tmp_path / "whole", "--num-workers", "1")[0] == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_a_full_disk_is_one_line(many, tmp_path):
    """A limit on the size of files stands in for the disk."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    out = tmp_path / "out"
    with start([*many, "--output", out], preexec_fn=limit) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.count("\n") == 1
    assert err.startswith(f"error: {out / 'csv-000000.tar'}: File too large; make room and call again")
    assert [path.name for path in out.iterdir()] == [".build.json"]


@pytest.mark.skipif(not FLICKR.is_dir(), reason=f"real photographs are not at {FLICKR}")
def test_real_photographs(run, tmp_path):
    dataset = FLICKR / "dataset_flickr8k.json"
    code, out, err = run(
        *["karpathy", "--dataset", dataset, "--images", FLICKR / "Images", "--split", "val"],
        *["--output", tmp_path / "out", "--samples-per-shard", 32],
    )
    assert code == 0, err
    assert "70 samples, 350 captions, 70 pictures, 3 shards" in out
    samples = list(read_all(ShardIndex(tmp_path / "out")))
    assert len(samples) == 70
    assert all(s.image is not None and min(s.image.size) > 60 for s in samples)


def test_plain_lines_without_a_terminal(run, coco, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "LINE_EVERY_S", 0.0)
    arguments = ["coco", "--annotations", coco, "--images", tmp_path / "images", "--output", tmp_path / "out"]
    code, _, err = run(*arguments)
    assert code == 0
    assert "Writing shards: 2 of 2 samples, " in err
    assert "a second, 0 minutes left\n" in err


def test_a_bar_on_a_terminal(run, coco, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    arguments = ["coco", "--annotations", coco, "--images", tmp_path / "images", "--output", tmp_path / "out"]
    code, _, err = run(*arguments)
    assert code == 0
    assert "Writing shards" in err
    assert "2/2" in err
