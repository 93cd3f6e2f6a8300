"""Memory of a step: weights and states in closed form, activations by running the model without values."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import flop_registry

from dehvf_ds.batch import Batch
from dehvf_ds.config import UserError
from dehvf_ds.model import DehvfConfig, DehvfForConditionalGeneration
from dehvf_ds.training.deepspeed_json import compute_dtype
from dehvf_ds.training.zero import gathered_units

if TYPE_CHECKING:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

GIB = 2**30
FP32_BYTES = 4
OVERHEAD_GIB = 3.0
"""Assumed memory of CUDA's context, NCCL's buffers and libraries' workspaces."""

USABLE_SHARE = 0.92
"""Share of a GPU's memory that a run may fill; fragmentation takes some of the rest."""

Strategy = Literal["ZeRO-3", "ZeRO-3 + hpZ", "ZeRO-3 + offload", "ZeRO-2"]
JSON_NAMES: dict[Strategy, str] = {
    "ZeRO-3": "zero3.json",
    "ZeRO-3 + hpZ": "zero3_hpz.json",
    "ZeRO-3 + offload": "zero3_offload.json",
    "ZeRO-2": "zero2.json",
}

# --- a micro-step without values ---


def build_on_meta(
    config: DehvfConfig, dtype: torch.dtype = torch.float32, *, checkpointing: bool = False
) -> DehvfForConditionalGeneration:
    """Builds the model without weights, ready to train as the engine sets it up."""
    with torch.device("meta"):
        model = DehvfForConditionalGeneration(config).train()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if checkpointing:
        with warnings.catch_warnings(action="ignore"):
            model.recompute_layers()
    return model


@dataclass(frozen=True, kw_only=True)
class MicroStep:
    """Forward and backward of one micro-batch on one GPU."""

    rows: int
    checkpointing: bool
    activation_bytes: int
    """peak of all tensors except parameters and buffers"""
    flops: int
    """of all matrix products"""
    tower_flops: int
    """the frozen tower's part"""

    def with_shared_pictures(self, passes: float) -> MicroStep:
        """The step with so many tower passes a row; memory stays, since single micro-batches have more.

        What projector and fuser save is left out: one or two hundredths of that.
        """
        tower_flops = round(self.tower_flops * passes)
        return replace(self, flops=self.flops - self.tower_flops + tower_flops, tower_flops=tower_flops)


def full_batch(config: DehvfConfig, rows: int, tokens: int) -> Batch:
    """A micro-batch of rows of equal length, every token supervised, with pictures if the model takes any."""
    ids = torch.ones(rows, tokens, dtype=torch.long)
    side = config.image_size if config.fusion != "none" else 0
    return Batch(
        input_ids=ids,
        attention_mask=ids,
        labels=ids,
        pixel_values=torch.empty(rows, 3, side, side, device="meta"),
        has_image=torch.full((rows,), config.fusion != "none"),
    )


def run_micro_step(model: DehvfForConditionalGeneration, batch: Batch, *, zero3: bool) -> MicroStep:
    """Runs a model of ``build_on_meta`` forward and backward: only shapes are computed.

    Rows count as padded, whatever the batch's mask says. Under ``zero3`` linear maps also keep the inputs of
    frozen weights. A decoder whose code needs values is refused.
    """
    meter = _Meter([*model.parameters(), *model.buffers()])
    inputs = batch.to("meta", next(model.parameters()).dtype).inputs()
    for tensor in inputs.values():
        meter.add(tensor)
    tower, counts = getattr(model, "vision_tower", nn.Identity()), [0]
    hook = tower.register_forward_hook(lambda *_: counts.append(meter.flops))
    try:
        # Stopping early ends a recomputation by an exception, whose traceback would hold its tensors.
        with set_checkpoint_early_stop(False), _kernels(zero3=zero3), meter:
            model(**inputs, padded=True).loss_sum.backward()
    except (RuntimeError, NotImplementedError) as error:
        kind, reason = model.config.text_config.model_type, " ".join(str(error).split())
        raise UserError(f"model: a step of a {kind} decoder cannot be planned: {reason:.200}") from None
    finally:
        hook.remove()
        model.zero_grad()
    return MicroStep(
        rows=len(batch.input_ids),
        checkpointing=any(getattr(module, "gradient_checkpointing", False) for module in model.modules()),
        activation_bytes=meter.peak,
        flops=meter.flops,
        # The tower runs first.
        tower_flops=counts[-1],
    )


class _Meter(TorchDispatchMode):
    """Counts FLOPs, and the bytes of tensors that are created under it while anything refers to them."""

    def __init__(self, outside: list[Tensor]) -> None:
        super().__init__()
        self.flops = self.peak = self._live = 0
        self._outside = {tensor.untyped_storage()._cdata for tensor in outside}
        self._watched: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # Code that asks whether a mask is all ones gets "no".
        output = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=output)
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return output

    def add(self, tensor: Tensor) -> None:
        """Counts a tensor's storage once, until it is released."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._outside or key in self._watched:
            return

        def released(_: object) -> None:
            del self._watched[key]
            self._live -= size

        self._watched[key] = weakref.ref(storage, released)
        self._live += size
        self.peak = max(self.peak, self._live)


@contextmanager
def _kernels(*, zero3: bool) -> Iterator[None]:
    """Attention by the kernel that a GPU takes for padded rows, and the ZeRO stage's linear maps."""
    own = F.linear, F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _attention
    # torch's own, even if DeepSpeed has replaced it.
    F.linear = torch._C._nn.linear  # pyright: ignore[reportAttributeAccessIssue]
    if zero3:
        from deepspeed.runtime.zero.linear import zero3_linear_wrap

        F.linear = zero3_linear_wrap
    try:
        yield
    finally:
        F.linear, F.scaled_dot_product_attention = own


def _attention(
    query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Any = None, enable_gqa=False, **more: Any
) -> Tensor:
    """Without a score matrix, but with a copy of the mask in the compute dtype in every layer."""
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    bias = None
    if attn_mask is not None:
        rows, heads, length, width = *query.shape[:3], key.shape[2]
        # The kernel wants rows of a multiple of 16 bytes.
        bias = query.new_empty(rows, 1, length, 8 * math.ceil(width / 8))[..., :width]
        bias = bias.expand(rows, heads, length, width)
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, bias, torch.is_grad_enabled(), **more)[0]


# --- weights and states under ZeRO ---


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """A model's parameters, in elements; decoder and tower are frozen."""

    language: int
    tower: int
    trainable: int
    lora: int
    """the FFN adapters' part of the trainable ones"""
    largest: int
    """of the largest frozen tensor"""
    unit: int
    """frozen elements of the largest layer, which is gathered at once"""
    persistent_language: int
    """the decoder's in tensors so small that ZeRO-3 keeps them whole"""
    persistent_tower: int

    @property
    def frozen(self) -> int:
        """Decoder and tower."""
        return self.language + self.tower

    @property
    def partitioned(self) -> int:
        """Frozen parameters that ZeRO-3 partitions."""
        return self.frozen - self.persistent_language - self.persistent_tower


def count_parameters(model: DehvfForConditionalGeneration, persistence_threshold: int = 0) -> Parameters:
    """Counts a model on any device; ZeRO-3 keeps tensors up to the threshold whole."""
    trainable = {name: p.numel() for name, p in model.trainable_parameters().items()}
    frozen = {name: p.numel() for name, p in model.named_parameters() if name not in trainable}
    language = [n for name, n in frozen.items() if name.startswith("language_model.")]
    tower = [n for name, n in frozen.items() if not name.startswith("language_model.")]
    units = [
        sum(p.numel() for p in unit.parameters() if not p.requires_grad) for unit in gathered_units(model)
    ]
    return Parameters(
        language=sum(language),
        tower=sum(tower),
        trainable=sum(trainable.values()),
        lora=sum(n for name, n in trainable.items() if ".lora_" in name),
        largest=max(frozen.values()),
        unit=max(units),
        persistent_language=sum(n for n in language if n <= persistence_threshold),
        persistent_tower=sum(n for n in tower if n <= persistence_threshold),
    )


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How a DeepSpeed configuration spreads a model over GPUs, as of DeepSpeed 0.19.8."""

    strategy: Strategy
    zero: DeepSpeedZeroConfig
    """its sizes are in elements"""
    nodes: int
    gpus_per_node: int
    element_bytes: int
    """of a number in the compute dtype"""

    @classmethod
    def read(cls, ds_config: dict[str, Any], *, nodes: int, gpus_per_node: int) -> Sharding:
        """Reads a DeepSpeed JSON, with DeepSpeed's defaults; stages below 3 count as ZeRO-2."""
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        zero = DeepSpeedZeroConfig(**ds_config["zero_optimization"])
        strategy: Strategy = "ZeRO-3"
        if zero.stage < 3:
            strategy = "ZeRO-2"
        elif zero.offload_param is not None:
            strategy = "ZeRO-3 + offload"
        elif zero.zero_hpz_partition_size > 1:
            strategy = "ZeRO-3 + hpZ"
        return cls(
            strategy=strategy,
            zero=zero,
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            element_bytes=compute_dtype(ds_config).itemsize,
        )

    @property
    def world(self) -> int:
        """GPUs of the job."""
        return self.nodes * self.gpus_per_node

    @property
    def gather_ranks(self) -> int:
        """GPUs over which a frozen parameter is gathered: with hpZ those of a node of several, else all."""
        within = self.strategy == "ZeRO-3 + hpZ" and self.gpus_per_node > 1
        return self.gpus_per_node if within else self.world

    @property
    def gathers(self) -> bool:
        """Whether frozen weights are gathered; a single GPU that holds them all copies nothing."""
        return self.strategy == "ZeRO-3 + offload" or (self.strategy != "ZeRO-2" and self.world > 1)

    @property
    def kept_at_turn(self) -> int:
        """Gathered elements that are kept from the end of a forward for the backward.

        With prefetching it is at least all that may be live, since DeepSpeed runs ahead up to that limit and
        does not release what is gathered by then.
        """
        live = self.zero.max_live_parameters if self.zero.prefetch_bucket_size else 0
        return max(live, self.zero.max_reuse_distance)

    def frozen_bytes(self, numel: int, persistent: int) -> int:
        """Frozen parameters on one GPU between steps; under ZeRO-3 ``persistent`` of them are whole, too."""
        if self.strategy == "ZeRO-2":
            return numel * self.element_bytes
        # With offloading only the shards of persistent parameters stay on the GPU.
        held = math.ceil((persistent if self.strategy == "ZeRO-3 + offload" else numel) / self.world)
        if self.gather_ranks < self.world:
            held += math.ceil(numel / self.gather_ranks)
        # With one rank the shard is the parameter itself.
        return (held + (persistent if self.world > 1 else 0)) * self.element_bytes


def resting_bytes(parameters: Parameters, sharding: Sharding) -> dict[str, int]:
    """What one GPU holds between steps; gradient buckets are allocated at their full size."""
    p, size, share = parameters, sharding.element_bytes, math.ceil(parameters.trainable / sharding.world)
    zero2 = sharding.strategy == "ZeRO-2"
    buckets = 2 if zero2 and sharding.zero.overlap_comm else 1
    return {
        "frozen LLM": sharding.frozen_bytes(p.language, p.persistent_language),
        "frozen tower": sharding.frozen_bytes(p.tower, p.persistent_tower),
        "trainable, compute dtype": (p.trainable + (0 if zero2 else share)) * size,
        "fp32 masters, Adam moments": share * 3 * FP32_BYTES,
        "gradient buckets": buckets * sharding.zero.reduce_bucket_size * size,
    }


def passing_bytes(parameters: Parameters, sharding: Sharding) -> dict[str, int]:
    """What one GPU holds in addition during a step, without activations.

    Gradients are whole in the compute dtype; the shard's are summed in fp32 and copied at the step. Whole
    tensors are gathered until the limit is exceeded; a layer exists twice while it is unpacked.
    """
    p, size, share = parameters, sharding.element_bytes, math.ceil(parameters.trainable / sharding.world)
    gathered = min(p.partitioned, sharding.kept_at_turn + p.largest)
    copied = p.unit
    if "prefetch_bucket_size" in sharding.zero.model_fields_set:
        copied = max(copied, sharding.zero.prefetch_bucket_size)
    gathered += min(p.partitioned, copied)
    return {
        "gradients": p.trainable * size + share * 2 * FP32_BYTES,
        "gathered parameters": gathered * size if sharding.gathers else 0,
    }


def step_bytes(
    config: DehvfConfig, batch: Batch, ds_config: dict[str, Any], *, checkpointing: bool = False
) -> dict[str, int]:
    """What a job of one GPU holds at the peak of a step, by kind, without CUDA's own memory."""
    sharding = Sharding.read(ds_config, nodes=1, gpus_per_node=1)
    model = build_on_meta(config, compute_dtype(ds_config), checkpointing=checkpointing)
    parameters = count_parameters(model, sharding.zero.param_persistence_threshold)
    step = run_micro_step(model, batch, zero3=sharding.strategy != "ZeRO-2")
    held = resting_bytes(parameters, sharding) | passing_bytes(parameters, sharding)
    return held | {"activations": step.activation_bytes}


def host_bytes(parameters: Parameters, sharding: Sharding) -> dict[str, int]:
    """Host memory of a node that is pinned in training.

    While weights load, it is a buffer: ranks read what they keep straight to where they keep it. Only what
    transformers converts (mixtures of experts), and ``.bin`` files, go through rank 0's memory.
    """
    offloads = sharding.strategy == "ZeRO-3 + offload"
    pinned = math.ceil(parameters.frozen / sharding.nodes) * sharding.element_bytes if offloads else 0
    return {"pinned": pinned}


def checkpoint_bytes(parameters: Parameters) -> int:
    """A checkpoint: fp32 masters, two moments, and the adapter in fp32."""
    return parameters.trainable * 4 * FP32_BYTES
