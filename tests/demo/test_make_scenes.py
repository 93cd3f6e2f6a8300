"""tools/make_scenes.py: the official layouts, determinism, and what is held out."""

from __future__ import annotations

import hashlib
import json
import re
from itertools import product
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from dehvf_ds.demo.make_scenes import main
from dehvf_ds.demo.scenes.pictures import draw_picture
from dehvf_ds.demo.scenes.world import (
    BACKGROUNDS,
    COLORS,
    RADII,
    SHAPES,
    SPLITS,
    TEXTURES,
    draw_scene,
    split_of,
)

COUNTS = {"train": 30, "val": 8, "test": 8}
ARGUMENTS = ["--train", "30", "--val", "8", "--test", "8", "--image-size", "64"]


def load(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("scenes") / "world"
    assert main(["--output", str(output), *ARGUMENTS]) == 0
    return output


def test_same_seed_same_bytes_and_another_seed_others(world, tmp_path):
    assert main(["--output", str(tmp_path / "again"), *ARGUMENTS]) == 0
    assert digests(tmp_path / "again") == digests(world)
    assert main(["--output", str(tmp_path / "other"), *ARGUMENTS, "--seed", "1"]) == 0
    assert digests(tmp_path / "other") != digests(world)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_in_the_coco_layout(world, split):
    data = load(world / "annotations" / f"captions_{split}.json")
    assert set(data) == {"info", "images", "annotations"}
    assert len(data["images"]) == COUNTS[split]
    assert len({entry["id"] for entry in data["annotations"]}) == 5 * COUNTS[split]
    for image in data["images"]:
        assert set(image) == {"id", "file_name", "height", "width"}
        with Image.open(world / "images" / split / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) == (64, 64)
            assert picture.mode == "RGB"
        captions = [entry["caption"] for entry in data["annotations"] if entry["image_id"] == image["id"]]
        assert len(set(captions)) == 5
        words = [set(re.findall(r"[a-z]+", caption.lower())) for caption in captions]
        for other in words:
            assert words[0] ^ other <= {"on", "against", "there", "is", "we", "see", "a"}
        assert all(8 <= len(caption.split()) <= 20 for caption in captions)


def test_questions_are_in_the_scienceqa_layout(world):
    problems, splits = load(world / "scienceqa/problems.json"), load(world / "scienceqa/pid_splits.json")
    assert {split: len(splits[split]) for split in SPLITS} == COUNTS
    assert splits["trainval"] == splits["train"] + splits["val"]
    assert {pid for split in SPLITS for pid in splits[split]} == set(problems)
    fields = {"question", "choices", "answer", "hint", "image", "task", "grade", "subject", "topic"}
    fields |= {"category", "skill", "lecture", "solution", "split"}
    for pid, problem in problems.items():
        assert set(problem) == fields
        assert pid in splits[problem["split"]]
        assert len(set(problem["choices"])) == len(problem["choices"]) >= 2
        assert problem["choices"][problem["answer"]] in problem["solution"]
        file = world / "scienceqa/images" / problem["split"] / pid / "image.png"
        assert file.is_file() == (problem["image"] is not None)
    assert {bool(problem["image"]) for problem in problems.values()} == {True, False}
    assert {bool(problem["hint"]) for problem in problems.values()} == {True, False}
    subjects = {problem["subject"] for problem in problems.values()}
    assert subjects == {"natural science", "social science", "language science"}


def test_held_out_objects_never_occur_in_train_but_every_pair_of_values_does():
    kinds = {split: set() for split in SPLITS}
    for kind in product(COLORS, TEXTURES, SHAPES):
        kinds[split_of(*kind)].add(kind)
    assert {split: len(found) for split, found in kinds.items()} == {"train": 192, "val": 32, "test": 32}
    values = (COLORS, TEXTURES, SHAPES)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        seen = {(kind[first], kind[second]) for kind in kinds["train"]}
        assert seen == set(product(values[first], values[second]))
    for split in SPLITS:
        for seed in range(50):
            scene = draw_scene(Random(seed), split)
            assert {(t.color, t.texture, t.shape) for t in scene.things} <= kinds[split]


@pytest.mark.parametrize("seed", range(40))
def test_pictures_show_what_the_captions_say(seed):
    random = Random(seed)
    scene = draw_scene(random, "train")
    side = 224
    picture = draw_picture(random, scene, side)
    for thing in scene.things:
        # Somewhere on a thing there is its colour; outside all things there is the background.
        reach = int(0.5 * RADII[thing.size] * side)
        x, y = int(thing.x * side), int(thing.y * side)
        near = picture.crop((x - 2 * reach, y - 2 * reach, x + 2 * reach, y + 2 * reach))
        distance = min(
            max(abs(a - b) for a, b in zip(pixel, COLORS[thing.color], strict=True))
            for _, pixel in near.getcolors(near.width * near.height)
        )
        assert distance <= 10
        assert 0.06 * side < x - 2 * reach
        assert x + 2 * reach < 0.94 * side
    corner = picture.getpixel((1, 1))
    background = BACKGROUNDS[scene.background]
    assert max(abs(a - b) for a, b in zip(corner, background, strict=True)) <= 6
    if len(scene.things) == 2:
        first, second = scene.things
        dx, dy = first.x - second.x, first.y - second.y
        expected = {
            "to the left of": dx < -0.3,
            "to the right of": dx > 0.3,
            "above": dy < -0.3,
            "below": dy > 0.3,
        }
        assert [relation for relation, holds in expected.items() if holds] == [scene.relation]
        assert RADII[first.size] >= RADII[second.size]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--train", "0"], "--train 0"), (["--image-size", "8"], "--image-size 8"), ([], "exists")],
)
def test_mistakes_are_one_line(capsys, tmp_path, arguments, words):
    output = tmp_path / "world"
    if not arguments:
        output.mkdir()
    assert main(["--output", str(output), *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert words in message
    assert message.count("\n") == 1
