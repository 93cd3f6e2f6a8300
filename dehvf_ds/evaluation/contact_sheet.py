"""Contact sheets: pictures with what a model says of them, to be judged at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLUMNS = 4
PICTURE_SIDE = 224
GAP = 20
FONT_SIZE = 15
LINE_HEIGHT = round(1.35 * FONT_SIZE)
BETWEEN = LINE_HEIGHT // 3

PAPER = (255, 255, 255)
INK = (24, 24, 27)
FAINT = (113, 113, 122)
FRAME = (212, 212, 216)


def contact_sheet(
    pictures: Sequence[Image.Image], captions: Sequence[str], path: Path, *, references: Sequence[str]
) -> None:
    """Writes one PNG: every picture above its caption, in rows of ``COLUMNS`` (layout ours).

    A picture is scaled to fit a square with its proportions kept. Texts wrap at the picture's width and are
    never cut: each row is as high as its longest texts.
    The pictures are RGB, at least one. ``references`` holds a second text a picture, below in grey.
    """
    font = ImageFont.load_default(size=FONT_SIZE)
    pairs = zip(captions, references, strict=True)
    texts = [[wrap(text, font, PICTURE_SIDE) for text in pair] for pair in pairs]
    cells = list(zip(pictures, texts, strict=True))
    columns = min(COLUMNS, len(cells))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    text_top = PICTURE_SIDE + GAP // 2
    heights = [text_top + max(_height(caption, reference) for _, (caption, reference) in row) for row in rows]
    size = (GAP + columns * (PICTURE_SIDE + GAP), GAP + sum(heights) + GAP * len(rows))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        for place, (picture, (caption, reference)) in enumerate(row):
            left = GAP + place * (PICTURE_SIDE + GAP)
            scale = PICTURE_SIDE / max(picture.size)
            width, length = (max(1, round(side * scale)) for side in picture.size)
            fitted = picture.resize((width, length), Image.Resampling.LANCZOS)
            sheet.paste(fitted, (left + (PICTURE_SIDE - width) // 2, top + (PICTURE_SIDE - length) // 2))
            # The frame shows where a white picture ends.
            draw.rectangle((left - 1, top - 1, left + PICTURE_SIDE, top + PICTURE_SIDE), outline=FRAME)
            below = top + text_top
            for lines, color in ((caption, INK), (reference, FAINT)):
                for line in lines:
                    draw.text((left, below), line, fill=color, font=font)
                    below += LINE_HEIGHT
                below += BETWEEN
        top += height + GAP
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")


def _height(caption: Sequence[str], reference: Sequence[str]) -> int:
    return LINE_HEIGHT * (len(caption) + len(reference)) + (BETWEEN if reference else 0)


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Breaks ``text`` into lines of at most ``width`` pixels.

    Lines break at white space; a single word that is too long is broken between letters. An empty text has
    no lines.
    """
    lines: list[str] = []
    line = ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if font.getlength(joined) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width and len(word) > 1:
            fits = (size for size in range(len(word) - 1, 1, -1) if font.getlength(word[:size]) <= width)
            cut = next(fits, 1)
            lines.append(word[:cut])
            word = word[cut:]
        line = word
    return [*lines, line] if line else lines
