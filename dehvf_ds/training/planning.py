"""What a run costs before it runs: memory, arithmetic and traffic, one function a formula (ours).

Numbers of elements come from the model on the meta device; all else follows from shapes. What autograd
keeps was read off the forward of the HF decoders (RMSNorm in fp32, rotary SDPA attention, gated FFN), what
ZeRO-3 gathers and keeps off DeepSpeed 0.19.8; tests hold both against what really happens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from dehvf_ds.model import DehvfForConditionalGeneration
from dehvf_ds.model.adapters import decoder_layers
from dehvf_ds.training.metrics import model_flops

GIB = 2**30
FP32_BYTES = 4

Strategy = Literal["ZeRO-3", "ZeRO-3 + hpZ", "ZeRO-3 + offload", "ZeRO-2"]
STRATEGIES: tuple[Strategy, ...] = ("ZeRO-3", "ZeRO-3 + hpZ", "ZeRO-3 + offload", "ZeRO-2")
PREFERENCE: tuple[Strategy, ...] = ("ZeRO-2", "ZeRO-3", "ZeRO-3 + hpZ", "ZeRO-3 + offload")
"""Among equally fast ones, the first: it leans least on links and hosts being as fast as assumed."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes of a model, as the formulas need them.

    Attributes:
        language: frozen parameters of the decoder.
        tower: frozen parameters of the vision tower; 0 where the model has none.
        trainable: parameters that train.
        lora: of these, in the FFN adapters.
        largest: parameters of the largest frozen tensor.
        persistent: frozen parameters in tensors small enough that ZeRO-3 keeps them whole.
        persistent_tower: of these, in the tower.
        layers: decoder layers L.
        dim: decoder width d.
        heads: attention heads.
        attention_dim: heads times their width.
        ffn_dim: width of the FFN.
        vocab: size of the vocabulary.
        lora_rank: rank of the adapters, 0 without.
        lora_inputs: input widths of the adapted linear maps of one FFN.
        lora_dropout: whether the adapters drop inputs out.
        fusion: ``ffn``, ``prefix`` or ``none``.
        rank: width r of the visual memory.
        levels: vision levels J.
        slots: visual tokens M of a level.
        prefix: visual tokens before the text, 0 but for ``prefix``.
        vision_dim: width of the tower.
        vision_blocks: blocks of the tower.
        image_size: side of the picture in pixels.
    """

    language: int
    tower: int
    trainable: int
    lora: int
    largest: int
    persistent: int
    persistent_tower: int
    layers: int
    dim: int
    heads: int
    attention_dim: int
    ffn_dim: int
    vocab: int
    lora_rank: int
    lora_inputs: tuple[int, ...]
    lora_dropout: bool
    fusion: str
    rank: int
    levels: int
    slots: int
    prefix: int
    vision_dim: int
    vision_blocks: int
    image_size: int

    @property
    def frozen(self) -> int:
        """Frozen parameters."""
        return self.language + self.tower


@dataclass(frozen=True, kw_only=True)
class Work:
    """One micro-step of one rank.

    Attributes:
        rows: rows B.
        tokens: text tokens T of a row, padding included.
        supervised: positions with a loss, over all rows.
        element_bytes: bytes of a number in the compute dtype.
        checkpointing: whether decoder layers are recomputed in backward.
        padded: whether rows are padded, so that attention needs a mask.
        zero3_linear: whether ``F.linear`` is ZeRO-3's, which keeps the input of frozen maps too.
    """

    rows: int
    tokens: int
    supervised: int
    element_bytes: int
    checkpointing: bool = False
    padded: bool = True
    zero3_linear: bool = True


@dataclass(frozen=True, kw_only=True)
class Zero:
    """What a DeepSpeed JSON says of memory, in elements; the defaults are DeepSpeed's.

    Attributes:
        reduce_bucket: gradients reduced together.
        prefetch_bucket: parameters gathered ahead (ZeRO-3).
        max_live: gathered parameters above which none are gathered ahead (ZeRO-3).
        max_reuse_distance: a parameter used again within so many elements is not let go (ZeRO-3).
        persistence_threshold: largest tensor that stays whole on every rank (ZeRO-3).
        overlap: whether communication overlaps; ZeRO-2 then holds two buckets.
    """

    reduce_bucket: int = 500_000_000
    prefetch_bucket: int = 50_000_000
    max_live: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    persistence_threshold: int = 100_000
    overlap: bool = True

    @classmethod
    def from_json(cls, ds_config: Mapping[str, Any]) -> Zero:
        """Reads the ``zero_optimization`` part of a DeepSpeed configuration."""
        given = ds_config.get("zero_optimization", {})

        def read(name: str, default: int) -> int:
            value = given.get(name, default)
            return default if value == "auto" else int(value)

        return cls(
            reduce_bucket=read("reduce_bucket_size", cls.reduce_bucket),
            prefetch_bucket=read("stage3_prefetch_bucket_size", cls.prefetch_bucket),
            max_live=read("stage3_max_live_parameters", cls.max_live),
            max_reuse_distance=read("stage3_max_reuse_distance", cls.max_reuse_distance),
            persistence_threshold=read("stage3_param_persistence_threshold", cls.persistence_threshold),
            overlap=given.get("overlap_comm") is not False,
        )


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where the run goes; speeds in bytes a second and direction.

    Attributes:
        nodes: machines.
        gpus_per_node: GPUs of a machine.
        peak_flops: dense FLOP/s of a GPU in the compute dtype.
        mfu: assumed share of the peak that arithmetic reaches.
        intra_bytes_per_s: between GPUs of a node, a GPU.
        inter_bytes_per_s: between nodes, a GPU.
        host_bytes_per_s: between a GPU and its host.
    """

    nodes: int
    gpus_per_node: int
    peak_flops: float
    mfu: float
    intra_bytes_per_s: float
    inter_bytes_per_s: float
    host_bytes_per_s: float

    @property
    def world(self) -> int:
        """GPUs of the job."""
        return self.nodes * self.gpus_per_node


def count_shapes(model: DehvfForConditionalGeneration, persistence_threshold: int) -> Shapes:
    """Counts a model, on the meta device or elsewhere, without touching its values."""
    config, text = model.config, model.config.text_config
    trainable = {name: p.numel() for name, p in model.trainable_parameters().items()}
    frozen = {name: p.numel() for name, p in model.named_parameters() if name not in trainable}
    lora = config.lora or {"rank": 0, "targets": [], "dropout": 0.0}
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    patches = config.patches_per_side**2
    language = {name: n for name, n in frozen.items() if name.startswith("language_model.")}
    tower = {name: n for name, n in frozen.items() if name not in language}
    return Shapes(
        language=sum(language.values()),
        tower=sum(tower.values()),
        trainable=sum(trainable.values()),
        lora=sum(n for name, n in trainable.items() if ".lora_" in name),
        largest=max(frozen.values()),
        persistent=sum(n for n in frozen.values() if n <= persistence_threshold),
        persistent_tower=sum(n for n in tower.values() if n <= persistence_threshold),
        layers=config.num_layers,
        dim=text.hidden_size,
        heads=text.num_attention_heads,
        attention_dim=text.num_attention_heads * head_dim,
        ffn_dim=text.intermediate_size,
        vocab=text.vocab_size,
        lora_rank=lora["rank"],
        lora_inputs=tuple(_input_width(model, name) for name in lora["targets"]),
        lora_dropout=lora["dropout"] > 0,
        fusion=config.fusion,
        rank=config.rank,
        levels=len(config.levels),
        slots=config.num_slots,
        prefix=(config.prefix_tokens or patches) if config.fusion == "prefix" else 0,
        vision_dim=config.vision_config.hidden_size,
        vision_blocks=config.vision_config.num_hidden_layers,
        image_size=config.image_size,
    )


def _input_width(model: DehvfForConditionalGeneration, target: str) -> int:
    mlp = decoder_layers(model.language_model)[0].mlp
    return getattr(getattr(mlp, "ffn", mlp), target).in_features


# --- what autograd keeps, in bytes ---


def positions(shapes: Shapes, work: Work) -> int:
    """Positions that pass through the decoder in a micro-step: text, and the prefix where there is one."""
    return work.rows * (work.tokens + shapes.prefix)


def norm_saved_bytes(shapes: Shapes, work: Work) -> int:
    """An RMSNorm with a frozen weight: its input in fp32 and one scale a position."""
    return positions(shapes, work) * FP32_BYTES * (shapes.dim + 1)


def attention_saved_bytes(shapes: Shapes, work: Work) -> int:
    """SDPA over rotated heads, keys and values repeated to all heads: q, k, v, output, log-sum, mask.

    ZeRO-3's linear adds the input of the three projections; that of the output projection is the
    attention's own output.
    """
    n = positions(shapes, work)
    mask = work.rows * (work.tokens + shapes.prefix) ** 2 if work.padded else 0
    heads = 4 * n * shapes.attention_dim + mask
    inputs = n * shapes.dim if work.zero3_linear else 0
    return (heads + inputs) * work.element_bytes + FP32_BYTES * n * shapes.heads


def lora_saved_bytes(shapes: Shapes, work: Work) -> int:
    """FFN adapters: the narrow product of each; with dropout its input's copy and a mask of bytes."""
    n = positions(shapes, work)
    saved = n * shapes.lora_rank * len(shapes.lora_inputs) * work.element_bytes
    if shapes.lora_dropout:
        saved += n * sum(shapes.lora_inputs) * (work.element_bytes + 1)
    return saved


def ffn_saved_bytes(shapes: Shapes, work: Work, *, first_layer: bool = False) -> int:
    """The gated FFN and its adapters: gate before and after its activation, up, and their product.

    The product is kept for an adapter of ``down_proj`` or for ZeRO-3's linear, the FFN's input for one of
    ``gate_proj`` or ``up_proj``, for ZeRO-3's linear or for the visual reader; each once. In the first
    layer nothing before the first adapter needs a gradient: the embeddings are frozen.
    """
    n = positions(shapes, work)
    plain_lora = shapes.lora_rank > 0 and not shapes.lora_dropout
    keep_inputs = work.zero3_linear and not first_layer
    product = (plain_lora and shapes.ffn_dim in shapes.lora_inputs) or keep_inputs
    reads_input = shapes.fusion == "ffn" or keep_inputs or (plain_lora and shapes.dim in shapes.lora_inputs)
    gates = not first_layer or shapes.dim in shapes.lora_inputs
    width = (3 * gates + product) * shapes.ffn_dim + reads_input * shapes.dim
    return n * width * work.element_bytes + lora_saved_bytes(shapes, work)


def reader_saved_bytes(shapes: Shapes, work: Work) -> int:
    """The visual branch of one FFN in rank space, its input left aside.

    Query and value before and after their gains, scores before and after the activation, and the memory
    with each of its position tables.
    """
    if shapes.fusion != "ffn":
        return 0
    n = positions(shapes, work)
    per_position = 4 * shapes.rank + 2 * shapes.slots
    return (n * per_position + 2 * work.rows * shapes.slots * shapes.rank) * work.element_bytes


def layer_saved_bytes(shapes: Shapes, work: Work, *, first_layer: bool = False) -> int:
    """All that one decoder layer keeps for its backward."""
    saved = ffn_saved_bytes(shapes, work, first_layer=first_layer) + reader_saved_bytes(shapes, work)
    if not first_layer:
        saved += 2 * norm_saved_bytes(shapes, work) + attention_saved_bytes(shapes, work)
    return saved


def layers_saved_bytes(shapes: Shapes, work: Work) -> int:
    """What the decoder's layers keep between forward and backward; with checkpointing their inputs."""
    if work.checkpointing:
        return shapes.layers * positions(shapes, work) * shapes.dim * work.element_bytes
    # A prefix comes from trained maps: with it the first layer is like the others.
    first = layer_saved_bytes(shapes, work, first_layer=shapes.fusion != "prefix")
    return first + (shapes.layers - 1) * layer_saved_bytes(shapes, work)


def head_saved_bytes(shapes: Shapes, work: Work) -> int:
    """Final norm, and fp32 log-probabilities at the supervised positions alone."""
    saved = norm_saved_bytes(shapes, work) + work.supervised * (FP32_BYTES * shapes.vocab + 8)
    if work.zero3_linear:
        saved += work.supervised * shapes.dim * work.element_bytes
    return saved


def visual_saved_bytes(shapes: Shapes, work: Work) -> int:
    """Projector and fuser: features of the levels, and their projection before and after its activation.

    With ``prefix``, pooled patches and the MLP's hidden layer before and after its activation.
    """
    if shapes.fusion == "none":
        return 0
    if shapes.fusion == "prefix":
        width = shapes.vision_dim + 2 * shapes.dim
        return work.rows * shapes.prefix * width * work.element_bytes
    width = shapes.vision_dim + 2 * shapes.rank
    return work.rows * shapes.levels * shapes.slots * width * work.element_bytes


def memory_bytes(shapes: Shapes, work: Work) -> int:
    """The visual memory S of all layers, [B, L, M, r], which the layers hold until the next forward."""
    if shapes.fusion != "ffn":
        return 0
    return work.rows * shapes.layers * shapes.slots * shapes.rank * work.element_bytes


def saved_bytes(shapes: Shapes, work: Work) -> int:
    """All that autograd keeps at the end of a forward, parameters and S itself left aside."""
    return (
        layers_saved_bytes(shapes, work) + head_saved_bytes(shapes, work) + visual_saved_bytes(shapes, work)
    )


# --- peaks, in bytes ---


def tower_peak_bytes(shapes: Shapes, work: Work) -> int:
    """The tower's forward: every block's output, then the chosen levels copied twice."""
    if shapes.fusion == "none":
        return 0
    levels = shapes.levels if shapes.fusion == "ffn" else 1
    states = shapes.vision_blocks + 1 + 2 * levels
    return work.rows * states * shapes.slots * shapes.vision_dim * work.element_bytes


def pixel_bytes(shapes: Shapes, work: Work) -> int:
    """The micro-batch's pictures, which live as long as its backward."""
    return 0 if shapes.fusion == "none" else work.rows * 3 * shapes.image_size**2 * work.element_bytes


def backward_start_bytes(shapes: Shapes, work: Work) -> int:
    """The peak where backward begins: all that is kept, and the larger of two short-lived sets.

    Either the two further fp32 [N, V] tensors of the loss's gradient, or, after the logits are gone, the
    last layer's gradients (three of the FFN's width, two of the model's), with checkpointing on top of
    the layer's recomputed tensors.
    """
    logits = work.supervised * FP32_BYTES * shapes.vocab
    layer = positions(shapes, work) * (3 * shapes.ffn_dim + 2 * shapes.dim) * work.element_bytes
    if work.checkpointing:
        layer += layer_saved_bytes(shapes, work)
    return saved_bytes(shapes, work) + max(2 * logits, layer - logits)


def backward_end_bytes(shapes: Shapes, work: Work) -> int:
    """The peak where backward reaches the fuser: gradients of S by layer, and their stack."""
    return visual_saved_bytes(shapes, work) + 2 * memory_bytes(shapes, work)


def activation_peak_bytes(shapes: Shapes, work: Work) -> int:
    """Peak of a micro-step's activations: tower, beginning or end of backward."""
    later = max(backward_start_bytes(shapes, work), backward_end_bytes(shapes, work))
    return pixel_bytes(shapes, work) + max(tower_peak_bytes(shapes, work), memory_bytes(shapes, work) + later)


def visual_share_bytes(shapes: Shapes, work: Work) -> int:
    """Of the activations, what the pictures cost: S, projector, fuser and what the readers keep."""
    copies = 1 if work.checkpointing else shapes.layers
    return (
        memory_bytes(shapes, work)
        + visual_saved_bytes(shapes, work)
        + pixel_bytes(shapes, work)
        + copies * reader_saved_bytes(shapes, work)
    )


def parameter_bytes(
    numel: int, persistent: int, strategy: Strategy, nodes: int, gpus_per_node: int, element_bytes: int
) -> int:
    """Frozen parameters at rest on one GPU; ``persistent`` of them also whole under ZeRO-3."""
    world = nodes * gpus_per_node
    if strategy == "ZeRO-2":
        return numel * element_bytes
    # Of offloaded parameters only the persistent ones' shards stay on the GPU.
    shard = math.ceil((persistent if strategy == "ZeRO-3 + offload" else numel) / world)
    if strategy == "ZeRO-3 + hpZ":
        shard += math.ceil(numel / gpus_per_node)
    # One rank's shard is the parameter itself.
    return (shard + (persistent if world > 1 else 0)) * element_bytes


def kept_at_turn(zero: Zero) -> int:
    """Gathered elements that stay from a forward's end into its backward, where they are needed next.

    Half of the reuse distance, since it counts the layers above twice. With gathering ahead, all that may
    be live: each module gathers a bucket more, so that this runs ahead of the forward until the limit is
    reached, and what it finds gathered already is not let go.
    """
    return max(zero.max_live if zero.prefetch_bucket else 0, zero.max_reuse_distance // 2)


def live_parameters(shapes: Shapes, zero: Zero, strategy: Strategy, world: int) -> int:
    """Frozen parameters gathered at once, at the peak.

    Whole tensors are gathered until the limit is passed; a bucket of them is there twice while it is
    unpacked. Nothing is copied where one rank has all.
    """
    if strategy == "ZeRO-2" or (world == 1 and strategy != "ZeRO-3 + offload"):
        return 0
    partitioned = shapes.frozen - shapes.persistent
    return min(partitioned, kept_at_turn(zero) + shapes.largest) + min(partitioned, zero.prefetch_bucket)


def bucket_bytes(zero: Zero, strategy: Strategy, element_bytes: int) -> int:
    """Gradient buckets, allocated whole, whatever there is to reduce; two in ZeRO-2 with overlap."""
    copies = 2 if strategy == "ZeRO-2" and zero.overlap else 1
    return copies * zero.reduce_bucket * element_bytes


def trainable_bytes(shapes: Shapes, strategy: Strategy, world: int, element_bytes: int) -> int:
    """Trainables in the compute dtype: whole on every GPU, and their shard."""
    shard = 0 if strategy == "ZeRO-2" else math.ceil(shapes.trainable / world)
    return (shapes.trainable + shard) * element_bytes


def optimizer_bytes(shapes: Shapes, world: int) -> int:
    """A GPU's shard of fp32 masters and Adam's two moments."""
    return math.ceil(shapes.trainable / world) * 3 * FP32_BYTES


def gradient_bytes(shapes: Shapes, world: int, element_bytes: int) -> int:
    """Gradients in the compute dtype, whole, and the shard's fp32 sum and its copy at the step."""
    return shapes.trainable * element_bytes + math.ceil(shapes.trainable / world) * 2 * FP32_BYTES


def host_load_bytes(shapes: Shapes, strategy: Strategy, gpus_per_node: int, element_bytes: int) -> int:
    """Host memory of a node, under ZeRO-3 the first, while weights load.

    Under ZeRO-3 rank 0 merges the whole checkpoint once; under ZeRO-2 every rank reads its own copy
    before it goes to the GPU.
    """
    copies = gpus_per_node if strategy == "ZeRO-2" else 1
    return copies * shapes.frozen * element_bytes


def host_run_bytes(shapes: Shapes, strategy: Strategy, nodes: int, element_bytes: int) -> int:
    """Pinned host memory of a node while it trains."""
    return math.ceil(shapes.frozen / nodes) * element_bytes if strategy == "ZeRO-3 + offload" else 0


def checkpoint_bytes(shapes: Shapes) -> int:
    """A checkpoint: fp32 masters, two moments, and the adapter artifact in fp32."""
    return shapes.trainable * 4 * FP32_BYTES


# --- arithmetic ---


def tower_flops(shapes: Shapes, work: Work) -> float:
    """The frozen tower, forward only: 2 a parameter and visual token, and its attention."""
    if shapes.fusion == "none":
        return 0.0
    tokens = work.rows * shapes.slots
    attention = 4.0 * tokens * shapes.slots * shapes.vision_dim * shapes.vision_blocks
    return 2.0 * shapes.tower * tokens + attention


def language_flops(shapes: Shapes, work: Work) -> float:
    """Decoder and adapters, forward and backward, and one more forward where layers are recomputed.

    4 a frozen parameter and position, 6 a trained one, 12 T a head's width and layer for attention, not
    halved for its being causal.
    """
    n = positions(shapes, work)
    attention = 12.0 * n * (work.tokens + shapes.prefix) * shapes.attention_dim * shapes.layers
    once = model_flops(shapes.language, n) + 6.0 * shapes.lora * n + attention
    recomputed = 2.0 * (shapes.language + shapes.lora) * n + attention / 3
    return once + (recomputed if work.checkpointing else 0.0)


def branch_flops(shapes: Shapes, work: Work) -> float:
    """The trained visual branch: projector, fuser and readers; backward costs two forwards."""
    if shapes.fusion == "none":
        return 0.0
    if shapes.fusion == "prefix":
        width = shapes.vision_dim * shapes.dim + shapes.dim**2
        return 6.0 * work.rows * shapes.prefix * width
    slots = work.rows * shapes.slots
    projector = 4.0 * slots * shapes.levels * shapes.vision_dim * shapes.rank
    fuser = 6.0 * slots * shapes.layers * shapes.levels * shapes.rank
    n = positions(shapes, work)
    forward = 4.0 * n * shapes.rank * (shapes.dim + shapes.slots) * shapes.layers
    return projector + fuser + forward * (4.0 if work.checkpointing else 3.0)


def micro_step_flops(shapes: Shapes, work: Work) -> float:
    """FLOPs of one micro-step on one rank."""
    return tower_flops(shapes, work) + language_flops(shapes, work) + branch_flops(shapes, work)


def arithmetic_s(flops: float, cluster: Cluster) -> float:
    """Time of so many FLOPs at the assumed utilisation."""
    return flops / (cluster.peak_flops * cluster.mfu)


# --- traffic ---


def gathered_parameters(shapes: Shapes, zero: Zero, strategy: Strategy, world: int, recompute: bool) -> int:
    """Frozen parameters that a micro-step gathers under ZeRO-3.

    Tower and decoder in forward, the decoder in backward but for what was kept at the turn. Recomputation
    gathers the decoder once more, since DeepSpeed lets a recomputed layer's parameters go before its own
    backward.
    """
    if strategy == "ZeRO-2" or (world == 1 and strategy != "ZeRO-3 + offload"):
        return 0
    forward = shapes.frozen - shapes.persistent
    language = shapes.language - (shapes.persistent - shapes.persistent_tower)
    backward = max(0, language - kept_at_turn(zero))
    return forward + backward + (language if recompute else 0)


def gather_bytes(numel: int, ranks: int, element_bytes: int) -> float:
    """Bytes that a GPU receives when ``ranks`` gather their shards of ``numel`` elements."""
    return numel * element_bytes * (ranks - 1) / ranks


def ring_s(received_bytes: float, cluster: Cluster) -> float:
    """Time for every GPU of the job to receive so many bytes around rings, at the slowest of its links.

    Rings run through the links of all GPUs at once: a node's edge is crossed once, over the inter-node
    links of all its GPUs together.
    """
    within = received_bytes / cluster.intra_bytes_per_s if cluster.gpus_per_node > 1 else 0.0
    if cluster.nodes == 1:
        return within
    return max(within, received_bytes / (cluster.inter_bytes_per_s * cluster.gpus_per_node))


def gather_s(numel: int, strategy: Strategy, cluster: Cluster, element_bytes: int) -> float:
    """Time to gather ``numel`` frozen elements.

    With hpZ nothing frozen crosses a node's edge, since the second copy of a frozen parameter never expires.
    Offloaded shards come up from the host meanwhile.
    """
    if strategy == "ZeRO-3 + hpZ":
        node = replace(cluster, nodes=1)
        return ring_s(gather_bytes(numel, node.world, element_bytes), node)
    seconds = ring_s(gather_bytes(numel, cluster.world, element_bytes), cluster)
    if strategy == "ZeRO-3 + offload":
        seconds = max(seconds, numel * element_bytes / cluster.world / cluster.host_bytes_per_s)
    return seconds


def gradient_traffic_bytes(shapes: Shapes, cluster: Cluster, accumulation: int, element_bytes: int) -> float:
    """Bytes that a GPU receives in a step for the trainables, the same in all configurations.

    Gradients are scattered in every micro-step, weights gathered once.
    """
    return (accumulation + 1) * gather_bytes(shapes.trainable, cluster.world, element_bytes)


def rows_that_hide(gather_seconds: float, row_seconds: float) -> int:
    """Smallest micro-batch whose arithmetic takes no less time than the gathers."""
    return max(1, math.ceil(gather_seconds / row_seconds))


# --- a configuration as a whole ---


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One DeepSpeed configuration: bytes on a GPU, bytes on a host, and times.

    Attributes:
        strategy: the configuration.
        checkpointing: whether decoder layers are recomputed.
        rows: rows of a micro-step.
        language_bytes: frozen decoder at rest.
        tower_bytes: frozen tower at rest.
        trainable_bytes: trainables in the compute dtype.
        optimizer_bytes: fp32 masters and moments.
        gradient_bytes: gradients and their fp32 sums.
        live_bytes: gathered parameters.
        bucket_bytes: gradient buckets.
        activation_bytes: peak of the activations, pictures included.
        visual_bytes: of these, what the pictures cost.
        overhead_bytes: what is assumed for CUDA, NCCL and libraries.
        host_load_bytes: host memory of a node, under ZeRO-3 the first, while weights load.
        host_run_bytes: pinned host memory of a node.
        arithmetic_s: arithmetic of a step.
        gather_bytes: frozen parameters that a GPU receives in a step.
        gather_s: time of these.
        gradient_traffic_bytes: gradients and trainables that a GPU receives in a step.
        gradient_traffic_s: time of these.
        hiding_rows: smallest micro-batch behind whose arithmetic the gathers disappear.
    """

    strategy: Strategy
    checkpointing: bool
    rows: int
    language_bytes: int
    tower_bytes: int
    trainable_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    live_bytes: int
    bucket_bytes: int
    activation_bytes: int
    visual_bytes: int
    overhead_bytes: float
    host_load_bytes: int
    host_run_bytes: int
    arithmetic_s: float
    gather_bytes: float
    gather_s: float
    gradient_traffic_bytes: float
    gradient_traffic_s: float
    hiding_rows: int

    @property
    def total_bytes(self) -> float:
        """Memory of one GPU at its peak."""
        state = self.language_bytes + self.tower_bytes + self.trainable_bytes + self.optimizer_bytes
        passing = self.gradient_bytes + self.live_bytes + self.bucket_bytes + self.activation_bytes
        return state + passing + self.overhead_bytes

    @property
    def step_s(self) -> float:
        """Time of a step: gathers overlap with arithmetic, the trainables' traffic does not."""
        return max(self.arithmetic_s, self.gather_s) + self.gradient_traffic_s


def estimate(
    shapes: Shapes,
    work: Work,
    zero: Zero,
    strategy: Strategy,
    cluster: Cluster,
    *,
    accumulation: int,
    overhead_bytes: float,
) -> Estimate:
    """Puts the formulas together for one configuration.

    Args:
        shapes: the model.
        work: a micro-step; which linear is used follows from ``strategy``.
        zero: sizes of the configuration's DeepSpeed JSON.
        strategy: the configuration.
        cluster: where it runs.
        accumulation: micro-steps of an optimizer step.
        overhead_bytes: assumed for what PyTorch does not allocate.
    """
    work = replace(work, zero3_linear=strategy != "ZeRO-2")
    size, world = work.element_bytes, cluster.world
    place = (strategy, cluster.nodes, cluster.gpus_per_node, size)
    gathered = gathered_parameters(shapes, zero, strategy, world, work.checkpointing)
    ranks = cluster.gpus_per_node if strategy == "ZeRO-3 + hpZ" else world
    gathers_s = gather_s(gathered, strategy, cluster, size)
    own = gradient_traffic_bytes(shapes, cluster, accumulation, size)
    row_s = arithmetic_s(micro_step_flops(shapes, replace(work, rows=1)), cluster)
    return Estimate(
        strategy=strategy,
        checkpointing=work.checkpointing,
        rows=work.rows,
        language_bytes=parameter_bytes(shapes.language, shapes.persistent - shapes.persistent_tower, *place),
        tower_bytes=parameter_bytes(shapes.tower, shapes.persistent_tower, *place),
        trainable_bytes=trainable_bytes(shapes, strategy, world, size),
        optimizer_bytes=optimizer_bytes(shapes, world),
        gradient_bytes=gradient_bytes(shapes, world, size),
        live_bytes=live_parameters(shapes, zero, strategy, world) * size,
        bucket_bytes=bucket_bytes(zero, strategy, size),
        activation_bytes=activation_peak_bytes(shapes, work),
        visual_bytes=visual_share_bytes(shapes, work),
        overhead_bytes=overhead_bytes,
        host_load_bytes=host_load_bytes(shapes, strategy, cluster.gpus_per_node, size),
        host_run_bytes=host_run_bytes(shapes, strategy, cluster.nodes, size),
        arithmetic_s=accumulation * arithmetic_s(micro_step_flops(shapes, work), cluster),
        gather_bytes=accumulation * gather_bytes(gathered, ranks, size),
        gather_s=accumulation * gathers_s,
        gradient_traffic_bytes=own,
        gradient_traffic_s=ring_s(own, cluster),
        hiding_rows=rows_that_hide(gathers_s, row_s),
    )


def choose(estimates: Sequence[Estimate], limit_bytes: float | None, tie: float = 0.03) -> Estimate | None:
    """The fastest configuration that fits, without recomputation where any fits without.

    Among those within ``tie`` of the fastest ``PREFERENCE`` decides.

    Args:
        estimates: configurations to choose from.
        limit_bytes: memory that may be used; None for no limit.
        tie: relative difference of step times that counts as none.

    Returns:
        The choice, or None where nothing fits.
    """
    fitting = [e for e in estimates if limit_bytes is None or e.total_bytes <= limit_bytes]
    plain = [e for e in fitting if not e.checkpointing] or fitting
    if not plain:
        return None
    fastest = min(e.step_s for e in plain)
    equal = (e for e in plain if e.step_s <= fastest * (1 + tie))
    return min(equal, key=lambda e: PREFERENCE.index(e.strategy))
