"""Contact sheets: pictures in their places, texts below them, whole."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFont

from dehvf_ds.evaluation.contact_sheet import FAINT, GAP, INK, PAPER, PICTURE_SIDE, contact_sheet, wrap

RED, BLUE, BLACK = (200, 0, 0), (0, 0, 200), (0, 0, 0)


def test_every_picture_stands_above_its_texts(tmp_path):
    pictures = [Image.new("RGB", size, color) for size, color in (((50, 50), RED), ((500, 250), BLUE))]
    path = tmp_path / "new" / "sheet.png"
    contact_sheet(
        [*pictures, *pictures, pictures[0]],
        ["a caption", "a hill", "ill", "", ""],
        path,
        references=["Hill", *[""] * 4],
    )
    sheet = np.asarray(Image.open(path).convert("RGB"))
    step = PICTURE_SIDE + GAP
    assert sheet.shape[1] == GAP + 4 * step
    middle = GAP + PICTURE_SIDE // 2
    assert [tuple(sheet[middle, middle + i * step]) for i in range(4)] == [RED, BLUE, RED, BLUE]
    # Wider than high: fitted into its square, paper above it.
    assert tuple(sheet[2 * GAP, middle + step]) == PAPER
    # The fifth is below the first, beside it nothing.
    assert tuple(sheet[-middle, middle]) == RED
    assert (sheet[-step + GAP :, GAP + step :] == PAPER).all()

    def inks(i: int) -> set[tuple[int, ...]]:
        texts = sheet[step:-step, GAP + i * step : (i + 1) * step]
        return {color for color in (INK, FAINT) if (texts == color).all(axis=-1).any()}

    assert [inks(i) for i in range(4)] == [{INK, FAINT}, {INK}, {INK}, set()]


def test_wrapping_keeps_every_letter_within_the_width():
    font = ImageFont.load_default(size=15)
    text = "a large striped circle and pneumonoultramicroscopicsilicovolcanoconiosis on grey"
    lines = wrap(text, font, 120)
    assert len(lines) > 4
    assert all(font.getlength(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert wrap("  ", font, 120) == []
