"""Vision towers of other shapes: seen rightly, at sizes other than their own, or refused by name."""

from __future__ import annotations

import pytest
import torch
from tiny_models import text_config
from transformers import AutoConfig, AutoModel

from dehvf_ds.model import DehvfConfig, ModelError
from dehvf_ds.model.levels import hidden_states, visual_levels
from dehvf_ds.model.trial import try_backbones

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
GOOD = [
    *["clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers", "vit", "deit"],
    *["beit", "dinov3_vit", "ijepa", "data2vec-vision"],
]


def config_of(kind: str, pictures: int | None = None, **settings) -> DehvfConfig:
    sizes = SIZES if kind not in ("beit", "data2vec-vision") else SIZES | {"use_relative_position_bias": True}
    if kind == "videomae":
        sizes = SIZES | {"num_frames": 2}
    if kind == "swin":
        sizes = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
        sizes |= {"window_size": 2}
    tower = AutoConfig.for_model(kind, **(sizes | settings))
    return DehvfConfig(
        text_config=text_config(), vision_config=tower, rank=8, router_dim=4, image_size=pictures
    )


@pytest.mark.parametrize("image_size", [None, 48, 16])
@pytest.mark.parametrize("kind", GOOD)
def test_a_tower_sees_pictures_of_any_size_of_whole_patches(kind: str, image_size: int | None) -> None:
    config = config_of(kind, image_size)
    try_backbones(config)
    tower = AutoModel.from_config(config.vision_config).eval()
    side = config.image_size
    features = visual_levels(tower, torch.randn(2, 3, side, side), config.levels)
    assert features.shape == (2, len(config.levels), (side // 8) ** 2 + 1, 32)
    assert features.shape[2] == config.num_slots


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("vit_mae", {}, r"hidden states of shape \[1, \d+, 32\], not a token of 32 values for each of 16"),
        ("vit_mae", {"mask_ratio": 0.0}, "sees something else at each look"),
        ("videomae", {}, "the vision tower, a videomae model, cannot see 32 pixels"),
        ("siglip2_vision_model", {"num_patches": 16}, "cannot see 32 pixels: .*spatial_shapes"),
        ("swin", {}, "a swin tower gives hidden states of shape"),
    ],
)
def test_a_tower_of_another_shape_is_refused(kind: str, settings: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        try_backbones(config_of(kind, 32, **settings))


@pytest.mark.parametrize("kind", ["convnext", "resnet", "hiera"])
def test_a_tower_without_one_width_is_refused(kind: str) -> None:
    with pytest.raises(ModelError, match=f"a {kind} model is no tower of one width"):
        DehvfConfig(text_config=text_config(), vision_config=AutoConfig.for_model(kind))


def test_a_tower_that_cannot_interpolate_is_refused_and_its_size_stands_in_the_message() -> None:
    tower = AutoConfig.for_model("aimv2_vision_model", **SIZES, intermediate_size=48)
    config = DehvfConfig(text_config=text_config(), vision_config=tower, image_size=48)
    with pytest.raises(ModelError, match="aimv2_vision_model model, cannot see 48 pixels"):
        try_backbones(config)


def test_a_tower_that_takes_patches_by_columns_is_refused(monkeypatch) -> None:
    config = config_of("clip_vision_model")
    from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

    real = CLIPVisionEmbeddings.forward
    monkeypatch.setattr(
        CLIPVisionEmbeddings, "forward", lambda self, x, **more: real(self, x.transpose(2, 3), **more)
    )
    with pytest.raises(ModelError, match="one token for each patch of 8 pixels, row by row"):
        try_backbones(config)


def test_sizes_may_be_written_as_pairs() -> None:
    config = config_of("dinov2", None, image_size=[32, 32], patch_size=[8, 8])
    assert (config.image_size, config.patch_size, config.num_slots) == (32, 8, 17)
    with pytest.raises(ModelError, match="no one size of square patches"):
        config_of("dinov2", None, patch_size=[8, 16])


def test_interpolated_positions_are_the_towers_own() -> None:
    """At its own size nothing is interpolated; at another the tower's own method is used."""
    tower = AutoModel.from_config(config_of("clip_vision_model").vision_config).eval()
    own, other = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(
            hidden_states(tower, own)[-1], tower(own, output_hidden_states=True).hidden_states[-1]
        )
        expected = tower(other, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-1]
        assert torch.equal(hidden_states(tower, other)[-1], expected)
