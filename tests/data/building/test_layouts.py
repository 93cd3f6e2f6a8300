"""Whole builds of layouts as people have them: what is bad in them is refused, or left out and counted."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile

import pytest
from PIL import Image
from webdataset import ShardWriter

from dehvf_ds.data.building import cli
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.members import IMAGE_MEMBERS, picture_name
from dehvf_ds.data.records import parse_record
from dehvf_ds.data.samples import read_sample

ENDINGS = ["jpg", "JPEG", "png", "webp", "gif", "bmp", "tif", "tiff", "jp2", "ppm"]
FORMATS = {"jpg": "JPEG", "JPEG": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = cli.main([*(str(argument) for argument in arguments), "--num-workers", "1"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def encoded(colour=(9, 9, 9), kind="JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, kind)
    return file.getvalue()


@pytest.fixture
def images(tmp_path):
    """Good pictures, one cut off, one empty, one of an unknown kind."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_bytes(encoded((len(name), ord(name[0]), 0)))
    (folder / "cut.jpg").write_bytes(encoded()[:200])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "odd.heic").write_bytes(b"x")
    return folder


NAN = float("nan")
CAPTIONS = {
    "a.jpg": ["A."],
    "gone.jpg": ["A."],
    "cut.jpg": ["A."],
    "empty.jpg": ["A."],
    "odd.heic": ["A."],
    "none.jpg": [],
    "blank.jpg": [" "],
    "null.jpg": [None],
    "nan.jpg": [NAN],
    "half.jpg": ["half \ud83d"],
    "../up.jpg": ["A."],
    "b.jpg": ["B.", ""],
}
REASONS = {
    "without a picture": 1,
    "undecodable": 3,
    "without a caption": 4,
    "of damaged text": 1,
    "with an unusable name": 1,
}


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


def coco(tmp_path, images):
    names = list(CAPTIONS)
    annotations = [{"image_id": names.index(n), "caption": c} for n, texts in CAPTIONS.items() for c in texts]
    content = {"images": [{"id": i, "file_name": n} for i, n in enumerate(names)], "annotations": annotations}
    path = write_json(tmp_path / "captions.json", content)
    return ["coco", "--annotations", path, "--images", images], REASONS


def karpathy(tmp_path, images):
    entries = [
        {"filename": n, "imgid": i, "split": "train", "sentences": [{"raw": c} for c in texts]}
        for i, (n, texts) in enumerate(CAPTIONS.items())
    ]
    entries.insert(3, {"filename": "a.jpg", "split": "train", "sentences": [{"raw": "no id"}]})
    path = write_json(tmp_path / "dataset.json", {"images": entries})
    reasons = {**REASONS, "with an unreadable record": 1}
    return ["karpathy", "--dataset", path, "--images", images, "--split", "train"], reasons


def csv(tmp_path, images):
    lines = [
        f"{n},{'' if c is None else c}"
        for n, texts in CAPTIONS.items()
        for c in texts
        if "\ud83d" not in str(c)
    ]
    lines.insert(2, "")
    path = tmp_path / "captions.csv"
    path.write_text("image,caption\n" + "\n".join(lines) + "\n")
    reasons = {**REASONS, "without a caption": 3}
    del reasons["of damaged text"]
    return ["csv", "--captions", path, "--images", images], reasons


def talk(answer="A dog.", question="<image>\nWhat?"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def llava(tmp_path, images):
    rows = [
        {"id": "a", "image": "a.jpg", "conversations": talk()},
        {"id": "gone", "image": "gone.jpg", "conversations": talk()},
        {"id": "cut", "image": "cut.jpg", "conversations": talk()},
        {"id": "two", "image": ["a.jpg", "b.jpg"], "conversations": talk()},
        {"id": "images", "images": ["a.jpg", "b.jpg"], "conversations": talk()},
        {"id": "blind", "conversations": talk()},
        {"id": "mute", "image": "a.jpg", "conversations": talk("")},
        {"id": "unasked", "image": "a.jpg", "conversations": talk(question=" ")},
        {"id": "null", "image": "a.jpg", "conversations": talk(None)},
        {"id": "half", "image": "a.jpg", "conversations": talk("\ud83d")},
        {"id": "none", "image": "a.jpg"},
        "not a row",
        {"id": "b", "image": "b.jpg", "conversations": [{"from": "GPT", "value": "Hi."}, *talk()]},
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n{\n")
    reasons = {"without a picture": 2, "undecodable": 1, "with several pictures": 2, "without a caption": 1}
    reasons |= {"with an unusable conversation": 3, "of damaged text": 1, "with an unreadable record": 2}
    return ["llava", "--json", path, "--images", images], reasons


def scienceqa(tmp_path, images):
    good = {
        "question": "?",
        "choices": ["x", "y"],
        "answer": 0,
        "hint": "",
        "grade": "grade2",
        "split": "train",
    }
    good |= {"subject": "social science", "image": None}
    problems = {
        "a": good | {"image": "image.png"},
        "gone": good | {"image": "gone.png"},
        "beyond": good | {"answer": 2},
        "nan": good | {"choices": ["x", NAN]},
        "text": good | {"answer": "A"},
        "null": good | {"question": None},
        "half": good | {"hint": "\ud83d"},
        "b": good,
    }
    (images / "train" / "a").mkdir(parents=True)
    (images / "train" / "a" / "image.png").write_bytes(encoded(kind="PNG"))
    write_json(tmp_path / "problems.json", problems)
    write_json(tmp_path / "pid_splits.json", {"train": [*problems, "absent"]})
    reasons = {"without a picture": 1, "with an unusable problem": 4, "of damaged text": 1}
    return ["scienceqa", "--root", tmp_path, "--split", "train"], {**reasons, "with an unreadable record": 1}


LAYOUTS = [coco, karpathy, csv, llava, scienceqa]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_skip_bad_leaves_out_every_kind_and_counts_it(run, tmp_path, images, layout):
    arguments, reasons = layout(tmp_path, images)
    code, out, err = run(*arguments, "--output", tmp_path / "out", "--skip-bad")
    assert code == 0, err
    index = ShardIndex(tmp_path / "out")
    assert [index.read(i)["__key__"] for i in range(len(index))] == ["a", "b"]
    left_out = sum(reasons.values())
    builder = index.manifest["builder"]
    assert builder["left_out_reasons"] == reasons
    assert builder["left_out"] == left_out == len(builder["left_out_first"])
    assert str(tmp_path) not in json.dumps(index.manifest)
    assert f"note: left out {left_out} of {left_out + 2}: " in err
    for reason, count in reasons.items():
        assert f"{count} {reason}" in err
    assert run("verify", tmp_path / "out")[0] == 0
    # Training reads the picture of the source, and the record that evaluation reads.
    for row, path in enumerate([images / "train/a/image.png", None] if layout is scienceqa else ["a", "b"]):
        source = images / f"{path}.jpg" if isinstance(path, str) else path
        members, sample = index.read(row), read_sample(index, row)
        name = picture_name(members)
        assert (None if name is None else members[name]) == (None if source is None else source.read_bytes())
        assert sample.record == parse_record(members)
        assert sample.record == json.loads(members["json"])
        if source is None:
            assert sample.image is None
        else:
            assert sample.image.tobytes() == Image.open(source).convert("RGB").tobytes()
    # The same call again knows that nothing changed.
    code, out, _ = run(*arguments, "--output", tmp_path / "out", "--skip-bad")
    assert (code, "complete already" in out) == (0, True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_it_the_first_is_one_line(run, tmp_path, images, layout):
    arguments, _ = layout(tmp_path, images)
    code, _, err = run(*arguments, "--output", tmp_path / "out")
    errors = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert code == 2
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {tmp_path}")
    assert "--skip-bad" in errors[0]
    assert not list((tmp_path / "out").glob("*.tar"))


def test_a_dropped_turn_is_told(run, tmp_path, images):
    arguments, _ = llava(tmp_path, images)
    _, _, err = run(*arguments, "--output", tmp_path / "out", "--skip-bad")
    assert "note: 1 times: turn of the assistant before a question dropped" in err


def test_undecodable_pictures_are_found_by_default(run, tmp_path, images):
    (tmp_path / "t.csv").write_text("image,caption\na.jpg,A.\ncut.jpg,B.\n")
    arguments = ["csv", "--captions", tmp_path / "t.csv", "--images", images, "--output"]
    code, _, err = run(*arguments, tmp_path / "out")
    assert code == 2
    assert "cut.jpg: not a readable picture" in err
    assert "--skip-bad" in err
    assert run(*arguments, tmp_path / "unseen", "--no-decode")[0] == 0
    assert run("verify", tmp_path / "unseen")[0] == 2


@pytest.mark.parametrize("ending", ENDINGS)
def test_kinds_of_pictures_are_built_and_read(run, tmp_path, ending):
    kind = FORMATS.get(ending, ending.upper())
    (tmp_path / f"p.{ending}").write_bytes(encoded(kind=kind))
    (tmp_path / "t.csv").write_text(f"image,caption\np.{ending},A.\n")
    code, _, err = run(
        "csv", "--captions", tmp_path / "t.csv", "--images", tmp_path, "--output", tmp_path / "out"
    )
    assert code == 0, err
    members = ShardIndex(tmp_path / "out").read(0)
    assert picture_name(members) in IMAGE_MEMBERS
    assert members[picture_name(members)] == (tmp_path / f"p.{ending}").read_bytes()


@pytest.fixture
def built(run, tmp_path, images):
    """A finished build, and the call that made it."""
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{n}.jpg,Text {n}.\n" for n in "abcd"))
    for name in "cd":
        (images / f"{name}.jpg").write_bytes(encoded((ord(name), 0, 0)).ljust(1000, b"\0"))
    arguments = ["csv", "--captions", tmp_path / "t.csv", "--images", images, "--output", tmp_path / "out"]
    arguments += ["--samples-per-shard", "3"]
    assert run(*arguments)[0] == 0
    return arguments


def replaced(images, **times):
    """Another picture of the same size in bytes in place of d.jpg."""
    path = images / "d.jpg"
    other = encoded((0, 200, 0)).ljust(1000, b"\0")
    assert len(other) == path.stat().st_size
    part = images / "part"
    part.write_bytes(other)
    if times:
        os.utime(part, (0, 0))
    part.rename(path)


CHANGES = {
    "another size": lambda images: (images / "d.jpg").write_bytes(encoded((200, 0, 9), "PNG")),
    "the same size": replaced,
    "an older file": lambda images: replaced(images, old=True),
    "the first of a shard": lambda images: (images / "a.jpg").write_bytes(encoded((7, 7, 7), "BMP")),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("smaller", [False, True])
def test_complete_already_knows_that_pictures_changed(run, built, tmp_path, images, change, smaller):
    if smaller:
        shutil.rmtree(tmp_path / "out")
        built = [*built, "--shorter-side", "4"]
        assert run(*built)[0] == 0
    assert "complete already" in run(*built)[1]
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    CHANGES[change](images)
    code, out, err = run(*built)
    assert code == 2, out
    assert "holds shards of other pictures: of csv-00000" in err
    assert err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_complete_already_where_pictures_were_only_touched(run, built, tmp_path, images):
    for path in images.iterdir():
        path.touch()
    assert "complete already" in run(*built)[1]
    shutil.rmtree(images)
    code, out, err = run(*built)
    assert (code, "complete already" in out) == (0, True)
    assert "no longer there; they were not compared" in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "csv-000000.tar",
        "csv-000001.tar",
        "index.npy",
        "manifest.json",
        "text_lengths.npy",
    ]


def test_complete_already_knows_pictures_that_came_since(run, built, tmp_path, images):
    shutil.rmtree(tmp_path / "out")
    late = (images / "b.jpg").read_bytes()
    (images / "b.jpg").unlink()
    assert run(*built, "--skip-bad")[0] == 0
    assert "complete already" in run(*built, "--skip-bad")[1]
    (images / "b.jpg").write_bytes(late)
    code, _, err = run(*built, "--skip-bad")
    assert code == 2
    assert "holds shards of other pictures" in err


@pytest.mark.parametrize(
    "change", [["--no-decode", "--skip-bad"], ["--jpeg-quality", "50", "--shorter-side", "4"]]
)
def test_complete_already_knows_other_options(run, built, change):
    code, _, err = run(*built, *change)
    assert code == 2
    assert "holds shards of other arguments" in err


def img2dataset(directory, *, failed=()):
    """What img2dataset leaves, with rows whose download failed but whose texts were kept."""
    directory.mkdir(exist_ok=True)
    for shard in range(2):
        with tarfile.open(directory / f"{shard:05d}.tar", "w") as archive:
            for number in range(3):
                key = f"{shard:05d}{number:04d}"
                record = {"url": "http://x", "caption": f"Text {key}", "key": key, "status": "success"}
                members = {"jpg": encoded((shard, number, 0))}
                if key in failed:
                    record |= {"status": "failed_to_download", "error_message": "HTTP Error 404: Not Found"}
                    members = {}
                members |= {"txt": record["caption"].encode(), "json": json.dumps(record).encode()}
                for ending, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        (directory / f"{shard:05d}_stats.json").write_text("{}")
    return directory


def test_failed_downloads_of_img2dataset(run, tmp_path):
    directory = img2dataset(tmp_path / "cc", failed=["000000001", "000010002"])
    code, _, err = run("index", directory)
    assert code == 2
    assert (
        "00000.tar: sample 000000001: a caption without a picture (its download: failed_to_download, HTTP"
        in err
    )
    assert "--skip-bad" in err
    code, out, err = run("index", directory, "--skip-bad")
    assert code == 0
    assert "4 samples, 4 captions, 4 pictures, 2 shards" in out
    assert "note: left out 2 of 6: 2 without a picture" in err
    index = ShardIndex(directory)
    assert index.manifest["builder"]["left_out_reasons"] == {"without a picture": 2}
    for row in range(4):
        members = index.read(row)
        assert parse_record(members)["captions"] == [f"Text {members['__key__']}"]
        colour = Image.open(io.BytesIO(members["jpg"])).getpixel((0, 0))
        assert abs(colour[0] - int(members["__key__"][4])) < 3
    assert run("verify", directory)[0] == 0


def test_undecodable_pictures_of_others(run, tmp_path):
    directory = img2dataset(tmp_path / "cc")
    data = (directory / "00001.tar").read_bytes()
    at = data.index(b"\xff\xd8") + 100
    (directory / "00001.tar").write_bytes(data[:at] + bytes(300) + data[at + 300 :])
    code, _, err = run("index", directory)
    assert code == 2
    assert "00001.tar: sample 000010000: not a readable picture" in err
    assert run("index", directory, "--no-decode")[0] == 0
    code, _, err = run("index", directory, "--overwrite", "--skip-bad")
    assert (code, "left out 1 of 6: 1 undecodable" in err) == (0, True)


def test_shards_that_number_their_keys_anew(run, tmp_path):
    for shard in range(3):
        with ShardWriter(f"{tmp_path}/x{shard}-%d.tar", maxcount=100, verbose=0) as writer:
            for number in range(2):
                text = f"Text {shard} {number}"
                writer.write({"__key__": f"{number:06d}", "jpg": encoded((shard, number, 0)), "txt": text})
    code, _, err = run("index", tmp_path)
    assert code == 0, err
    assert "note: the shards number their keys anew; a sample's key is SHARD/KEY" in err
    index = ShardIndex(tmp_path)
    keys = [index.read(row)["__key__"] for row in range(6)]
    assert keys == [f"x{shard}-0/{number:06d}" for shard in range(3) for number in range(2)]
    assert parse_record(index.read(4))["captions"] == ["Text 2 0"]
    assert run("verify", tmp_path)[0] == 0


def test_keys_that_are_unique_stay_as_they_are(run, tmp_path):
    directory = img2dataset(tmp_path / "cc")
    assert run("index", directory)[0] == 0
    assert ShardIndex(directory).read(5)["__key__"] == "000010002"


@pytest.mark.parametrize(
    ("move", "message"),
    [
        (
            lambda d: [p.rename(d / "train" / p.name) for p in d.glob("*.tar")],
            r"2 lie in folders below it.*index {d}/train",
        ),
        (
            lambda d: [p.rename(d / "train" / f"{p.name}.gz") for p in d.glob("*.tar")],
            r"2 lie in folders below it.*index {d}/train",
        ),
        (
            lambda d: [p.rename(f"{p}.gz") for p in d.glob("*.tar")],
            "00000.tar.gz (and 1 others) is compressed",
        ),
        (lambda d: (d / "00001.tar").rename(d / "00001.tgz"), "00001.tgz is compressed"),
        (lambda d: (d / "00000.tar").rename(d / "00000.TAR.ZST"), "00000.TAR.ZST is compressed"),
        (lambda d: [p.unlink() for p in d.glob("*.tar")], "holds no *.tar (it holds 00000_stats.json"),
    ],
)
def test_shards_in_other_places_are_named(run, tmp_path, move, message):
    directory = img2dataset(tmp_path / "cc")
    (directory / "train").mkdir()
    move(directory)
    code, _, err = run("index", directory, "--skip-bad")
    assert code == 2
    assert err.count("\n") == 1
    assert all(part in err for part in message.replace("{d}", str(directory)).split(".*"))


def test_upper_case_and_folders_beside(run, tmp_path):
    directory = img2dataset(tmp_path / "cc")
    (directory / "val").mkdir()
    shutil.copy(directory / "00000.tar", directory / "val")
    (directory / "00001.tar").rename(directory / "00001.TAR")
    shutil.copy(directory / "00000.tar", directory / "00000.tar.gz")
    code, out, err = run("index", directory)
    assert code == 0, err
    assert "6 samples" in out
    assert "note: not indexed: 1 tars in folders below (val); index each folder" in err
