"""Whole builds of layouts as people have them: what is bad in them is refused, or left out and counted."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from dehvf_ds.config import EvalConfig, UserError
from dehvf_ds.data.examples import read_sample
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.records import read_record
from dehvf_ds.data.shards import picture_name
from dehvf_ds.evaluation.dataset import published_shards

NAN = float("nan")
CAPTIONS = {name: ["A."] for name in ("a.jpg", "gone.jpg", "cut.jpg", "empty.jpg", "odd.heic", "../up.jpg")}
CAPTIONS |= {"none.jpg": [], "blank.jpg": [" "], "null.jpg": [None], "nan.jpg": [NAN]}
CAPTIONS |= {"half.jpg": ["half \ud83d"], "b.jpg": [" B. ", ""]}
REASONS = {"without a picture": 1, "undecodable": 3, "without a caption": 4, "of damaged text": 1}
REASONS |= {"with an unusable name": 1}


def dump(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def coco(tmp_path, images):
    names = list(CAPTIONS)
    annotations = [{"image_id": names.index(n), "caption": c} for n, texts in CAPTIONS.items() for c in texts]
    content = {"images": [{"id": i, "file_name": n} for i, n in enumerate(names)], "annotations": annotations}
    path = dump(tmp_path / "captions.json", content)
    return ["coco", "--annotations", path, "--images", images], REASONS


def karpathy(tmp_path, images):
    entries = [
        {"filename": n, "imgid": i, "split": "train", "sentences": [{"raw": c} for c in texts]}
        for i, (n, texts) in enumerate(CAPTIONS.items())
    ]
    entries.insert(3, {"filename": "a.jpg", "split": "train", "sentences": [{"raw": "no id"}]})
    path = dump(tmp_path / "dataset.json", {"images": entries})
    reasons = {**REASONS, "with an unreadable record": 1}
    return ["karpathy", "--dataset", path, "--images", images, "--split", "train"], reasons


def csv(tmp_path, images):
    texts = [(n, c or "") for n, captions in CAPTIONS.items() for c in captions if n != "half.jpg"]
    lines = "\n".join(f"{name},{caption}" for name, caption in texts)
    lines += "\nc.jpg\nc.jpg,one, two\nd.jpg,a\0b"
    path = dump(tmp_path / "captions.csv", f"image,caption\n\n{lines}\n")
    reasons = {**REASONS, "without a caption": 3, "with an unreadable record": 2}
    return ["csv", "--captions", path, "--images", images], reasons


def talk(answer="A dog.", question="<image>\nWhat?"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def llava(tmp_path, images):
    rows = [
        {"id": "a", "image": "a.jpg", "conversations": talk()},
        *({"id": name, "image": f"{name}.jpg", "conversations": talk()} for name in ("gone", "cut")),
        {"id": "two", "image": ["a.jpg", "b.jpg"], "conversations": talk()},
        {"id": "blind", "conversations": talk()},
        {"id": "mute", "image": "a.jpg", "conversations": talk("")},
        {"id": "half", "image": "a.jpg", "conversations": talk("\ud83d")},
        {"id": "none", "image": "a.jpg"},
        "not a row",
        {"id": "b", "image": "b.jpg", "conversations": [{"from": "GPT", "value": "Hi."}, *talk()]},
    ]
    path = dump(tmp_path / "chat.jsonl", "\n\n".join(map(json.dumps, rows)) + "\n{\n")
    reasons = {"without a picture": 2, "undecodable": 1, "with several pictures": 1, "without a caption": 1}
    reasons |= {"with an unusable conversation": 1, "of damaged text": 1, "with an unreadable record": 2}
    return ["llava", "--json", path, "--images", images], reasons


def scienceqa(tmp_path, images):
    good = {"question": "?", "choices": ["x", "y"], "answer": 0, "hint": "", "grade": "grade2"}
    good |= {"split": "train", "subject": "social science", "image": None}
    problems = {
        "a": good | {"image": "image.png"},
        "gone": good | {"image": "gone.png"},
        "beyond": good | {"answer": 2},
        "half": good | {"hint": "\ud83d"},
        "b": good,
    }
    (images / "train" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(images / "train" / "a" / "image.png")
    dump(tmp_path / "problems.json", problems)
    dump(tmp_path / "pid_splits.json", {"train": [*problems, "absent"]})
    reasons = {"without a picture": 1, "with an unusable problem": 1, "of damaged text": 1}
    return ["scienceqa", "--root", tmp_path, "--split", "train"], {**reasons, "with an unreadable record": 1}


@pytest.mark.parametrize("layout", [coco, karpathy, csv, llava, scienceqa])
def test_bad_rows_are_one_line_or_left_out_and_counted(run, tmp_path, images, layout):
    arguments, reasons = layout(tmp_path, images)
    arguments += ["--output", tmp_path / "out"]
    code, _, err = run(*arguments)
    errors = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert (code, len(errors)) == (2, 1)
    assert errors[0].startswith(f"error: {tmp_path}")
    assert "--skip-bad" in errors[0]
    assert not list((tmp_path / "out").glob("*.tar"))
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    code, _, err = run(*arguments, "--skip-bad")
    assert code == 0, err
    index = ShardIndex(tmp_path / "out")
    assert [index.read(i)["__key__"] for i in range(len(index))] == ["a", "b"]
    left_out, builder = sum(reasons.values()), index.manifest["builder"]
    assert builder["left_out_reasons"] == reasons
    assert builder["left_out"] == left_out == len(builder["left_out_first"])
    assert str(tmp_path) not in json.dumps(index.manifest)
    assert f"note: left out {left_out} of {left_out + 2}: " in err
    assert all(f"{count} {reason}" in err for reason, count in reasons.items())
    assert ("turn of the assistant before a question dropped" in err) == (layout is llava)
    assert run("verify", tmp_path / "out")[0] == 0
    # Training reads the picture of the source, and the record that evaluation reads.
    pictures = ["images/train/a/image.png", None] if layout is scienceqa else ["images/a.jpg", "images/b.jpg"]
    for row, path in enumerate(pictures):
        members, sample = index.read(row), read_sample(index, row)
        assert sample.record == read_record(members).record == json.loads(members["json"])
        name = picture_name(members)
        if path is None:
            assert sample.image is name is None
        else:
            assert members[name] == (tmp_path / path).read_bytes()
            assert sample.image.tobytes() == Image.open(tmp_path / path).convert("RGB").tobytes()
    if layout in (coco, karpathy, csv):
        assert read_sample(index, 1).record["captions"] == ["B."]
    # The same call again knows that nothing changed.
    assert "complete already: 2 samples" in run(*arguments, "--skip-bad")[1]


def test_an_evaluation_scores_every_problem_or_none(tmp_path, images):
    scienceqa(tmp_path, images)
    config = EvalConfig(model="none", data=str(tmp_path), task="scienceqa", split="train")
    with pytest.raises(UserError, match=r"problem beyond: .*; correct it"):
        published_shards(config, tmp_path / "out")
