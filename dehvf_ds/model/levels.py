"""Hierarchical visual features: hidden states of the frozen tower at several depths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .shapes import Float


def visual_levels(
    tower: PreTrainedModel,
    pixel_values: Float[Tensor, "batch 3 height width"],
    levels: Sequence[int],
) -> Float[Tensor, "batch levels slots vision_dim"]:
    """Runs the frozen tower and stacks the chosen depths, brought to one scale.

    Each level is layer-normed without weights, so that no depth outweighs another by its norm (ours).
    Slot 0 is the class token, the others are the patches. A tower without a class token has the mean of
    its patches in that place; register tokens are dropped.

    Args:
        tower: HF vision model that returns ``hidden_states``.
        pixel_values: pictures, normalised for the tower.
        levels: block numbers; 1 is the first block's output.

    Returns:
        The features, in the tower's dtype, without gradient.
    """
    with torch.no_grad():
        states = tower(pixel_values.to(tower.dtype), output_hidden_states=True).hidden_states
        num_patches = _num_patches(tower, pixel_values)
        stacked = torch.stack([_with_class_slot(states[level], num_patches) for level in levels], dim=1)
        return F.layer_norm(stacked, stacked.shape[-1:])


def _num_patches(tower: PreTrainedModel, pixel_values: Tensor) -> int:
    size = tower.config.patch_size
    return (pixel_values.shape[-2] // size) * (pixel_values.shape[-1] // size)


def _with_class_slot(state: Tensor, num_patches: int) -> Tensor:
    patches = state[:, -num_patches:]
    has_class_token = state.shape[1] > num_patches
    first = state[:, :1] if has_class_token else patches.mean(dim=1, keepdim=True)
    return torch.cat([first, patches], dim=1)
