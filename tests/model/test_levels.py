from __future__ import annotations

import pytest
import torch
from tiny_models import vision_config
from transformers import AutoModel, SiglipVisionConfig, SiglipVisionModel

from dehvf_ds.model import ModelError
from dehvf_ds.model.configuration import spaced_levels
from dehvf_ds.model.levels import visual_levels


@pytest.mark.parametrize(
    ("blocks", "levels", "expected"),
    [
        (12, 6, [2, 4, 6, 8, 10, 12]),
        (24, 6, [4, 8, 12, 16, 20, 24]),
        (4, 1, [4]),
        (4, 4, [1, 2, 3, 4]),
    ],
)
def test_spaced_levels_end_at_the_last_block(blocks: int, levels: int, expected: list[int]) -> None:
    assert spaced_levels(blocks, levels) == expected


def test_more_levels_than_blocks_are_refused() -> None:
    with pytest.raises(ModelError, match="6 vision levels asked of a tower with 4 blocks"):
        spaced_levels(4, 6)


@pytest.mark.parametrize("kind", ["clip", "dino"])
def test_levels_are_the_towers_hidden_states_brought_to_one_scale(kind: str) -> None:
    torch.manual_seed(0)
    tower = AutoModel.from_config(vision_config(kind)).eval()
    pixels = torch.randn(2, 3, 16, 16)
    features = visual_levels(tower, pixels, [1, 4])
    assert features.shape == (2, 2, 17, 24)
    assert not features.requires_grad
    state = tower(pixels, output_hidden_states=True).hidden_states[4]
    expected = (state - state.mean(-1, keepdim=True)) / (
        state.var(-1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    torch.testing.assert_close(features[:, 1], expected, rtol=1e-4, atol=1e-4)


def test_a_tower_without_class_token_has_its_mean_patch_there() -> None:
    torch.manual_seed(0)
    tower = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        )
    ).eval()
    pixels = torch.randn(2, 3, 16, 16)
    features = visual_levels(tower, pixels, [2])
    assert features.shape == (2, 1, 17, 24)
    state = tower(pixels, output_hidden_states=True).hidden_states[2].mean(dim=1)
    expected = torch.nn.functional.layer_norm(state, (24,))
    torch.testing.assert_close(features[:, 0, 0], expected, rtol=1e-4, atol=1e-4)
