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
from dehvf_ds.model.features import HierarchicalFuser, PrefixProjector, Projector, visual_features
from dehvf_ds.model.ffn import MemoryReader

Model = DehvfForConditionalGeneration


class PartedReader(MemoryReader):
    """The product's reader in parts that a variant replaces."""

    def forward(self, x: Tensor, memory: Any, scale_in: Tensor, scale_out: Tensor) -> Tensor:
        """As ``MemoryReader``, of an unprepared memory."""
        query = F.rms_norm(self.query(x, scale_in), self.w_query.shape[-1:], eps=ffn.QUERY_EPS) * scale_in
        read = self.read(query, self.keys(memory), memory + self.positions("value"))
        return self.result(read * scale_out, scale_in)

    def keys(self, memory: Tensor) -> Tensor:
        """Of the slots."""
        keys = memory + self.positions("key")
        return keys - keys.mean(dim=1, keepdim=True)

    def query(self, x: Tensor, scale_in: Tensor) -> Tensor:
        """What is normalised; a layer is known by its scales."""
        return x @ self.w_query

    def positions(self, of: str) -> Tensor:
        """Of keys or values, one a slot."""
        return self.key_positions if of == "key" else self.value_positions

    def weights(self, scores: Tensor) -> Tensor:
        """The function of the scores."""
        return F.silu(scores)

    def read(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The sum of values that a token reads."""
        return self.weights(query @ keys.transpose(1, 2) * keys.shape[-1] ** -0.5) @ values

    def result(self, read: Tensor, scale_in: Tensor) -> Tensor:
        """In the LLM's width."""
        return read @ self.w_out


def read_by(model: Model, reader: type[PartedReader], **settings: Any) -> Any:
    """Has the model read by another class, which decodes without a prepared memory, too."""
    model.reader.__class__ = reader
    for name, value in settings.items():
        setattr(model.reader, name, value)
    model.prepare_memory = lambda memory: memory  # type: ignore[method-assign]  # pyright: ignore
    return model.reader


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


class LevelsPrefix(PrefixProjector):
    """A prefix of all feature layers, side by side in every patch."""

    of: tuple[Model]

    def forward(self, patches: Tensor) -> Tensor:
        """Projects what the tower saw last, not only the layer that is passed."""
        (model,) = self.of
        pixels = patches.new_zeros(1, 1, 1, 1).expand(len(patches), 3, *2 * (model.config.image_size,))
        features = visual_features(model.vision_tower, pixels, model.config.feature_layers)
        return super().forward(features[:, :, 1:].transpose(1, 2).flatten(2))


def levels_prefix(model: Model, *, hidden: int) -> None:
    """All feature layers at the LLM's input (arXiv 2503.06063), by an MLP of this width."""
    projector = model.prefix_projector
    projector.__class__ = LevelsPrefix
    projector.of = (model,)
    dim, text_dim = projector.w_in.shape
    scale, dtype = projector.w_out.float().std() * text_dim**0.5, projector.w_out.dtype
    dim *= len(model.config.feature_layers)
    projector.w_in = nn.Parameter((torch.randn(dim, hidden) / dim**0.5).to(dtype))
    projector.b_in = nn.Parameter(torch.zeros(hidden, dtype=dtype))
    projector.w_out = nn.Parameter((torch.randn(hidden, text_dim) * (scale / hidden**0.5)).to(dtype))


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


class GatedFuser(HierarchicalFuser):
    """A gate for each layer and level instead of shares: 1/J at the start, any number later."""

    def _weights(self, class_tokens: Tensor) -> Tensor:
        levels = class_tokens.shape[1]
        if self.router == "static":
            return (1 / levels + self.router_logits.float()).expand(len(class_tokens), -1, -1)
        embedding = self.layer_embedding
        queries = embedding + F.silu(embedding @ self.w_hidden) @ self.w_query
        keys = class_tokens @ self.w_key
        scores = torch.einsum("lk,bjk->blj", queries.float(), keys.float()) / queries.shape[-1] ** 0.5
        return 1 / levels + scores


def level_gates(model: Model) -> None:
    """Level weights that do not compete."""
    model.fuser.__class__ = GatedFuser


class SlotsFuser(HierarchicalFuser):
    """No fusion: the slots of all levels lie side by side, J times as many, equal for all layers."""

    def forward(self, class_tokens: Tensor, projected: Tensor, has_image: Tensor) -> tuple[Tensor, Tensor]:
        """Gives every layer all levels' slots."""
        weights = self._weights(class_tokens)
        every = (projected * has_image.to(projected.dtype)[:, None, None, None]).flatten(1, 2)
        return every[:, None].expand(-1, self.num_layers, -1, -1), weights


class SlotsReader(PartedReader):
    """Reads the slots of all levels, which share their positions; or weighs levels for each token."""

    levels: int
    token_keys: nn.Parameter | None

    def positions(self, of: str) -> Tensor:
        """The same for every level."""
        return super().positions(of).repeat(self.levels, 1)

    def read(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """With ``token_keys`` each token weighs what it reads of every level."""
        scores = self.weights(query @ keys.transpose(1, 2) * keys.shape[-1] ** -0.5)
        if self.token_keys is not None:
            # Scales are left out of what the levels are weighed by.
            directions = F.rms_norm(query, query.shape[-1:])
            weights = (directions @ self.token_keys).float().softmax(dim=-1) * self.levels
            scores = (scores.unflatten(-1, (self.levels, -1)) * weights.to(scores.dtype)[..., None]).flatten(
                2
            )
        return scores @ values / self.levels


def all_slots(model: Model, *, token: bool = False) -> None:
    """Levels side by side in the memory; with ``token`` each token's FFN input weighs them."""
    model.fuser.__class__ = SlotsFuser
    levels, keys = len(model.config.feature_layers), None
    if token:
        start = torch.zeros(model.config.rank, levels, dtype=model.reader.w_query.dtype)
        keys = nn.Parameter(start)
    read_by(model, SlotsReader, levels=levels, token_keys=keys)


class OtherReader(PartedReader):
    """Reads with another function of the scores."""

    function: Callable[[Tensor], Tensor]

    def weights(self, scores: Tensor) -> Tensor:
        """Its own."""
        return self.function(scores)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu2": lambda scores: F.relu(scores).square(),
    # As large as SiLU's sum of slots would be.
    "softmax": lambda scores: scores.float().softmax(dim=-1).to(scores.dtype) * scores.shape[-1] ** 0.5,
}


def activation(model: Model, *, name: str) -> None:
    """Another function than SiLU on the scores."""
    read_by(model, OtherReader, function=FUNCTIONS[name])


class UncentredReader(PartedReader):
    """Scores that tell pictures rather than slots apart."""

    def keys(self, memory: Tensor) -> Tensor:
        """With what all slots have in common."""
        return memory + self.positions("key")


def uncentred_keys(model: Model) -> None:
    """Keys as they are, as the product read them before."""
    read_by(model, UncentredReader)


class NormedReader(PartedReader):
    """Reads have a size of their own."""

    norm: str

    def read(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """With ``norm`` sink a mean weighed by |A| and a slot of zeros, with rms brought to a size of 1."""
        weights = self.weights(query @ keys.transpose(1, 2) * keys.shape[-1] ** -0.5)
        read = weights @ values
        if self.norm == "rms":
            return F.rms_norm(read, read.shape[-1:], eps=1.0)
        return read / (1 + weights.abs().sum(dim=-1, keepdim=True))


def normed_read(model: Model, *, norm: str) -> None:
    """Reads whose size does not depend on the number of slots that a token reads."""
    read_by(model, NormedReader, norm=norm)


class HeadsReader(PartedReader):
    """Splits the rank among heads, which read for themselves."""

    heads: int

    def read(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Each head by its own scores."""
        query, keys, values = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (query, keys, values)
        )
        scores = query @ keys.transpose(2, 3) * keys.shape[-1] ** -0.5
        return (self.weights(scores) @ values).transpose(1, 2).flatten(2)


def heads(model: Model, *, number: int) -> None:
    """Several heads at the same rank."""
    read_by(model, HeadsReader, heads=number)


def router_start(model: Model, *, spread: float) -> None:
    """The router's layer embeddings start with a standard deviation of ``spread`` (0.1 in the product)."""
    model.fuser.layer_embedding.data.mul_(spread / 0.1)


def output_start(model: Model, *, spread: float) -> None:
    """The output map starts with a standard deviation of ``spread`` instead of zero."""
    model.reader.w_out.data.normal_(std=spread)


def key_positions(model: Model, *, spread: float) -> None:
    """The positions in the keys start with a standard deviation of ``spread`` (0.02 in the product)."""
    model.reader.key_positions.data.normal_(std=spread)


class GridReader(PartedReader):
    """Positions in rows and columns: that of a patch is the sum of its row's and its column's."""

    side: int

    def positions(self, of: str) -> Tensor:
        """The class token's, then the patches'."""
        first, rows, columns = super().positions(of).split([1, self.side, self.side])
        return torch.cat([first, (rows[:, None] + columns[None]).flatten(0, 1)])


def grid_positions(model: Model, *, spread: float = 0.02) -> None:
    """2-D positions instead of one a patch; those in the keys start with this standard deviation."""
    side = model.config.patches_per_side
    reader = read_by(model, GridReader, side=side)
    for name, deviation in (("key_positions", spread), ("value_positions", 0.0)):
        start = torch.randn(1 + 2 * side, model.config.rank) * deviation
        setattr(reader, name, nn.Parameter(start.to(reader.w_query.dtype)))


class MixedReader(PartedReader):
    """Queries and reads of a layer are mixed by low-rank maps of its own, q + (q U_l) V_l."""

    mixes: nn.ParameterList
    first_of: dict[int, int]

    def query(self, x: Tensor, scale_in: Tensor) -> Tensor:
        """Mixed before it is normalised."""
        return self._mixed(super().query(x, scale_in), self.first_of[id(scale_in)])

    def result(self, read: Tensor, scale_in: Tensor) -> Tensor:
        """Mixed before the output map."""
        return super().result(self._mixed(read, self.first_of[id(scale_in)] + 2), scale_in)

    def _mixed(self, values: Tensor, first: int) -> Tensor:
        return values + (values @ self.mixes[first]) @ self.mixes[first + 1]


def layer_mixes(model: Model, *, rank: int) -> None:
    """Low-rank maps that start at zero, two a layer."""
    width, dtype = model.config.rank, model.reader.w_query.dtype
    layers, maps = ffn.decoder_layers(model.language_model), []
    for _ in range(2 * len(layers)):
        maps += ((torch.randn(width, rank) / width**0.5).to(dtype), torch.zeros(rank, width, dtype=dtype))
    first_of = {id(layer.mlp.scale_in): 4 * number for number, layer in enumerate(layers)}
    read_by(model, MixedReader, mixes=nn.ParameterList(maps), first_of=first_of)


def memory_layers(model: Model, *, first: int) -> None:
    """Only the layers from this one on read the memory."""
    for layer in ffn.decoder_layers(model.language_model)[:first]:
        layer.mlp.read_by(lambda x, *_: x.new_zeros(()))
        layer.mlp.scale_in.requires_grad_(False)
        layer.mlp.scale_out.requires_grad_(False)


VARIANTS: dict[str, Callable[..., None]] = {
    one.__name__: one
    for one in (
        level_projector,
        own_projectors,
        levels_prefix,
        channel_router,
        level_gates,
        all_slots,
        activation,
        uncentred_keys,
        normed_read,
        heads,
        router_start,
        output_start,
        key_positions,
        grid_positions,
        layer_mixes,
        memory_layers,
    )
}
