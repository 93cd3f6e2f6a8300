"""Hierarchical visual features: hidden states of the frozen tower at several depths, and their projection."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from .configuration import Float, ModelError, square_side


def visual_features(
    tower: PreTrainedModel, pixel_values: Float[Tensor, "batch 3 height width"], layers: Sequence[int]
) -> Float[Tensor, "batch feature_layers slots vision_dim"]:
    """Runs the frozen tower and stacks the chosen feature layers, in its dtype, without gradient.

    Layers are block numbers; 1 is the first block's output. Each is layer-normed without weights, so that no
    depth outweighs another by its norm (ours). Slot 0 is the class token, the others are the patches. A tower
    without a class token has the mean of its patches there; register tokens are dropped.
    """
    with torch.no_grad():
        states = hidden_states(tower, pixel_values.to(tower.dtype))
        num_patches = _num_patches(tower, pixel_values)
        stacked = torch.stack([_with_class_slot(states[layer], num_patches) for layer in layers], dim=1)
        return F.layer_norm(stacked, stacked.shape[-1:])


def hidden_states(
    tower: PreTrainedModel, pixel_values: Float[Tensor, "batch 3 height width"]
) -> tuple[Float[Tensor, "batch tokens vision_dim"], ...]:
    """What every block of a tower returns, the patch embeddings first; one token a patch at least.

    A tower whose position embeddings are of another grid than the pictures' interpolates them where it can.
    """
    given: dict[str, Any] = {}
    own_size, name = square_side(getattr(tower.config, "image_size", None)), "interpolate_pos_encoding"
    if own_size != pixel_values.shape[-1] and name in inspect.signature(type(tower).forward).parameters:
        given[name] = True
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


def _num_patches(tower: PreTrainedModel, pixel_values: Tensor) -> int:
    size = square_side(tower.config.patch_size)
    assert size is not None
    return (pixel_values.shape[-2] // size) * (pixel_values.shape[-1] // size)


def _with_class_slot(state: Tensor, num_patches: int) -> Tensor:
    patches = state[:, -num_patches:]
    has_class_token = state.shape[1] > num_patches
    first = state[:, :1] if has_class_token else patches.mean(dim=1, keepdim=True)
    return torch.cat([first, patches], dim=1)


class Projector(nn.Module):
    """Brings every feature layer into the memory's rank; shared by all of them and by all LLM layers (ours).

    Z = silu(V W_down + b), with V already layer-normed.
    """

    def __init__(self, vision_dim: int, rank: int) -> None:
        super().__init__()
        self.w_down = nn.Parameter(torch.randn(vision_dim, rank) / vision_dim**0.5)
        self.bias = nn.Parameter(torch.zeros(rank))

    def forward(
        self, features: Float[Tensor, "batch feature_layers slots vision_dim"]
    ) -> Float[Tensor, "batch feature_layers slots rank"]:
        """Projects once per picture."""
        return F.silu(features @ self.w_down + self.bias)


class PrefixProjector(nn.Module):
    """LLaVA's projector: a two-layer MLP from patches to tokens of the LLM (arXiv 2310.03744).

    Patches are average-pooled to ``num_tokens``, a square number; None keeps them all. What it makes has the
    standard deviation ``token_scale`` at the start, that of the LLM's own embeddings.
    """

    def __init__(self, vision_dim: int, text_dim: int, num_tokens: int | None, token_scale: float) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.w_in = nn.Parameter(torch.randn(vision_dim, text_dim) / vision_dim**0.5)
        self.b_in = nn.Parameter(torch.zeros(text_dim))
        self.w_out = nn.Parameter(torch.randn(text_dim, text_dim) * (token_scale / text_dim**0.5))
        self.b_out = nn.Parameter(torch.zeros(text_dim))

    def forward(
        self, patches: Float[Tensor, "batch patches vision_dim"]
    ) -> Float[Tensor, "batch prefix text_dim"]:
        """Projects one feature layer's patches."""
        if self.num_tokens is not None:
            batch, count, dim = patches.shape
            side, target = round(count**0.5), round(self.num_tokens**0.5)
            grid = patches.transpose(1, 2).reshape(batch, dim, side, side)
            patches = F.avg_pool2d(grid, side // target).flatten(2).transpose(1, 2)
        return F.gelu(patches @ self.w_in + self.b_in) @ self.w_out + self.b_out
