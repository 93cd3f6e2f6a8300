"""What a processor takes for a picture: the same pixels in whatever form, or one line."""

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
BYTES = np.asarray(PICTURE)
TENSOR = torch.from_numpy(BYTES.copy()).permute(2, 0, 1)


def png() -> bytes:
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def processor() -> DehvfProcessor:
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size)
    return DehvfProcessor(images, byte_tokenizer())


FORMS = {
    "rows first": BYTES,
    "channels first": BYTES.transpose(2, 0, 1),
    "shares of 1": BYTES / 255,
    "float bytes": BYTES.astype(np.float32),
    "whole numbers": BYTES.astype(np.int64),
    "grey": BYTES[..., 0],
    "one channel": BYTES[..., :1],
    "opaque": np.dstack([BYTES, np.full(BYTES.shape[:2], 255, np.uint8)]),
    "a batch of one": BYTES[None],
    "tensor": TENSOR,
    "tensor, rows first": TENSOR.permute(1, 2, 0),
    "tensor of shares": TENSOR / 255,
    "half precision": (TENSOR / 255).half(),
    "tensor of grey": TENSOR[:1],
    "batch of one tensor": TENSOR[None] / 255,
    "a file's bytes": png(),
    "a changeable file": bytearray(png()),
    "an open file": io.BytesIO(png()),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pixels(processor, form: str) -> None:
    wanted = processor(images=PICTURE)["pixel_values"]
    for given in (FORMS[form], [FORMS[form]]):
        if hasattr(FORMS[form], "seek"):
            FORMS[form].seek(0)
        # Half precision holds shares of 1 to a hundredth of a step of a byte and more.
        torch.testing.assert_close(processor(images=given)["pixel_values"], wanted, atol=0.03, rtol=0)


@pytest.mark.parametrize("batch", [np.stack([BYTES, 255 - BYTES]), torch.stack([TENSOR, 255 - TENSOR]) / 255])
def test_of_a_batch_each_is_a_rows_own(processor, batch) -> None:
    wanted = processor(images=[PICTURE, Image.fromarray(255 - BYTES)])["pixel_values"]
    torch.testing.assert_close(processor(images=batch, text=["a", "b"])["pixel_values"], wanted)
    with pytest.raises(ValueError, match="2 pictures for 1 prompts"):
        processor(images=batch, text="a")


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (BYTES / 127.5 - 1, "values from .* is no picture; give bytes, or shares of 1"),
        (BYTES.astype(np.float32) * 3, "values from .* is no picture"),
        (np.full((4, 4, 3), np.nan), "values from nan"),
        (np.zeros((5, 5, 2), np.uint8), r"shape \[5, 5, 2\] is no picture"),
        (np.zeros((0, 4, 3), np.uint8), "is no picture"),
        (np.zeros(3, np.uint8), "is no picture"),
        (Path("/none/such.png"), "no picture can be read: .*/none/such.png"),
        (b"text", "no picture can be read"),
        (3, "a int is no picture"),
        ({"bytes": b""}, "a dict is no picture"),
    ],
)
def test_what_is_no_picture_is_refused(processor, picture, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(images=picture, text="a")


def test_what_is_no_prompt_is_refused(processor) -> None:
    for text in (3, [], [None], [["a"]], PICTURE):
        with pytest.raises(ValueError, match="text is a prompt, or a list of prompts"):
            processor(text=text)
