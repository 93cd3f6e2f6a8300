"""Contact sheets: pictures with what a model says of them, to be judged at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

PAPER = (255, 255, 255)
INK = (24, 24, 27)
FAINT = (113, 113, 122)
FRAME = (212, 212, 216)


def contact_sheet(
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    path: Path,
    *,
    columns: int = 4,
    references: Sequence[str] | None = None,
    picture_size: int = 224,
    font_size: int = 15,
    gap: int = 20,
) -> Path:
    """Write one PNG with every picture above its caption, in rows (layout ours).

    A picture is scaled to fit a square with its proportions kept. Captions wrap at the picture's width and
    are never cut: each row is as high as its longest text.

    Args:
        pictures: any mode; transparent parts show the paper.
        captions: one text a picture, drawn dark.
        path: file to write; its folder is made if needed.
        columns: pictures in a row; fewer pictures make a narrower sheet.
        references: a second text a picture, drawn below in grey, for example the human caption.
        picture_size: side of a picture's square in pixels.
        font_size: height of the text in pixels.
        gap: space around and between pictures in pixels.

    Returns:
        ``path``.

    Raises:
        ValueError: no picture, no column, or texts that are not one a picture.
    """
    if not pictures or columns < 1:
        raise ValueError("a contact sheet needs at least one picture and one column")
    texts = [captions] if references is None else [captions, references]
    if any(len(lines) != len(pictures) for lines in texts):
        raise ValueError(
            f"{len(pictures)} pictures need as many texts, got {[len(lines) for lines in texts]}"
        )

    font = ImageFont.load_default(size=font_size)
    line_height = round(1.35 * font_size)
    # Per picture, from top to bottom: (line, colour, how far below the first line it stands).
    blocks = [
        _stack(texts_of_one, font, picture_size, line_height) for texts_of_one in zip(*texts, strict=True)
    ]
    columns = min(columns, len(pictures))
    rows = [range(start, min(start + columns, len(pictures))) for start in range(0, len(pictures), columns)]
    text_top = picture_size + gap // 2
    heights = [
        text_top + max(blocks[index][-1][2] + line_height if blocks[index] else 0 for index in row)
        for row in rows
    ]

    width = gap + columns * (picture_size + gap)
    sheet = Image.new("RGB", (width, gap + sum(heights) + gap * len(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = gap
    for row, height in zip(rows, heights, strict=True):
        for place, index in enumerate(row):
            left = gap + place * (picture_size + gap)
            _paste_fitted(sheet, pictures[index], left, top, picture_size)
            for line, color, below in blocks[index]:
                draw.text((left, top + text_top + below), line, fill=color, font=font)
        top += height + gap
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")
    return path


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break ``text`` into lines of at most ``width`` pixels.

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
            cut = next(
                size
                for size in range(len(word) - 1, 0, -1)
                if size == 1 or font.getlength(word[:size]) <= width
            )
            lines.append(word[:cut])
            word = word[cut:]
        line = word
    return [*lines, line] if line else lines


def _stack(
    texts: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, line_height: int
) -> list[tuple[str, tuple[int, int, int], int]]:
    """Lines of a caption and its reference with colours and offsets, a third of a line between the two."""
    block: list[tuple[str, tuple[int, int, int], int]] = []
    below = 0
    for text, color in zip(texts, (INK, FAINT), strict=False):
        for line in wrap(text, font, width):
            block.append((line, color, below))
            below += line_height
        below += line_height // 3
    return block


def _paste_fitted(sheet: Image.Image, picture: Image.Image, left: int, top: int, side: int) -> None:
    """Paste ``picture``, scaled to fit and centred in a framed square, at (left, top)."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    fitted = picture.convert("RGBA").resize(size, Image.Resampling.LANCZOS)
    place = (left + (side - size[0]) // 2, top + (side - size[1]) // 2)
    sheet.paste(fitted, place, mask=fitted)
    # The frame shows where a white picture ends.
    box = (left - 1, top - 1, left + side, top + side)
    ImageDraw.Draw(sheet).rectangle(box, outline=FRAME)
