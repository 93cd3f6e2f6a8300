"""The demo's world of shapes: what a scene holds, its captions, its picture, and questions about it.

Everything is drawn from a ``Random`` in a fixed order, so one seed gives the same bytes everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from PIL import Image, ImageChops, ImageDraw

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
"""Pictures are drawn larger by this factor and then reduced, for smooth edges."""

Point = tuple[float, float]
Problem = dict[str, str | int | list[str] | None]
"""An entry of ScienceQA's ``problems.json``."""


@dataclass(frozen=True)
class Thing:
    """One object of a scene: what it is, and its centre as shares of the picture's side."""

    color: str
    texture: str
    shape: str
    size: str
    x: float
    y: float

    @property
    def phrase(self) -> str:
        """Noun phrase with its article, without a middle size or a plain texture."""
        size = "" if self.size == "middle" else self.size
        texture = "" if self.texture == "plain" else self.texture
        words = " ".join(word for word in (size, texture, self.color, self.shape) if word)
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Scene:
    """A picture's content: one to three things, the larger first, side by side (axis x) or in a column."""

    things: tuple[Thing, ...]
    axis: str
    background: str

    @property
    def relation(self) -> str:
        """Where the first of two things is, seen from the second."""
        first, second = self.things
        behind = first.x > second.x if self.axis == "x" else first.y > second.y
        return RELATIONS[self.axis, behind]

    @property
    def captions(self) -> list[str]:
        """Five captions of 8 to 20 words that agree in every content word."""
        body, *others = (thing.phrase for thing in self.things)
        if len(others) == 1:
            body += f" {self.relation} {others[0]}"
        elif others:
            body += f", {others[0]} and {others[1]} in a {'row' if self.axis == 'x' else 'column'}"
        texts = (phrasing.format(body=body, background=self.background) for phrasing in PHRASINGS)
        return [text[0].upper() + text[1:] for text in texts]


def split_of(color: str, texture: str, shape: str) -> str:
    """The only split in which this combination is drawn.

    One residue of eight is val's and one is test's. With these factors a pair of values loses at most two of
    its combinations, so every pair stays in train.
    """
    residue = (list(COLORS).index(color) + 2 * TEXTURES.index(texture) + 3 * SHAPES.index(shape)) % 8
    return {0: "val", 4: "test"}.get(residue, "train")


def draw_kinds(random: Random, split: str, count: int) -> list[tuple[str, str, str]]:
    """Combinations of a split, no colour or shape twice; of three, at most one textured."""
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
    """The content of one picture: a third each with one, two and three things."""
    count = random.randint(1, 3)
    kinds = draw_kinds(random, split, count)
    axis = random.choice("xy")
    # Things are on a line along the axis, with one shift across it and a little noise each. The margins
    # survive the usual crop of 224 from 256 pixels.
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


# --- pictures ---


def outline(shape: str, radius: float) -> list[Point]:
    """Corners in pixels of a shape around the origin, which is no circle or ring."""
    r, a, b = radius, 0.86 * radius, 0.34 * radius
    if shape == "star":
        angles = [math.pi * index / 5 - math.pi / 2 for index in range(10)]
        reach = [r, 0.45 * r] * 5
        return [(length * math.cos(t), length * math.sin(t)) for length, t in zip(reach, angles, strict=True)]
    if shape == "heart":
        c, angles = math.cos, [2 * math.pi * index / 60 for index in range(60)]
        wave = [13 * c(t) - 5 * c(2 * t) - 2 * c(3 * t) - c(4 * t) for t in angles]
        return [(r * math.sin(t) ** 3, -r * (w + 2.5) / 15) for t, w in zip(angles, wave, strict=True)]
    upper = [(-b, -r), (b, -r), (b, -b), (r, -b), (r, b), (b, b)]
    corners: dict[str, list[Point]] = {
        "square": [(-a, -a), (a, -a), (a, a), (-a, a)],
        "triangle": [(0, -r), (r, 0.85 * r), (-r, 0.85 * r)],
        "diamond": [(0, -r), (0.75 * r, 0), (0, r), (-0.75 * r, 0)],
        "cross": [*upper, *((-x, -y) for x, y in upper)],
    }
    return corners[shape]


def draw_disc(draw: ImageDraw.ImageDraw, center: Point, radius: float, fill: int) -> None:
    """Fills a circle, in pixels."""
    x, y = center
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def draw_mask(shape: str, side: int, center: Point, radius: float) -> Image.Image:
    """Mask (mode L, 255 inside) of a shape on a square of ``side`` pixels."""
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        draw_disc(draw, center, radius, 255)
        if shape == "ring":
            draw_disc(draw, center, 0.48 * radius, 0)
    else:
        x, y = center
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
        for row in range(-1, int(side / (1.7 * unit)) + 2):
            for column in steps:
                # Every second row is shifted by half a step, unlike checks.
                center = (2 * unit * (column + 0.5 * (row % 2)) + phase, 1.7 * unit * row + phase)
                draw_disc(draw, center, 0.62 * unit, 255)
    elif texture == "checkered":
        for row in range(-1, int(side / unit) + 2):
            for column in range(-1 + row % 2, int(side / unit) + 2, 2):
                x, y = unit * column + phase, unit * row + phase
                draw.rectangle((x, y, x + unit, y + unit), fill=255)
    return mask


def draw_picture(random: Random, scene: Scene, image_size: int) -> Image.Image:
    """A scene as an RGB square of ``image_size`` pixels."""
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
        # A rim in the thing's colour separates white from a light background.
        inner = draw_mask(thing.shape, side, center, radius - 0.018 * side)
        picture.paste(color, mask=ImageChops.subtract(outer, inner))
    return picture.resize((image_size, image_size), Image.Resampling.BOX)


# --- questions ---


class Question(NamedTuple):
    """What differs from question to question."""

    text: str
    right: str
    wrong: list[str]
    subject: str
    topic: str
    skill: str
    grade: int
    hint: str = ""


def draw_problem(random: Random, scene: Scene, split: str) -> Problem:
    """A multiple-choice question in ScienceQA's fields; three in ten have no picture."""
    about_picture = random.random() >= 0.3
    ask = ask_about_picture if about_picture else ask_in_words
    question = ask(random, scene)
    choices = [question.right, *question.wrong]
    random.shuffle(choices)
    look = "Look closely, name what you see and compare it with each choice."
    read = "Read closely and compare the text with each choice."
    return {
        "question": question.text,
        "choices": choices,
        "answer": choices.index(question.right),
        "hint": question.hint,
        "image": "image.png" if about_picture else None,
        "task": "closed choice",
        "grade": f"grade{question.grade}",
        "subject": question.subject,
        "topic": question.topic,
        "category": question.topic.replace("-", " ").capitalize(),
        "skill": question.skill,
        "lecture": look if about_picture else read,
        "solution": f"The answer is {question.right}.",
        "split": split,
    }


def ask_about_picture(random: Random, scene: Scene) -> Question:
    """A question that only the picture answers; one in four has a hint."""
    thing = random.choice(scene.things)
    numbers = ["one", "two", "three"]
    hint = "The picture shows shapes on a colored background." if random.random() < 0.25 else ""
    nature, place = ("natural science", "physics"), ("social science", "geography")
    background, number = scene.background, numbers[len(scene.things) - 1]
    texture = f"Which texture has the {thing.shape}?"
    kinds = [
        Question(f"Which color is the {thing.shape}?", thing.color, list(COLORS), *nature, "Name a color", 1),
        Question(texture, thing.texture, list(TEXTURES), *nature, "Name a texture", 1),
        Question(f"Which shape is {thing.color}?", thing.shape, list(SHAPES), *nature, "Name a shape", 2),
        Question("Which color is the background?", background, list(BACKGROUNDS), *nature, "Name a color", 4),
        Question("How many objects are there?", number, numbers, *nature, "Count objects", 7),
    ]
    if len(scene.things) == 2:
        text = "Where is the {}, seen from the {}?".format(*(thing.shape for thing in scene.things))
        kinds.append(Question(text, scene.relation, list(RELATIONS.values()), *place, "Read directions", 8))
    question = random.choice(kinds)
    others = [choice for choice in question.wrong if choice != question.right]
    return question._replace(wrong=random.sample(others, min(3, len(others))), hint=hint)


def ask_in_words(random: Random, scene: Scene) -> Question:
    """A question without a picture: about a scene or a map in words, or about words alone."""
    kind = random.choice(("scene", "map", "words"))
    if kind == "scene":
        thing = random.choice(scene.things)
        wrong = random.sample([color for color in COLORS if color != thing.color], 3)
        text, about = f"Which color is the {thing.shape}?", ("natural science", "physics", "Read a text")
        return Question(text, thing.color, wrong, *about, 5, scene.captions[0])
    if kind == "map":
        north, south = random.sample(("school", "bridge", "market", "harbor", "library", "mill"), 2)
        hint, about = f"The {north} lies north of the {south}.", ("social science", "geography", "Read a map")
        return Question("Which place lies farther south?", south, [north], *about, 9, hint)
    right = random.choice(list(COLORS))
    about = ("language science", "vocabulary", "Sort words by meaning")
    return Question("Which word names a color?", right, random.sample(SHAPES, 3), *about, 3)
