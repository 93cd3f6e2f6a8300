"""From pictures to features: the frozen tower's hidden states at several depths, projected and fused."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from .configuration import Bool, Float, ModelError, square_side


def visual_features(
    tower: PreTrainedModel, pixel_values: Float[Tensor, "batch 3 height width"], layers: Sequence[int]
) -> Float[Tensor, "batch feature_layers slots vision_dim"]:
    """Runs the frozen tower and stacks the chosen feature layers, in its dtype, without gradient.

    Layers are block numbers; 1 is the first block's output. Each is layer-normed without weights, so that no
    depth outweighs another by its norm (ours). Slot 0 is the class token, the others are the patches. For a
    tower without a class token slot 0 is the mean of its patches; register tokens are dropped.
    """
    with torch.no_grad():
        states = hidden_states(tower, pixel_values.to(tower.dtype))
        stacked = torch.stack([_slots(tower, states[layer], pixel_values) for layer in layers], dim=1)
        return F.layer_norm(stacked, stacked.shape[-1:])


def hidden_states(
    tower: PreTrainedModel, pixel_values: Float[Tensor, "batch 3 height width"]
) -> tuple[Float[Tensor, "batch tokens vision_dim"], ...]:
    """The output of every block of a tower, the patch embeddings first; at least one token a patch.

    For pictures of another size than its own, a tower that can do so interpolates its position embeddings.
    """
    settings: dict[str, Any] = {}
    own_size, name = square_side(getattr(tower.config, "image_size", None)), "interpolate_pos_encoding"
    if own_size != pixel_values.shape[-1] and name in inspect.signature(type(tower).forward).parameters:
        settings[name] = True
    states = tower(pixel_values, output_hidden_states=True, **settings).hidden_states
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


def _slots(tower: PreTrainedModel, state: Tensor, pixel_values: Tensor) -> Tensor:
    num_patches = _num_patches(tower, pixel_values)
    patches = state[:, -num_patches:]
    # Class tokens come first, then registers (DINOv2, DINOv3, RADIO), then patches.
    registers = [getattr(tower.config, name, None) or 0 for name in ("num_register_tokens", "num_registers")]
    has_class_token = state.shape[1] > num_patches + max(registers)
    first = state[:, :1] if has_class_token else patches.mean(dim=1, keepdim=True)
    return torch.cat([first, patches], dim=1)


class Projector(nn.Module):
    """Projects every feature layer to the memory's rank; shared by all feature layers and LLM layers (ours).

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

    Patches are average-pooled to ``num_tokens``, a square number; None keeps them all. At the start its
    output has the standard deviation ``token_scale``, that of the LLM's own embeddings.
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


class HierarchicalFuser(nn.Module):
    """Weighs the tower's feature layers for every LLM layer and sums them.

    Routers (the abstract of arXiv 2508.17638 mentions weights per layer; the formulas are ours):

    - ``layer``: w_l = softmax(query_l . key_j / sqrt(k)). query_l comes from a learnable embedding of
      the layer through a small MLP; key_j is a bias-free map of feature layer j's class token, so the weights
      depend on the picture.
    - ``static``: one learned softmax per layer, the same for every picture.
    - ``last``: the deepest feature layer alone, without parameters.

    No router sees the text: pooling over a sequence would leak the answer's tokens in training.
    """

    def __init__(
        self, num_layers: int, num_feature_layers: int, vision_dim: int, router_dim: int, router: str
    ) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.router = router
        if router == "layer":
            self.layer_embedding = nn.Parameter(torch.randn(num_layers, router_dim) * 0.1)
            # Zero at the start: the query is then the embedding itself.
            self.w_hidden = nn.Parameter(torch.randn(router_dim, router_dim) / router_dim**0.5)
            self.w_query = nn.Parameter(torch.zeros(router_dim, router_dim))
            self.w_key = nn.Parameter(torch.randn(vision_dim, router_dim) / vision_dim**0.5)
        elif router == "static":
            self.router_logits = nn.Parameter(torch.zeros(num_layers, num_feature_layers))

    def forward(
        self,
        class_tokens: Float[Tensor, "batch feature_layers vision_dim"],
        projected: Float[Tensor, "batch feature_layers slots rank"],
        has_image: Bool[Tensor, " batch"],
    ) -> tuple[Float[Tensor, "batch layers slots rank"], Float[Tensor, "batch layers feature_layers"]]:
        """Fuses for all LLM layers at once; returns their memory S and the weights, which sum to 1.

        Rows without a picture are multiplied by 0, so that they give every parameter a gradient, too.
        """
        weights = self._weights(class_tokens)
        batch, num_feature_layers, slots, rank = projected.shape
        masked = weights.to(projected.dtype) * has_image.to(projected.dtype)[:, None, None]
        fused = masked @ projected.reshape(batch, num_feature_layers, slots * rank)
        return fused.reshape(batch, self.num_layers, slots, rank), weights

    def _weights(self, class_tokens: Tensor) -> Tensor:
        batch, num_feature_layers, _ = class_tokens.shape
        if self.router == "layer":
            embedding = self.layer_embedding
            queries = embedding + F.silu(embedding @ self.w_hidden) @ self.w_query
            keys = class_tokens @ self.w_key
            scores = torch.einsum("lk,bjk->blj", queries.float(), keys.float()) / queries.shape[-1] ** 0.5
            return scores.softmax(dim=-1)
        if self.router == "static":
            return self.router_logits.float().softmax(dim=-1).expand(batch, -1, -1)
        assert self.router == "last", self.router
        last = torch.zeros(num_feature_layers, device=class_tokens.device)
        last[-1] = 1.0
        return last.expand(batch, self.num_layers, num_feature_layers)
