"""tools/make_scenes.py: the official layouts, determinism, and what is held out."""

from __future__ import annotations

import hashlib
import re
from itertools import combinations, product
from pathlib import Path
from random import Random

import pytest

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
    draw_problem,
    draw_scene,
    split_of,
)

COUNTS = {"train": 30, "val": 8, "test": 8}
ARGUMENTS = [word for split, count in COUNTS.items() for word in (f"--{split}", str(count))]

TEXTS_SHA256 = "c35f2982a9df24a9744e454e653cd8056b08325fbf05e391948cc930a2039a65"
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


@pytest.mark.parametrize("seed", range(30))
def test_captions_and_questions_say_what_the_picture_shows(seed):
    random, side = Random(seed), 224
    scene = draw_scene(random, "train")
    picture = draw_picture(random, scene, side)
    assert (picture.mode, *picture.size) == ("RGB", side, side)
    for thing in scene.things:
        # Somewhere on a thing there is its colour; outside all things there is the background.
        reach = int(0.5 * RADII[thing.size] * side)
        x, y = int(thing.x * side), int(thing.y * side)
        near = picture.crop((x - 2 * reach, y - 2 * reach, x + 2 * reach, y + 2 * reach))
        pixels = near.getcolors(near.width * near.height)
        assert min(far(pixel, COLORS[thing.color]) for _, pixel in pixels) <= 10
        assert 0.06 * side < x - 2 * reach < x + 2 * reach < 0.94 * side
    assert far(picture.getpixel((1, 1)), BACKGROUNDS[scene.background]) <= 6

    words = [set(re.findall(r"[a-z]+", caption.lower())) for caption in scene.captions]
    assert all({thing.color, thing.shape, scene.background} <= words[0] for thing in scene.things)
    assert all(words[0] ^ other <= {"on", "against", "there", "is", "we", "see", "a"} for other in words)
    assert len(set(scene.captions)) == 5
    if len(scene.things) == 2:
        first, second = scene.things
        dx, dy = first.x - second.x, first.y - second.y
        holds = {"left": dx < -0.3, "right": dx > 0.3, "above": dy < -0.3, "below": dy > 0.3}
        assert [word for word, true in holds.items() if true] == re.findall("|".join(holds), scene.relation)

    problem = draw_problem(random, scene, "train")
    assert len(set(problem["choices"])) == len(problem["choices"]) >= 2
    assert problem["solution"] == f"The answer is {problem['choices'][problem['answer']]}."


def test_no_pictures_and_a_directory_that_exists_are_refused(tmp_path):
    with pytest.raises(UserError, match="--train 0"):
        main(["--output", str(tmp_path / "world"), "--train", "0"])
    with pytest.raises(UserError, match="exists"):
        main(["--output", str(tmp_path)])
