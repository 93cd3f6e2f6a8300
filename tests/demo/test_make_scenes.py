"""tools/make_scenes.py: the official layouts, determinism, and what is held out."""

from __future__ import annotations

import hashlib
import json
import re
from itertools import combinations, product
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from dehvf_ds.config import UserError
from dehvf_ds.demo.make_scenes import main
from dehvf_ds.demo.scenes import (
    BACKGROUNDS,
    COLORS,
    RADII,
    SHAPES,
    SPLITS,
    TEXTURES,
    draw_picture,
    draw_scene,
    split_of,
)

COUNTS = {"train": 30, "val": 8, "test": 8}
ARGUMENTS = [word for split, count in COUNTS.items() for word in (f"--{split}", str(count))]

TEXTS_SHA256 = "4cf9aa0ca309f839f75e931706b258a7999574cc2128ec0b5588cbad8b0cce8e"
"""Of captions and questions of the arguments above: whatever is drawn before them must be drawn as it was."""


def digest(root: Path, pattern: str) -> str:
    total = hashlib.sha256()
    for path in sorted(path for path in root.rglob(pattern) if path.is_file()):
        total.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("scenes") / "world"
    assert main(["--output", str(output), *ARGUMENTS]) == 0
    return output


def test_same_seed_same_bytes_and_another_seed_others(world, tmp_path):
    for seed in ("0", "1"):
        assert main(["--output", str(tmp_path / seed), *ARGUMENTS, "--seed", seed]) == 0
    assert digest(world, "*.json") == TEXTS_SHA256
    assert digest(world, "*") == digest(tmp_path / "0", "*") != digest(tmp_path / "1", "*")
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


@pytest.mark.parametrize("split", SPLITS)
def test_captions_of_a_picture_agree_in_every_word_that_counts(world, split):
    data = json.loads((world / "annotations" / f"captions_{split}.json").read_text())
    assert len(data["images"]) == COUNTS[split]
    assert len({entry["id"] for entry in data["annotations"]}) == 5 * COUNTS[split]
    for image in data["images"]:
        with Image.open(world / "images" / split / image["file_name"]) as picture:
            assert (picture.mode, *picture.size) == ("RGB", image["width"], image["height"])
        captions = [entry["caption"] for entry in data["annotations"] if entry["image_id"] == image["id"]]
        assert len(set(captions)) == 5
        words = [set(re.findall(r"[a-z]+", caption.lower())) for caption in captions]
        for other in words:
            assert words[0] ^ other <= {"on", "against", "there", "is", "we", "see", "a"}
        assert all(8 <= len(caption.split()) <= 20 for caption in captions)


def test_questions_are_of_all_kinds_and_have_a_right_answer(world):
    problems, pids = (
        json.loads((world / "scienceqa" / name).read_text()) for name in ("problems.json", "pid_splits.json")
    )
    assert {split: len(pids[split]) for split in SPLITS} == COUNTS
    for pid, problem in problems.items():
        assert pid in pids[problem["split"]]
        assert len(set(problem["choices"])) == len(problem["choices"]) >= 2
        assert problem["choices"][problem["answer"]] in problem["solution"]
        file = world / "scienceqa/images" / problem["split"] / pid / "image.png"
        assert file.is_file() == (problem["image"] is not None)
    for field in ("image", "hint"):
        assert {bool(problem[field]) for problem in problems.values()} == {True, False}
    assert {problem["subject"].split()[0] for problem in problems.values()} == {
        "natural",
        "social",
        "language",
    }


def test_held_out_objects_never_occur_in_train_but_every_pair_of_values_does():
    kinds = {split: set() for split in SPLITS}
    for kind in product(COLORS, TEXTURES, SHAPES):
        kinds[split_of(*kind)].add(kind)
    assert {split: len(found) for split, found in kinds.items()} == {"train": 192, "val": 32, "test": 32}
    values = (COLORS, TEXTURES, SHAPES)
    for first, second in combinations(range(3), 2):
        seen = {(kind[first], kind[second]) for kind in kinds["train"]}
        assert seen == set(product(values[first], values[second]))
    for split, seed in product(SPLITS, range(50)):
        scene = draw_scene(Random(seed), split)
        assert {(t.color, t.texture, t.shape) for t in scene.things} <= kinds[split]


def far(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How far two colours are apart in the channel where they differ most."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


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
        pixels = near.getcolors(near.width * near.height)
        assert min(far(pixel, COLORS[thing.color]) for _, pixel in pixels) <= 10
        assert 0.06 * side < x - 2 * reach < x + 2 * reach < 0.94 * side
    assert far(picture.getpixel((1, 1)), BACKGROUNDS[scene.background]) <= 6
    if len(scene.things) == 2:
        first, second = scene.things
        dx, dy = first.x - second.x, first.y - second.y
        holds = {"left": dx < -0.3, "right": dx > 0.3, "above": dy < -0.3, "below": dy > 0.3}
        assert [word for word, true in holds.items() if true] == re.findall("|".join(holds), scene.relation)
        assert RADII[first.size] >= RADII[second.size]


def test_no_pictures_and_a_directory_that_exists_are_refused(tmp_path):
    with pytest.raises(UserError, match="--train 0"):
        main(["--output", str(tmp_path / "world"), "--train", "0"])
    with pytest.raises(UserError, match="exists"):
        main(["--output", str(tmp_path)])
