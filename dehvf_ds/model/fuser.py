"""The hierarchical visual fuser: which depths of the vision tower an LLM layer sees."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration import Bool, Float


class HierarchicalFuser(nn.Module):
    """Weighs the feature layers for every LLM layer and fuses them.

    Routers (the abstract of arXiv 2508.17638 speaks of weighing by layer; the forms are ours):

    - ``layer``: w_l = softmax(query_l . key_j / sqrt(k)). query_l comes from a learnable embedding of
      the layer through a small MLP; key_j is a bias-free map of feature layer j's class token, so the weights
      depend on the picture.
    - ``static``: one learned softmax per layer, the same for every picture.
    - ``last``: the deepest feature layer alone, without parameters.

    No router looks at the text: pooling over a sequence would show the answer's tokens in training.
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

        Rows without a picture are multiplied by 0, so that every parameter has a gradient there, too.
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
