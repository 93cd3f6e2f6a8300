"""What a run needs on its machines: memory, and time for arithmetic and traffic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import psutil
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as checked_dataclass

from dehvf_ds.config import InTrainingConfig, RunConfig, UserError
from dehvf_ds.config.values import CHECKS, Positive, PositiveNumber
from dehvf_ds.data.collate import build_image_transform
from dehvf_ds.distributed import World
from dehvf_ds.model import DehvfConfig
from dehvf_ds.planning.memory import (
    FP32_BYTES,
    GIB,
    OVERHEAD_GIB,
    USABLE_SHARE,
    MicroStep,
    Parameters,
    Sharding,
    Strategy,
    build_on_meta,
    count_parameters,
    host_bytes,
    passing_bytes,
    resting_bytes,
)
from dehvf_ds.training.engine import build_model_config
from dehvf_ds.training.metrics import GPUS

GB = 1e9
LINK_SHARE = 0.8
"""Share of a link's nominal speed that large messages are assumed to reach."""

LONGEST_ROW = 256
"""Assumed tokens of a question with its answer."""

GpuName = Literal["H100-80G", "H200-141G", "A100-80G", "A100-40G", "B200-192G", "L40S-48G", "cpu"]
PREFERENCE: tuple[Strategy, ...] = ("ZeRO-2", "ZeRO-3", "ZeRO-3 + hpZ", "ZeRO-3 + offload")
"""Among equally fast ones the first is chosen: it relies least on assumed speeds of links and hosts."""


@checked_dataclass(frozen=True, kw_only=True, config=CHECKS)
class PlanConfig:
    """The machines that a run is planned for, and what is assumed about them."""

    gpus_per_node: Annotated[int, Field(ge=1, le=1024)] = 8
    """GPUs of a machine"""
    nodes: Annotated[int, Field(ge=1, le=2**16)] = 1
    """machines"""
    gpu: GpuName = "H100-80G"
    """kind of GPU"""
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.5
    """assumed share of the GPU's peak that arithmetic reaches"""
    tokens: Positive | None = None
    """text tokens of a row, padding included; None takes data.max_tokens"""
    nvlink_gb_s: PositiveNumber | None = None
    """between GPUs of a node, GB/s per GPU and direction; None takes the GPU's"""
    internode_gb_s: PositiveNumber = 50.0
    """between nodes, GB/s per GPU and direction; 50 is 400 Gb/s"""
    host_gb_s: PositiveNumber | None = None
    """between GPU and host, GB/s per GPU and direction; None takes the GPU's"""
    overhead_gib: Annotated[float, Field(ge=0, le=10**4)] = OVERHEAD_GIB
    """assumed memory of CUDA's context, NCCL's buffers and libraries' workspaces"""

    @property
    def world(self) -> int:
        """GPUs of the job."""
        return self.nodes * self.gpus_per_node

    @property
    def memory_bytes(self) -> float | None:
        """Memory of one GPU; None for the CPU, which is not checked."""
        gibibytes = GPUS[self.gpu].memory_gib
        return None if gibibytes is None else gibibytes * GIB

    @property
    def limit_bytes(self) -> float | None:
        """The part of it that a run may fill."""
        return None if self.memory_bytes is None else USABLE_SHARE * self.memory_bytes

    @property
    def overhead_bytes(self) -> float:
        """Assumed overhead of a GPU; the CPU has none."""
        return 0.0 if self.memory_bytes is None else self.overhead_gib * GIB

    @property
    def links_gb_s(self) -> tuple[float, float, float]:
        """GB/s per GPU and direction: within a node, between nodes, to the host."""
        gpu = GPUS[self.gpu]
        return self.nvlink_gb_s or gpu.gpu_gb_s, self.internode_gb_s, self.host_gb_s or gpu.host_gb_s


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One DeepSpeed configuration: bytes on a GPU and a host, times of an optimizer step."""

    strategy: Strategy
    checkpointing: bool
    memory: dict[str, float]
    """bytes of one GPU at its peak, by kind"""
    host: dict[str, int]
    """bytes of a node's host, by phase"""
    arithmetic_s: float
    gather_bytes: float
    """frozen weights that a GPU receives"""
    gather_s: float
    gradient_traffic_bytes: float
    """gradients and trainables that a GPU receives"""
    gradient_traffic_s: float
    hiding_rows: int
    """smallest micro-batch whose arithmetic takes as long as the gathers"""

    @property
    def total_bytes(self) -> float:
        """Memory of one GPU at its peak."""
        return sum(self.memory.values())

    @property
    def step_s(self) -> float:
        """Time of a step: gathers overlap with arithmetic, the trainables' traffic does not."""
        return max(self.arithmetic_s, self.gather_s) + self.gradient_traffic_s


def estimate(
    parameters: Parameters, step: MicroStep, sharding: Sharding, place: PlanConfig, *, accumulation: int
) -> Estimate:
    """One configuration's numbers, with ``accumulation`` micro-steps in an optimizer step."""
    micro_s = step.flops / (GPUS[place.gpu].peak_flops * place.mfu)
    elements = gathered_elements(parameters, sharding)
    gathered = elements * sharding.element_bytes * (1 - 1 / sharding.gather_ranks)
    # With hpZ frozen weights never travel between nodes, since their second copy never expires.
    gather_s = ring_s(gathered, place, 1 if sharding.gather_ranks < sharding.world else place.nodes)
    if sharding.strategy == "ZeRO-3 + offload":
        # Shards arrive from the host at the same time.
        share = elements * sharding.element_bytes / sharding.world
        gather_s = max(gather_s, share / (LINK_SHARE * GB * place.links_gb_s[2]))
    # Gradients are scattered in every micro-step, in fp32 as the JSONs say; weights are gathered once.
    traffic = parameters.trainable * (accumulation * FP32_BYTES + sharding.element_bytes)
    traffic *= 1 - 1 / sharding.world
    return Estimate(
        strategy=sharding.strategy,
        checkpointing=step.checkpointing,
        memory={
            **resting_bytes(parameters, sharding),
            **passing_bytes(parameters, sharding),
            "activations": step.activation_bytes,
            "CUDA, NCCL (assumed)": place.overhead_bytes,
        },
        host=host_bytes(parameters, sharding),
        arithmetic_s=accumulation * micro_s,
        gather_bytes=accumulation * gathered,
        gather_s=accumulation * gather_s,
        gradient_traffic_bytes=traffic,
        gradient_traffic_s=ring_s(traffic, place, place.nodes),
        hiding_rows=max(1, math.ceil(gather_s * step.rows / micro_s)),
    )


def gathered_elements(parameters: Parameters, sharding: Sharding) -> int:
    """Frozen elements that a micro-step gathers, with recomputation or without.

    Tower and decoder in forward; in backward the decoder, except what was kept. A layer is gathered whole
    before its backward, so its recomputation finds all of it.
    """
    if not sharding.gathers:
        return 0
    language = parameters.language - parameters.persistent_language
    backward = max(0, language - sharding.kept_at_turn)
    return parameters.partitioned + backward


def ring_s(received_bytes: float, place: PlanConfig, nodes: int) -> float:
    """Time for every GPU to receive these bytes around rings, at the speed of the slowest link.

    Bytes enter a node once, over the links of all its GPUs together.
    """
    intra, inter, _ = (LINK_SHARE * GB * speed for speed in place.links_gb_s)
    within = received_bytes / intra if place.gpus_per_node > 1 else 0.0
    return max(within, received_bytes / (inter * place.gpus_per_node) if nodes > 1 else 0.0)


def choose(estimates: Sequence[Estimate], limit_bytes: float | None, *, tie: float = 0.03) -> Estimate | None:
    """The fastest configuration that fits; one that recomputes only if no other fits.

    Step times within a share of ``tie`` count as equal.
    """
    fitting = [e for e in estimates if limit_bytes is None or e.total_bytes <= limit_bytes]
    plain = [e for e in fitting if not e.checkpointing] or fitting
    if not plain:
        return None
    fastest = min(e.step_s for e in plain)
    equal = (e for e in plain if e.step_s <= fastest * (1 + tie))
    return min(equal, key=lambda e: PREFERENCE.index(e.strategy))


# --- in-training evaluation ---


def evaluation_bytes(
    config: DehvfConfig, parameters: Parameters, sharding: Sharding, settings: InTrainingConfig
) -> dict[str, int]:
    """What one GPU holds during an in-training evaluation, when training's activations are gone.

    ``decoding`` is an upper bound: logits, and keys and values as if every attention head had its own.
    """
    p, size, text = parameters, sharding.element_bytes, config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    prefix = (config.prefix_tokens or config.patches_per_side**2) if config.fusion == "prefix" else 0
    kept = 2 * config.num_layers * text.num_attention_heads * head_dim * (LONGEST_ROW + prefix) * size
    rows = settings.batch_size * settings.num_beams
    return {
        "training state": sum(resting_bytes(p, sharding).values()),
        "the full model": 0 if sharding.strategy == "ZeRO-2" else (p.frozen + p.trainable) * size,
        f"decoding {settings.batch_size} rows": rows * (kept + text.vocab_size * (size + FP32_BYTES)),
    }


def check_evaluation_memory(config: RunConfig, ds_config: dict[str, Any], world: World) -> None:
    """Refuses an in-training evaluation that would not fit beside the run, before any weight is loaded."""
    if not config.eval.every_steps:
        return
    nodes = world.size // world.local_size
    sharding = Sharding.read(ds_config, nodes=nodes, gpus_per_node=world.local_size)
    image_size = build_image_transform(config.model.vision_tower, config.model.image_size).image_size
    model_config = build_model_config(config.model, image_size=image_size)
    parameters = count_parameters(build_on_meta(model_config), sharding.zero.param_persistence_threshold)
    parts: dict[str, float] = {**evaluation_bytes(model_config, parameters, sharding, config.eval)}
    if world.device.type == "cuda":
        parts["CUDA"] = OVERHEAD_GIB * GIB
        limit = USABLE_SHARE * torch.cuda.get_device_properties(world.device).total_memory
    else:
        limit = psutil.virtual_memory().available / world.local_size
    if sum(parts.values()) > limit:
        listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size)
        raise UserError(
            f"eval.every_steps: an evaluation does not fit beside the run: {listed} make "
            f"{sum(parts.values()) / GIB:.1f} GiB a rank, and {limit / GIB:.1f} GiB may be filled; lower "
            "eval.batch_size, or leave it 0 and evaluate checkpoints with eval.py"
        )
