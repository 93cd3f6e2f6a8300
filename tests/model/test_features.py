"""Feature layers of towers of many kinds: seen rightly, at sizes other than their own, or refused by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import text_config
from transformers import AutoConfig, AutoModel
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTEmbeddings

from dehvf_ds.model import DehvfConfig, ModelError
from dehvf_ds.model.configuration import spaced_layers
from dehvf_ds.model.features import hidden_states, visual_features
from dehvf_ds.model.trial import try_backbones

PICTURES = {"image_size": 32, "patch_size": 8}
SIZES = PICTURES | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
OWN_SIZES = {
    "beit": SIZES | {"use_relative_position_bias": True},
    "data2vec-vision": SIZES | {"use_relative_position_bias": True},
    "swin": PICTURES | {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    "aimv2_vision_model": SIZES | {"intermediate_size": 48},
}
GOOD = [
    *["clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers", "vit", "deit"],
    *["beit", "dinov3_vit", "ijepa", "data2vec-vision"],
]


def config_of(kind: str, pictures: int | None = None, **settings) -> DehvfConfig:
    tower = AutoConfig.for_model(kind, **(OWN_SIZES.get(kind, SIZES) | settings))
    return DehvfConfig(
        text_config=text_config(), vision_config=tower, rank=8, router_dim=4, image_size=pictures
    )


def test_spaced_layers_end_at_the_last_block() -> None:
    assert spaced_layers(12, 6) == [2, 4, 6, 8, 10, 12]
    assert spaced_layers(4, 1) == [4]


@pytest.mark.parametrize(
    ("kind", "settings", "num_class", "num_registers"),
    [
        ("clip_vision_model", {}, 1, 0),
        ("siglip_vision_model", {}, 0, 0),
        ("dinov2_with_registers", {}, 1, 4),
        ("dinov3_vit", {"num_register_tokens": 3}, 1, 3),
        ("dinov3_vit", {"num_register_tokens": 3}, 0, 3),
        ("radio", {}, 3, 7),
    ],
)
def test_features_are_the_class_token_or_mean_patch_and_the_patches_brought_to_one_scale(
    monkeypatch, kind: str, settings: dict, num_class: int, num_registers: int
) -> None:
    if kind == "dinov3_vit" and not num_class:
        real = DINOv3ViTEmbeddings.forward
        monkeypatch.setattr(DINOv3ViTEmbeddings, "forward", lambda self, *a, **k: real(self, *a, **k)[:, 1:])
    torch.manual_seed(0)
    tower = AutoModel.from_config(config_of(kind, 32, **settings).vision_config).eval()
    pixels = torch.randn(2, 3, 32, 32)
    features = visual_features(tower, pixels, [1, 2])
    assert not features.requires_grad
    state = hidden_states(tower, pixels)[2]
    assert state.shape[1] == num_class + num_registers + 16
    patches = state[:, -16:]
    first = state[:, :1] if num_class else patches.mean(1, keepdim=True)
    expected = F.layer_norm(torch.cat([first, patches], dim=1), (32,))
    torch.testing.assert_close(features[:, 1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("image_size", [None, 48, 16])
@pytest.mark.parametrize("kind", GOOD)
def test_a_tower_sees_pictures_of_any_size_of_whole_patches(kind: str, image_size: int | None) -> None:
    config = config_of(kind, image_size)
    try_backbones(config)
    tower = AutoModel.from_config(config.vision_config).eval()
    side = config.image_size
    features = visual_features(tower, torch.randn(2, 3, side, side), config.feature_layers)
    assert features.shape == (2, len(config.feature_layers), (side // 8) ** 2 + 1, 32)
    assert features.shape[2] == config.num_slots


@pytest.mark.parametrize(
    ("kind", "side", "settings", "message"),
    [
        ("vit_mae", 32, {}, r"shape \[1, \d+, 32\], not a token of 32 values for each of 16"),
        ("vit_mae", 32, {"mask_ratio": 0.0}, "gives other features at each call"),
        ("siglip2_vision_model", 32, {"num_patches": 16}, "cannot see 32 pixels: .*spatial_shapes"),
        ("swin", 32, {}, "a swin tower gives hidden states of shape"),
        ("aimv2_vision_model", 48, {}, "aimv2_vision_model model, cannot see 48 pixels"),
    ],
)
def test_a_tower_of_another_shape_is_refused(kind: str, side: int, settings: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        try_backbones(config_of(kind, side, **settings))


def test_a_tower_without_one_width_is_refused() -> None:
    with pytest.raises(ModelError, match="a convnext model is no tower of one width"):
        DehvfConfig(text_config=text_config(), vision_config=AutoConfig.for_model("convnext"))


def test_a_tower_that_takes_patches_by_columns_is_refused(monkeypatch) -> None:
    config = config_of("clip_vision_model")
    real = CLIPVisionEmbeddings.forward
    monkeypatch.setattr(
        CLIPVisionEmbeddings, "forward", lambda self, x, **more: real(self, x.transpose(2, 3), **more)
    )
    with pytest.raises(ModelError, match="one token for each patch of 8 pixels, row by row"):
        try_backbones(config)


def test_sizes_may_be_written_as_pairs() -> None:
    config = config_of("dinov2", None, image_size=[32, 32], patch_size=[8, 8])
    assert (config.image_size, config.patch_size, config.num_slots) == (32, 8, 17)
    with pytest.raises(ModelError, match="no fixed size of square patches"):
        config_of("dinov2", None, patch_size=[8, 16])


@pytest.mark.parametrize(("side", "given"), [(32, {}), (48, {"interpolate_pos_encoding": True})])
def test_interpolated_positions_are_the_towers_own(side: int, given: dict) -> None:
    """At its own size nothing is interpolated; at another the tower's own method is used."""
    tower = AutoModel.from_config(config_of("clip_vision_model").vision_config).eval()
    pixels = torch.randn(1, 3, side, side)
    with torch.no_grad():
        expected = tower(pixels, output_hidden_states=True, **given).hidden_states[-1]
        assert torch.equal(hidden_states(tower, pixels)[-1], expected)
