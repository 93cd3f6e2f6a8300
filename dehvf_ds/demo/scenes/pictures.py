"""Draws a scene: shapes, textures and background."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

from PIL import Image, ImageChops, ImageDraw

from dehvf_ds.demo.scenes.world import BACKGROUNDS, COLORS, RADII, Scene

OVERSAMPLING = 2


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
