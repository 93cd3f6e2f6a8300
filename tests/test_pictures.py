"""Contact sheets: size, wrapping, and that pictures and texts are where they belong."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from dehvf_ds.insight.pictures import FAINT, INK, PAPER, contact_sheet, wrap

RED, BLUE = (200, 0, 0), (0, 0, 200)


def has_color(pixels: np.ndarray, color: tuple[int, int, int]) -> bool:
    return bool((pixels == np.array(color)).all(axis=-1).any())


def test_sheet_has_pictures_in_rows_with_text_below(tmp_path):
    pictures = [
        Image.new("RGB", (50, 50), RED),
        Image.new("RGB", (50, 25), BLUE),
        Image.new("L", (10, 10), 0),
    ]
    path = contact_sheet(
        pictures, ["one", "two", "three"], tmp_path / "new" / "sheet.png", columns=2, picture_size=100, gap=10
    )
    sheet = np.asarray(Image.open(path))
    line = round(1.35 * 15)
    row = 100 + 5 + line
    assert sheet.shape == (10 + 2 * (row + 10), 10 + 2 * 110, 3)
    assert tuple(sheet[60, 60]) == RED
    # Wider than high: fitted in its square, paper above it.
    assert tuple(sheet[60, 170]) == BLUE
    assert tuple(sheet[20, 170]) == PAPER
    captions = sheet[115 : 115 + line]
    assert (captions[:, 10:110] < 128).any()
    assert (captions[:, 120:220] < 128).any()
    # The fourth place is empty.
    assert (sheet[10 + row + 10 :, 121:] == 255).all()


def test_reference_is_grey_and_rows_grow_with_text(tmp_path):
    picture = Image.new("RGB", (20, 20), RED)
    arguments = {"pictures": [picture], "captions": ["a red picture"], "picture_size": 100, "font_size": 40}
    plain = np.asarray(Image.open(contact_sheet(path=tmp_path / "a.png", **arguments)))
    paired = np.asarray(
        Image.open(contact_sheet(path=tmp_path / "b.png", references=["a square"], **arguments))
    )
    assert paired.shape[0] > plain.shape[0]
    assert has_color(plain, INK)
    assert not has_color(plain, FAINT)
    assert has_color(paired, FAINT)


def test_columns_shrink_to_the_pictures_and_empty_captions_are_allowed(tmp_path):
    path = contact_sheet([Image.new("RGBA", (9, 9))], [""], tmp_path / "one.png", picture_size=50, gap=6)
    with Image.open(path) as sheet:
        assert sheet.size == (62, 6 + 50 + 3 + 6)


def test_wrapping_keeps_every_letter_within_the_width():
    font = ImageFont.load_default(size=15)
    text = "a large striped circle and pneumonoultramicroscopicsilicovolcanoconiosis on grey"
    lines = wrap(text, font, 120)
    assert len(lines) > 4
    assert all(font.getlength(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert wrap("  ", font, 120) == []


@pytest.mark.parametrize(("count", "captions", "columns"), [(0, [], 4), (1, ["a"], 0), (1, [], 4)])
def test_misuse_raises(tmp_path, count, captions, columns):
    with pytest.raises(ValueError, match="picture"):
        contact_sheet([Image.new("RGB", (4, 4))] * count, captions, tmp_path / "x.png", columns=columns)
