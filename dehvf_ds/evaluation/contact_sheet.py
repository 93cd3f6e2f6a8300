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

    Args:
        pictures: RGB, at least one.
        captions: a text a picture, drawn dark.
        path: file to write; its folder is made if needed.
        references: a second text a picture, below in grey, for example the human caption.
    """
    font = ImageFont.load_default(size=FONT_SIZE)
    blocks = [_lines(texts, font) for texts in zip(captions, references, strict=True)]
    cells = list(zip(pictures, blocks, strict=True))
    columns = min(COLUMNS, len(cells))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    text_top = PICTURE_SIDE + GAP // 2
    heights = [text_top + max(block[-1][2] + LINE_HEIGHT if block else 0 for _, block in row) for row in rows]
    size = (GAP + columns * (PICTURE_SIDE + GAP), GAP + sum(heights) + GAP * len(rows))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        for place, (picture, block) in enumerate(row):
            left = GAP + place * (PICTURE_SIDE + GAP)
            scale = PICTURE_SIDE / max(picture.size)
            width, length = (max(1, round(side * scale)) for side in picture.size)
            fitted = picture.resize((width, length), Image.Resampling.LANCZOS)
            sheet.paste(fitted, (left + (PICTURE_SIDE - width) // 2, top + (PICTURE_SIDE - length) // 2))
            # The frame shows where a white picture ends.
            draw.rectangle((left - 1, top - 1, left + PICTURE_SIDE, top + PICTURE_SIDE), outline=FRAME)
            for line, color, below in block:
                draw.text((left, top + text_top + below), line, fill=color, font=font)
        top += height + GAP
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")


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


def _lines(
    texts: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> list[tuple[str, tuple[int, int, int], int]]:
    """Lines of a caption and its reference with their colours and how far below the first they stand."""
    found = []
    below = 0
    for text, color in zip(texts, (INK, FAINT), strict=True):
        for line in wrap(text, font, PICTURE_SIDE):
            found.append((line, color, below))
            below += LINE_HEIGHT
        # A third of a line between the two.
        below += LINE_HEIGHT // 3
    return found
