"""What a processor takes for a picture and for prompts: the same pixels in whatever form, or one line."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import byte_tokenizer
from transformers import CLIPImageProcessorPil

from dehvf_ds.model import DehvfProcessor

PICTURE = Image.radial_gradient("L").resize((40, 30)).convert("RGB")


@pytest.fixture(scope="module")
def processor() -> DehvfProcessor:
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size)
    return DehvfProcessor(images, byte_tokenizer())


def test_every_form_gives_the_same_pixels_in_the_row_that_it_is_of(processor, tmp_path) -> None:
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    wanted = processor(images=PICTURE)["pixel_values"][0]
    data, path = file.getvalue(), tmp_path / "a.png"
    forms = [PICTURE, data, bytearray(data), path, str(path)]
    for given in forms:
        assert torch.equal(processor(images=given)["pixel_values"][0], wanted)
        found = processor(images=[None, given, [], [given]], text=["a"] * 4)
        assert found["has_image"].tolist() == [False, True, False, True]
        assert torch.equal(found["pixel_values"], torch.stack([0 * wanted, wanted, 0 * wanted, wanted]))
    assert "has_image" not in processor(images=forms)
    assert "pixel_values" not in processor(images=[None, None], text=["a", "b"])


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((4, 4, 3), np.uint8), r"a ndarray is no picture; give PIL's \(Image.fromarray"),
        (torch.zeros(3, 4, 4), "a Tensor is no picture"),
        (Path("/none/such.png"), "no picture can be read: .*/none/such.png"),
        (b"text", "no picture can be read"),
        (3, "a int is no picture"),
        ([[PICTURE, PICTURE]], "several pictures for one prompt"),
        ([PICTURE, PICTURE], "2 pictures for 1 prompts"),
    ],
)
def test_what_is_no_picture_of_a_row_is_refused(processor, picture, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(images=picture, text="a")
