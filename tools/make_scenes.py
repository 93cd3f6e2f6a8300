"""Draw a small world of shapes with captions and questions, in the official COCO and ScienceQA layouts.

    python tools/make_scenes.py --output scenes

writes pictures (``images/SPLIT/NAME.png``), five captions for each (``annotations/captions_SPLIT.json``,
COCO) and as many multiple-choice questions as pictures (``scienceqa/problems.json`` and ``pid_splits.json``,
``scienceqa/images/SPLIT/ID/image.png``), so that training and evaluation can be tried with no download. The
same arguments and the same pillow give the same bytes.

Unseen means unseen: an object is a combination of colour, texture and shape (8 x 4 x 8 = 256). Of these 192
are drawn in ``train`` only, 32 in ``val`` only and 32 in ``test`` only, while every *pair* of values is left
to ``train``. So no object of a val or test picture was ever shown in training, in any picture: a model must
put it together from parts it knows. The world, its wording and this split are ours.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageChops, ImageDraw

from dehvf_ds.config import UserError

SPLITS = ("train", "val", "test")
COLORS = {
    "red": (214, 32, 38),
    "orange": (245, 130, 20),
    "yellow": (250, 218, 40),
    "green": (40, 160, 60),
    "blue": (35, 80, 205),
    "purple": (125, 45, 165),
    "pink": (246, 130, 185),
    "black": (28, 28, 28),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
BACKGROUNDS = {
    "white": (250, 250, 250),
    "gray": (165, 168, 172),
    "brown": (140, 98, 62),
    "teal": (92, 178, 178),
}
RELATIONS = {
    ("x", False): "to the left of",
    ("x", True): "to the right of",
    ("y", False): "above",
    ("y", True): "below",
}
# Radii as shares of the picture's side; "middle" is drawn three at a time and not named.
RADII = {"small": 0.105, "middle": 0.11, "large": 0.175}
PHRASINGS = (
    "{body} on a {background} background.",
    "{body} against a {background} background.",
    "there is {body} on a {background} background.",
    "we see {body} on a {background} background.",
    "on a {background} background there is {body}.",
)
OVERSAMPLING = 2


@dataclass(frozen=True)
class Thing:
    """One object of a picture: what it is, and where (centre as shares of the picture's side)."""

    color: str
    texture: str
    shape: str
    size: str
    x: float
    y: float

    @property
    def phrase(self) -> str:
        """Noun phrase with its article: size if it is named, texture if there is one, colour, shape."""
        size = "" if self.size == "middle" else self.size
        texture = "" if self.texture == "plain" else self.texture
        words = " ".join(word for word in (size, texture, self.color, self.shape) if word)
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Scene:
    """A picture's content: one to three things in the order they are named, their relation, the background.

    Attributes:
        things: the larger thing first; equal sizes from left to right or from top to bottom.
        axis: ``x`` side by side, ``y`` one above the other; meaningless for one thing.
        background: colour name.
    """

    things: tuple[Thing, ...]
    axis: str
    background: str

    @property
    def relation(self) -> str:
        """How the first of two things lies to the second."""
        first, second = self.things
        behind = first.x > second.x if self.axis == "x" else first.y > second.y
        return RELATIONS[self.axis, behind]

    @property
    def captions(self) -> list[str]:
        """Five captions of 8 to 20 words that agree in every content word."""
        phrases = [thing.phrase for thing in self.things]
        if len(phrases) == 1:
            body = phrases[0]
        elif len(phrases) == 2:
            body = f"{phrases[0]} {self.relation} {phrases[1]}"
        else:
            line = "row" if self.axis == "x" else "column"
            body = f"{phrases[0]}, {phrases[1]} and {phrases[2]} in a {line}"
        texts = (phrasing.format(body=body, background=self.background) for phrasing in PHRASINGS)
        return [text[0].upper() + text[1:] for text in texts]


def split_of(color: str, texture: str, shape: str) -> str:
    """The only split in which this combination is drawn.

    One residue of eight is held out for val and one for test. With these factors each pair of values loses at
    most two of its combinations, so that every pair stays in train.
    """
    residue = (list(COLORS).index(color) + 2 * TEXTURES.index(texture) + 3 * SHAPES.index(shape)) % 8
    return {0: "val", 4: "test"}.get(residue, "train")


def draw_kinds(random: Random, split: str, count: int) -> list[tuple[str, str, str]]:
    """Draw ``count`` combinations of a split, no colour or shape twice; of three, at most one textured."""
    while True:
        kinds: list[tuple[str, str, str]] = []
        while len(kinds) < count:
            texture = random.choice(TEXTURES[1:] if random.random() < 0.6 else TEXTURES[:1])
            kind = (random.choice(list(COLORS)), texture, random.choice(SHAPES))
            if split_of(*kind) == split:
                kinds.append(kind)
        colors, shapes = {kind[0] for kind in kinds}, {kind[2] for kind in kinds}
        textured = sum(kind[1] != "plain" for kind in kinds)
        if len(colors) == len(shapes) == count and (count < 3 or textured <= 1):
            return kinds


def draw_scene(random: Random, split: str) -> Scene:
    """Draw the content of one picture: a third each with one, two and three things."""
    count = random.randint(1, 3)
    kinds = draw_kinds(random, split, count)
    axis = random.choice("xy")
    # Things stand on a line along the axis; across it they share a shift, and each wavers a little. The
    # margins leave everything in sight after the usual crop of 224 from 256 pixels.
    along = {1: [0.5], 2: [0.3, 0.7], 3: [0.22, 0.5, 0.78]}[count]
    spread = 0.2 if count == 1 else 0.01
    shift = random.uniform(-0.2, 0.2)
    things = []
    for kind, place in zip(kinds, along, strict=True):
        size = "middle" if count == 3 else random.choice(("small", "large"))
        main = place + random.uniform(-spread, spread)
        cross = 0.5 + shift + random.uniform(-0.03, 0.03)
        x, y = (main, cross) if axis == "x" else (cross, main)
        things.append(Thing(*kind, size=size, x=x, y=y))
    # Stable: equal sizes keep their order along the axis.
    things.sort(key=lambda thing: -RADII[thing.size])
    return Scene(tuple(things), axis, random.choice(list(BACKGROUNDS)))


def outline(shape: str, radius: float) -> list[tuple[float, float]]:
    """Corners of a shape around the origin in pixels; circles and rings are drawn otherwise."""

    def star(count: int, inner: float) -> list[tuple[float, float]]:
        angles = [math.pi * index / count - math.pi / 2 for index in range(2 * count)]
        reach = [radius if index % 2 == 0 else inner * radius for index in range(2 * count)]
        return [(r * math.cos(a), r * math.sin(a)) for a, r in zip(angles, reach, strict=True)]

    def heart() -> list[tuple[float, float]]:
        angles = [2 * math.pi * index / 60 for index in range(60)]
        wave = [
            13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in angles
        ]
        return [
            (radius * math.sin(a) ** 3, -radius * (w + 2.5) / 15) for a, w in zip(angles, wave, strict=True)
        ]

    a, b = 0.86 * radius, 0.34 * radius
    corners: dict[str, Callable[[], list[tuple[float, float]]]] = {
        "square": lambda: [(-a, -a), (a, -a), (a, a), (-a, a)],
        "triangle": lambda: [(0, -radius), (radius, 0.85 * radius), (-radius, 0.85 * radius)],
        "diamond": lambda: [(0, -radius), (0.75 * radius, 0), (0, radius), (-0.75 * radius, 0)],
        "cross": lambda: [
            *((-b, -radius), (b, -radius), (b, -b), (radius, -b), (radius, b), (b, b)),
            *((b, radius), (-b, radius), (-b, b), (-radius, b), (-radius, -b), (-b, -b)),
        ],
        "star": lambda: star(5, 0.45),
        "heart": heart,
    }
    return corners[shape]()


def draw_mask(shape: str, side: int, center: tuple[float, float], radius: float) -> Image.Image:
    """Mask (mode L, 255 inside) of a shape on a square of ``side`` pixels."""
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    x, y = center
    if shape in ("circle", "ring"):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        if shape == "ring":
            hole = 0.48 * radius
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    else:
        draw.polygon([(x + dx, y + dy) for dx, dy in outline(shape, radius)], fill=255)
    return mask


def draw_pattern(random: Random, texture: str, side: int, unit: float) -> Image.Image:
    """Mask (mode L, 255 where white shows) of a texture; ``unit`` is the width of a stripe in pixels."""
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    phase = random.uniform(0, 2 * unit)
    steps = range(-1, int(side / (2 * unit)) + 2)
    if texture == "striped":
        upright = random.random() < 0.5
        for step in steps:
            start = 2 * unit * step + phase
            box = (start, 0, start + unit, side) if upright else (0, start, side, start + unit)
            draw.rectangle(box, fill=255)
    elif texture == "dotted":
        reach = 0.62 * unit
        for row in range(-1, int(side / (1.7 * unit)) + 2):
            for column in steps:
                # Rows are set off by half a step, which looks unlike checks.
                x = 2 * unit * (column + 0.5 * (row % 2)) + phase
                y = 1.7 * unit * row + phase
                draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=255)
    elif texture == "checkered":
        for row in range(-1, int(side / unit) + 2):
            for column in range(-1 + row % 2, int(side / unit) + 2, 2):
                x, y = unit * column + phase, unit * row + phase
                draw.rectangle((x, y, x + unit, y + unit), fill=255)
    return mask


def draw_picture(random: Random, scene: Scene, image_size: int) -> Image.Image:
    """Draw a scene as an RGB square of ``image_size`` pixels, drawn larger and reduced for smooth edges."""
    side = OVERSAMPLING * image_size

    def waver(color: tuple[int, int, int], reach: int) -> tuple[int, int, int]:
        red, green, blue = (min(255, max(0, value + random.randint(-reach, reach))) for value in color)
        return red, green, blue

    picture = Image.new("RGB", (side, side), waver(BACKGROUNDS[scene.background], 6))
    for thing in scene.things:
        radius = RADII[thing.size] * side * random.uniform(0.94, 1.06)
        center = (thing.x * side, thing.y * side)
        color = waver(COLORS[thing.color], 8)
        outer = draw_mask(thing.shape, side, center, radius)
        pattern = draw_pattern(random, thing.texture, side, unit=0.036 * side)
        picture.paste(color, mask=outer)
        picture.paste((250, 250, 250), mask=ImageChops.multiply(outer, pattern))
        # A rim in the colour keeps the outline whole where white meets a light background.
        inner = draw_mask(thing.shape, side, center, radius - 0.018 * side)
        picture.paste(color, mask=ImageChops.subtract(outer, inner))
    return picture.resize((image_size, image_size), Image.Resampling.BOX)


@dataclass(frozen=True)
class Question:
    """What differs from question to question; ``record`` adds the fields that ScienceQA wants beside it.

    Attributes:
        text: the question.
        right: the correct choice.
        wrong: the other choices.
        hint: text that comes with the question, or empty.
        subject: ScienceQA's subject, which decides between NAT, SOC and LAN.
        topic: topic within the subject.
        skill: what is asked for, in a few words.
        grade: 1 to 12.
        needs_picture: whether it is asked about the picture.
    """

    text: str
    right: str
    wrong: tuple[str, ...]
    hint: str
    subject: str
    topic: str
    skill: str
    grade: int
    needs_picture: bool

    def record(self, random: Random, split: str) -> dict[str, Any]:
        """The question as one entry of ``problems.json``, its choices shuffled."""
        choices = [self.right, *self.wrong]
        random.shuffle(choices)
        return {
            "question": self.text,
            "choices": choices,
            "answer": choices.index(self.right),
            "hint": self.hint,
            "image": "image.png" if self.needs_picture else None,
            "task": "closed choice",
            "grade": f"grade{self.grade}",
            "subject": self.subject,
            "topic": self.topic,
            "category": self.topic.replace("-", " ").capitalize(),
            "skill": self.skill,
            "lecture": "Look closely, name what you see and compare it with each choice."
            if self.needs_picture
            else "Read closely and compare the text with each choice.",
            "solution": f"The answer is {self.right}.",
            "split": split,
        }


def ask_about_picture(random: Random, scene: Scene) -> Question:
    """A question that only the picture can answer; one in four comes with a hint besides."""
    thing = random.choice(scene.things)
    number = ("one", "two", "three")[len(scene.things) - 1]
    hint = "The picture shows shapes on a colored background." if random.random() < 0.25 else ""
    nature = ("natural science", "physics")
    kinds: list[tuple[str, str, list[str], tuple[str, str], str, int]] = [
        (f"Which color is the {thing.shape}?", thing.color, list(COLORS), nature, "Name a color", 1),
        (f"Which shape is {thing.color}?", thing.shape, list(SHAPES), nature, "Name a shape", 2),
        ("Which color is the background?", scene.background, list(BACKGROUNDS), nature, "Name a color", 4),
        ("How many objects are there?", number, ["one", "two", "three"], nature, "Count objects", 7),
    ]
    if len(scene.things) == 2:
        first, second = (thing.shape for thing in scene.things)
        text = f"Where is the {first}, seen from the {second}?"
        place = ("social science", "geography")
        kinds.append((text, scene.relation, list(RELATIONS.values()), place, "Read directions", 8))
    text, right, choices, (subject, topic), skill, grade = random.choice(kinds)
    others = [choice for choice in choices if choice != right]
    wrong = tuple(random.sample(others, min(3, len(others))))
    return Question(text, right, wrong, hint, subject, topic, skill, grade, needs_picture=True)


def ask_in_words(random: Random, scene: Scene) -> Question:
    """A question without a picture: about a described scene, about a told map, or about words alone."""
    kind = random.choice(("scene", "map", "words"))
    if kind == "scene":
        thing = random.choice(scene.things)
        wrong = tuple(random.sample([color for color in COLORS if color != thing.color], 3))
        text, hint = f"Which color is the {thing.shape}?", scene.captions[0]
        return Question(
            text,
            thing.color,
            wrong,
            hint,
            "natural science",
            "physics",
            "Read a text",
            5,
            needs_picture=False,
        )
    if kind == "map":
        north, south = random.sample(("school", "bridge", "market", "harbor", "library", "mill"), 2)
        hint = f"The {north} lies north of the {south}."
        text, skill = "Which place lies farther south?", "Read a map"
        return Question(
            text, south, (north,), hint, "social science", "geography", skill, 9, needs_picture=False
        )
    right = random.choice(list(COLORS))
    wrong = tuple(random.sample(SHAPES, 3))
    skill = "Sort words by meaning"
    return Question(
        "Which word names a color?", right, wrong, "", "language science", "vocabulary", skill, 3, False
    )


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, the folder made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def write_world(directory: Path, counts: dict[str, int], seed: int, image_size: int) -> None:
    """Write pictures, captions and questions of every split into ``directory``.

    Args:
        directory: an empty directory.
        counts: pictures of each split; as many questions, of which three in ten are text-only.
        seed: seed of everything drawn; each picture has a generator of its own.
        image_size: side of the pictures in pixels.
    """
    problems: dict[str, Any] = {}
    pids: dict[str, list[str]] = {}
    number = 0
    for split, count in counts.items():
        images, annotations = [], []
        pids[split] = []
        (directory / "images" / split).mkdir(parents=True)
        for index in range(count):
            number += 1
            # A string seeds the same generator on every platform and Python version.
            random = Random(f"{seed}/{split}/{index}")
            scene = draw_scene(random, split)
            name = f"{number:06d}.png"
            picture = directory / "images" / split / name
            draw_picture(random, scene, image_size).save(picture)
            images.append({"id": number, "file_name": name, "height": image_size, "width": image_size})
            for caption in scene.captions:
                key = 5 * (number - 1) + len(annotations) % 5 + 1
                annotations.append({"id": key, "image_id": number, "caption": caption})

            ask = ask_in_words if random.random() < 0.3 else ask_about_picture
            record = ask(random, scene).record(random, split)
            problems[str(number)] = record
            pids[split].append(str(number))
            if record["image"]:
                target = directory / "scienceqa" / "images" / split / str(number) / record["image"]
                target.parent.mkdir(parents=True)
                shutil.copyfile(picture, target)
        info = {"description": "dehvf_ds scenes", "version": "1", "seed": seed, "split": split}
        captions = {"info": info, "images": images, "annotations": annotations}
        write_json(directory / "annotations" / f"captions_{split}.json", captions)
    pids["trainval"] = pids["train"] + pids["val"]
    write_json(directory / "scienceqa" / "problems.json", problems)
    write_json(directory / "scienceqa" / "pid_splits.json", pids)


def main(argv: list[str] | None = None) -> int:
    """Entry of the script; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, required=True, help="directory to write; must not exist yet")
    parser.add_argument("--train", type=int, default=1200, help="pictures for training (default 1200)")
    parser.add_argument("--val", type=int, default=100, help="pictures for validation (default 100)")
    parser.add_argument("--test", type=int, default=100, help="pictures for the test (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default 0)")
    parser.add_argument("--image-size", type=int, default=224, help="side in pixels (default 224)")
    args = parser.parse_args(argv)
    counts = {split: getattr(args, split) for split in SPLITS}
    try:
        for split, count in counts.items():
            if count < 1:
                raise UserError(f"--{split} {count}: give at least 1 picture")
        if not 64 <= args.image_size <= 2048:
            raise UserError(f"--image-size {args.image_size}: give 64 to 2048 pixels")
        if args.output.exists():
            raise UserError(f"--output {args.output} exists; remove it or name another directory")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{args.output.name}-", dir=args.output.parent))
        try:
            write_world(partial, counts, args.seed, args.image_size)
            partial.chmod(0o755)
            partial.replace(args.output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    total = sum(counts.values())
    print(f"{args.output}: {total} pictures, {5 * total} captions, {total} questions ({counts})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
