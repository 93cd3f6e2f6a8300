"""What a scene holds, how it is put into words, and which split may show what."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

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
