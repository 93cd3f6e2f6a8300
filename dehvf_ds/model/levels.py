"""Hierarchical visual features: hidden states of the frozen tower at several depths."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .configuration import ModelError, square_side
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
        states = hidden_states(tower, pixel_values.to(tower.dtype))
        num_patches = _num_patches(tower, pixel_values)
        stacked = torch.stack([_with_class_slot(states[level], num_patches) for level in levels], dim=1)
        return F.layer_norm(stacked, stacked.shape[-1:])


def hidden_states(
    tower: PreTrainedModel, pixel_values: Float[Tensor, "batch 3 height width"]
) -> tuple[Float[Tensor, "batch tokens vision_dim"], ...]:
    """What every block of a tower returns, the patch embeddings first.

    A tower whose position embeddings are of another grid than the pictures' interpolates them where it can.

    Raises:
        ModelError: these are not one token a patch, or the tower does not take such pictures.
    """
    given: dict[str, Any] = {}
    own_size = square_side(getattr(tower.config, "image_size", None))
    if own_size != pixel_values.shape[-1] and _can_interpolate(type(tower)):
        given["interpolate_pos_encoding"] = True
    states = tower(pixel_values, output_hidden_states=True, **given).hidden_states
    wanted = (pixel_values.shape[0], tower.config.hidden_size)
    num_patches = _num_patches(tower, pixel_values)
    for state in states:
        if state.ndim != 3 or (state.shape[0], state.shape[2]) != wanted or state.shape[1] < num_patches:
            raise ModelError(
                f"a {tower.config.model_type} tower gives hidden states of shape {list(state.shape)}, not "
                f"a token of {wanted[1]} values for each of {num_patches} patches, as CLIP and DINOv2 do"
            )
    return states


@lru_cache(maxsize=8)
def _can_interpolate(tower_class: type) -> bool:
    return "interpolate_pos_encoding" in inspect.signature(tower_class.forward).parameters


def _num_patches(tower: PreTrainedModel, pixel_values: Tensor) -> int:
    size = square_side(tower.config.patch_size)
    assert size is not None
    return (pixel_values.shape[-2] // size) * (pixel_values.shape[-1] // size)


def _with_class_slot(state: Tensor, num_patches: int) -> Tensor:
    patches = state[:, -num_patches:]
    has_class_token = state.shape[1] > num_patches
    first = state[:, :1] if has_class_token else patches.mean(dim=1, keepdim=True)
    return torch.cat([first, patches], dim=1)
