"""Other ways to build the visual branch, which the product does not have: each changes a built model.

An arm names them under ``variants``, with their options. What wins here moves into ``dehvf_ds/model``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dehvf_ds.model import DehvfForConditionalGeneration, ffn
from dehvf_ds.model.features import HierarchicalFuser, Projector
from dehvf_ds.model.ffn import MemoryReader

Model = DehvfForConditionalGeneration


class LevelProjector(Projector):
    """Z_j = silu(V_j W + b_j) * g_j: what tells the levels apart may differ for each value of the rank."""

    level_bias: nn.Parameter
    level_gate: nn.Parameter

    def forward(self, features: Tensor) -> Tensor:
        """Projects every level with its own bias and gate."""
        projected = features @ self.w_down + self.bias + self.level_bias[:, None]
        return F.silu(projected) * self.level_gate[:, None]


def level_projector(model: Model, *, spread: float = 0.0) -> None:
    """Biases of levels start with a standard deviation of ``spread``, gates at 1."""
    projector = model.projector
    projector.__class__ = LevelProjector
    shape, like = (len(model.config.feature_layers), model.config.rank), projector.bias
    projector.level_bias = nn.Parameter((torch.randn(shape) * spread).to(like.dtype))
    projector.level_gate = nn.Parameter(torch.ones(shape, dtype=like.dtype))


class OwnProjectors(Projector):
    """Z_j = silu(V_j W_j + b_j): a map of its own for every level."""

    w_levels: nn.Parameter
    b_levels: nn.Parameter

    def forward(self, features: Tensor) -> Tensor:
        """Projects every level with its own map."""
        return F.silu(features @ self.w_levels + self.b_levels[:, None])


def own_projectors(model: Model) -> None:
    """As many maps as levels."""
    projector, levels = model.projector, len(model.config.feature_layers)
    projector.__class__ = OwnProjectors
    dim, rank = projector.w_down.shape
    dtype = projector.w_down.dtype
    projector.w_levels = nn.Parameter((torch.randn(levels, dim, rank) / dim**0.5).to(dtype))
    projector.b_levels = nn.Parameter(torch.zeros(levels, rank, dtype=dtype))
    del projector.w_down, projector.bias


class ChannelFuser(HierarchicalFuser):
    """Every value of the rank weighs the levels for itself, in every layer: w [layers, levels, rank]."""

    channel_logits: nn.Parameter

    def forward(self, class_tokens: Tensor, projected: Tensor, has_image: Tensor) -> tuple[Tensor, Tensor]:
        """The router's weights times those of the values, made to sum to 1 again."""
        weights = self._weights(class_tokens)
        weights = (weights[..., None].log() + self.channel_logits.float()).softmax(dim=2)
        masked = weights.to(projected.dtype) * has_image.to(projected.dtype)[:, None, None, None]
        return torch.einsum("bljr,bjmr->blmr", masked, projected), weights.mean(dim=-1)


def channel_router(model: Model, *, spread: float = 1.0) -> None:
    """Logits start with a standard deviation of ``spread``."""
    fuser, config = model.fuser, model.config
    fuser.__class__ = ChannelFuser
    shape = (config.num_layers, len(config.feature_layers), config.rank)
    fuser.channel_logits = nn.Parameter((torch.randn(shape) * spread).to(model.reader.w_query.dtype))


class SlotsFuser(HierarchicalFuser):
    """No fusion: the slots of all levels lie side by side, J times as many, equal for all layers."""

    def forward(self, class_tokens: Tensor, projected: Tensor, has_image: Tensor) -> tuple[Tensor, Tensor]:
        """Gives every layer all levels' slots."""
        weights = self._weights(class_tokens)
        every = (projected * has_image.to(projected.dtype)[:, None, None, None]).flatten(1, 2)
        return every[:, None].expand(-1, self.num_layers, -1, -1), weights


class SlotsReader(MemoryReader):
    """Reads the slots of all levels, which share their positions; or weighs levels for each token."""

    levels: int
    token_keys: nn.Parameter | None

    def forward(self, x: Tensor, memory: Any, scale_in: Tensor, scale_out: Tensor) -> Tensor:
        """As ``MemoryReader``; with ``token_keys`` each token weighs what it reads of every level."""
        projected = x @ self.w_query
        query = F.rms_norm(projected, self.w_query.shape[-1:], eps=ffn.QUERY_EPS)
        keys = memory + self.key_positions.repeat(self.levels, 1)
        values = memory + self.value_positions.repeat(self.levels, 1)
        scores = F.silu((query * scale_in) @ keys.transpose(1, 2) * memory.shape[-1] ** -0.5)
        if self.token_keys is not None:
            weights = (query @ self.token_keys).float().softmax(dim=-1) * self.levels
            each = scores.unflatten(-1, (self.levels, -1)) * weights.to(scores.dtype)[..., None]
            scores = each.flatten(2)
        return ((scores @ values / self.levels) * scale_out) @ self.w_out


def all_slots(model: Model, *, token: bool = False) -> None:
    """Levels side by side in the memory; with ``token`` each token's FFN input weighs them."""
    model.fuser.__class__ = SlotsFuser
    reader, levels = model.reader, len(model.config.feature_layers)
    reader.__class__ = SlotsReader
    reader.levels, reader.token_keys = levels, None
    if token:
        reader.token_keys = nn.Parameter(torch.zeros(model.config.rank, levels, dtype=reader.w_query.dtype))
    model.prepare_memory = lambda memory: memory  # type: ignore[method-assign]  # pyright: ignore


class OtherReader(MemoryReader):
    """Reads with another function of the scores."""

    function: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor, memory: Any, scale_in: Tensor, scale_out: Tensor) -> Tensor:
        """As ``MemoryReader``."""
        query = F.rms_norm(x @ self.w_query, self.w_query.shape[-1:], eps=ffn.QUERY_EPS) * scale_in
        scores = query @ (memory + self.key_positions).transpose(1, 2) * memory.shape[-1] ** -0.5
        read = self.function(scores) @ (memory + self.value_positions)
        return (read * scale_out) @ self.w_out


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu2": lambda scores: F.relu(scores).square(),
    "softmax": lambda scores: scores.float().softmax(dim=-1).to(scores.dtype) * scores.shape[-1] ** 0.5,
    "none": lambda scores: scores,
}


def activation(model: Model, *, name: str) -> None:
    """Another function than SiLU on the scores."""
    model.reader.__class__ = OtherReader
    model.reader.function = FUNCTIONS[name]
    model.prepare_memory = lambda memory: memory  # type: ignore[method-assign]  # pyright: ignore


def router_start(model: Model, *, spread: float) -> None:
    """The router's layer embeddings start with a standard deviation of ``spread`` (0.1 in the product)."""
    model.fuser.layer_embedding.data.mul_(spread / 0.1)


def output_start(model: Model, *, spread: float) -> None:
    """The output map starts with a standard deviation of ``spread`` instead of zero."""
    model.reader.w_out.data.normal_(std=spread)


def key_positions(model: Model, *, spread: float) -> None:
    """The positions in the keys start with a standard deviation of ``spread`` (0.02 in the product)."""
    model.reader.key_positions.data.normal_(std=spread)


class GridReader(MemoryReader):
    """Positions in rows and columns: that of a patch is the sum of its row's and its column's."""

    side: int

    def __getattr__(self, name: str) -> Any:
        """The positions of all slots, of which the reader's code knows."""
        if name in ("key_positions", "value_positions"):
            first, rows, columns = (
                super().__getattr__(name.replace("_", "_grid_")).split([1, self.side, self.side])
            )
            return torch.cat([first, (rows[:, None] + columns[None]).flatten(0, 1)])
        return super().__getattr__(name)


def grid_positions(model: Model, *, spread: float = 0.02) -> None:
    """2-D positions instead of one a patch; those in the keys start with this standard deviation."""
    reader, side = model.reader, model.config.patches_per_side
    reader.__class__ = GridReader
    reader.side = side
    for name, deviation in (
        ("key_grid_positions", spread),
        ("value_grid_positions", 0.0),
    ):
        delattr(reader, name.replace("_grid", ""))
        start = torch.randn(1 + 2 * side, model.config.rank) * deviation
        setattr(reader, name, nn.Parameter(start.to(reader.w_query.dtype)))


class MixedReader(MemoryReader):
    """Queries and reads of a layer are mixed by low-rank maps of its own, q + (q U_l) V_l."""

    mixes: nn.ParameterDict

    def forward(self, x: Tensor, memory: Any, scale_in: Tensor, scale_out: Tensor) -> Tensor:
        """As ``MemoryReader``; a layer is known by its scales."""
        down, up, down_out, up_out = self.of_layer[id(scale_in)]  # pyright: ignore
        query = x @ self.w_query
        query = query + (query @ down) @ up
        query = F.rms_norm(query, self.w_query.shape[-1:], eps=ffn.QUERY_EPS) * scale_in
        scores = query @ (memory + self.key_positions).transpose(1, 2) * memory.shape[-1] ** -0.5
        read = (F.silu(scores) @ (memory + self.value_positions)) * scale_out
        return (read + (read @ down_out) @ up_out) @ self.w_out


def layer_mixes(model: Model, *, rank: int) -> None:
    """Low-rank maps that start at zero, two a layer."""
    reader, width, dtype = model.reader, model.config.rank, model.reader.w_query.dtype
    reader.__class__ = MixedReader
    reader.of_layer = {}
    for number, layer in enumerate(ffn.decoder_layers(model.language_model)):
        maps = []
        for kind in ("query", "read"):
            down = torch.randn(width, rank) / width**0.5
            for name, start in (("down", down), ("up", torch.zeros(rank, width))):
                parameter = nn.Parameter(start.to(dtype))
                reader.register_parameter(f"{kind}_{name}_{number}", parameter)
                maps.append(parameter)
        reader.of_layer[id(layer.mlp.scale_in)] = maps
    model.prepare_memory = lambda memory: memory  # type: ignore[method-assign]  # pyright: ignore


def memory_layers(model: Model, *, first: int) -> None:
    """Only the layers from this one on read the memory."""
    for layer in list(ffn.decoder_layers(model.language_model))[:first]:
        layer.mlp.read_by(lambda x, *_: x.new_zeros(()))
        layer.mlp.scale_in.requires_grad_(False)
        layer.mlp.scale_out.requires_grad_(False)


VARIANTS: dict[str, Callable[..., None]] = {
    one.__name__: one
    for one in (
        level_projector,
        own_projectors,
        channel_router,
        all_slots,
        activation,
        router_start,
        output_start,
        key_positions,
        grid_positions,
        layer_mixes,
        memory_layers,
    )
}
