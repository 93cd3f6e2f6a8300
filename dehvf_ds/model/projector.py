"""Maps visual features into the language model's side: to the memory's rank, or to prefix tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .shapes import Float


class Projector(nn.Module):
    """Brings every level into the memory's rank; shared by all levels and LLM layers (ours).

    Z = silu(V W_down + b), with V already layer-normed.

    Args:
        vision_dim: width of the vision tower.
        rank: width r of the visual memory.
    """

    def __init__(self, vision_dim: int, rank: int) -> None:
        super().__init__()
        self.w_down = nn.Parameter(torch.randn(vision_dim, rank) / vision_dim**0.5)
        self.bias = nn.Parameter(torch.zeros(rank))

    def forward(
        self, features: Float[Tensor, "batch levels slots vision_dim"]
    ) -> Float[Tensor, "batch levels slots rank"]:
        """Projects once per picture."""
        return F.silu(features @ self.w_down + self.bias)


class PrefixProjector(nn.Module):
    """LLaVA's projector: a two-layer MLP from patches to tokens of the LLM (arXiv 2310.03744).

    Args:
        vision_dim: width of the vision tower.
        text_dim: width of the language model.
        num_tokens: tokens to pool the patches to, a square number; None keeps every patch.
        token_scale: initial standard deviation of a produced token's entries, that of the LLM's own
            embeddings, so that the frozen LLM meets tokens of a familiar size.
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
        """Projects one level's patches, after average pooling to ``num_tokens``."""
        if self.num_tokens is not None:
            patches = _pool_square(patches, self.num_tokens)
        return F.gelu(patches @ self.w_in + self.b_in) @ self.w_out + self.b_out


def _pool_square(patches: Tensor, num_tokens: int) -> Tensor:
    batch, count, dim = patches.shape
    side, target = round(count**0.5), round(num_tokens**0.5)
    grid = patches.transpose(1, 2).reshape(batch, dim, side, side)
    return F.avg_pool2d(grid, side // target).flatten(2).transpose(1, 2)
