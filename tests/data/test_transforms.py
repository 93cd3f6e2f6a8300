from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from dehvf_ds.config import UserError
from dehvf_ds.data.collate import build_image_transform

DINOV2 = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


@pytest.fixture
def tower(tmp_path):
    def make(config):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
        return tmp_path

    return make


def test_tower_of_dinov2(tower):
    own = build_image_transform(tower(DINOV2), None)
    assert own.image_size == 224
    transform = build_image_transform(tower(DINOV2), 98)
    pixels = transform(Image.new("RGB", (50, 30), (255, 0, 128)))
    assert (pixels.dtype, tuple(pixels.shape), transform.image_size) == (torch.float32, (3, 98, 98), 98)
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (128 / 255 - 0.406) / 0.225]
    torch.testing.assert_close(pixels.mean((1, 2)), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_image_size_is_edge_and_crop(tower):
    transform = build_image_transform(tower(DINOV2), 20)
    image = Image.new("RGB", (60, 20), (255, 255, 255))
    image.paste((0, 0, 0), (20, 0, 40, 20))
    assert transform(image).max() < 0  # the middle third and nothing else


@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "CLIPImageProcessorFast", "SiglipImageProcessor"])
@pytest.mark.parametrize("size", [None, 32])
def test_other_towers(tower, kind, size):
    transform = build_image_transform(tower({"image_processor_type": kind}), size)
    assert transform(Image.new("RGB", (50, 30))).shape == (3, size or 224, size or 224)


def test_tower_without_its_file(tmp_path):
    with pytest.raises(UserError, match=r"no preprocessor_config.json; copy it"):
        build_image_transform(tmp_path, 224)


def test_file_of_no_processor(tower):
    with pytest.raises(UserError, match="no usable image processor"):
        build_image_transform(tower({"image_processor_type": "NoSuchProcessor"}), 224)


def test_tower_that_gives_no_square(tower):
    config = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}
    with pytest.raises(UserError, match=r"not one square; set model\.image_size"):
        build_image_transform(tower(config), None)
    assert build_image_transform(tower(config), 32).image_size == 32
