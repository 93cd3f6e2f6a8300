"""Memory of an evaluation in the middle of a run: what stays of the training, the copy, and its decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch

from dehvf_ds.config import InsideConfig, RunConfig, UserError
from dehvf_ds.distributed import World
from dehvf_ds.training.deepspeed_json import compute_dtype
from dehvf_ds.training.planning.backbones import build_on_meta
from dehvf_ds.training.planning.memory import (
    FP32_BYTES,
    GIB,
    bucket_bytes,
    optimizer_bytes,
    parameter_bytes,
    trainable_bytes,
)
from dehvf_ds.training.planning.place import FULL, PlanConfig
from dehvf_ds.training.planning.shapes import Shapes, count_shapes
from dehvf_ds.training.planning.zero import Strategy, Zero, strategy_of

LONGEST_ROW = 256
"""Assumed tokens of a question with its answer."""


@dataclass(frozen=True, kw_only=True)
class InsideBytes:
    """Memory of one rank while it evaluates; the activations of training are gone by then.

    Attributes:
        resting: weights, states and buckets of the engine.
        copy: the whole model, where the run's own is partitioned.
        decoding: keys and values of the rows asked together, and their logits.
        overhead: assumed for CUDA, NCCL and libraries.
    """

    resting: int
    copy: int
    decoding: int
    overhead: float

    @property
    def total(self) -> float:
        """Memory of one rank."""
        return self.resting + self.copy + self.decoding + self.overhead


def inside_bytes(
    shapes: Shapes,
    strategy: Strategy,
    zero: Zero,
    settings: InsideConfig,
    *,
    nodes: int,
    gpus_per_node: int,
    element_bytes: int,
    overhead_bytes: float,
) -> InsideBytes:
    """Puts the formulas together; every attention head is counted with keys and values of its own."""
    world, rows = nodes * gpus_per_node, settings.batch_size * settings.num_beams
    frozen = parameter_bytes(shapes.frozen, shapes.persistent, strategy, nodes, gpus_per_node, element_bytes)
    resting = (
        frozen
        + trainable_bytes(shapes, strategy, world, element_bytes)
        + optimizer_bytes(shapes, world)
        + bucket_bytes(zero, strategy, element_bytes)
    )
    kept = 2 * shapes.layers * shapes.attention_dim * (LONGEST_ROW + shapes.prefix) * element_bytes
    logits = shapes.vocab * (element_bytes + FP32_BYTES)
    return InsideBytes(
        resting=resting,
        copy=0 if strategy == "ZeRO-2" else (shapes.frozen + shapes.trainable) * element_bytes,
        decoding=rows * (kept + logits),
        overhead=overhead_bytes,
    )


def check_inside(config: RunConfig, ds_config: dict[str, Any], world: World) -> None:
    """Refuses an evaluation inside the run that would not fit beside it, before any weight is loaded.

    Args:
        config: the run.
        ds_config: its completed DeepSpeed configuration.
        world: this process's place; its device's memory is looked at, of a CPU that which is free now.

    Raises:
        UserError: names what it would take and what there is.
    """
    if not config.eval.every_steps:
        return
    zero = Zero.from_json(ds_config)
    on_gpu = world.device.type == "cuda"
    found = inside_bytes(
        count_shapes(build_on_meta(config.model, []), zero.persistence_threshold),
        strategy_of(ds_config),
        zero,
        config.eval,
        nodes=world.size // world.local_size,
        gpus_per_node=world.local_size,
        element_bytes=compute_dtype(ds_config).itemsize,
        overhead_bytes=PlanConfig().overhead_bytes if on_gpu else 0.0,
    )
    limit = _free_bytes(world)
    if found.total > limit:
        parts = {
            "training at rest": found.resting,
            "the copy": found.copy,
            f"decoding {config.eval.batch_size} rows": found.decoding,
            "CUDA": found.overhead,
        }
        told = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size)
        raise UserError(
            f"eval.every_steps: an evaluation does not fit beside the run: {told} make "
            f"{found.total / GIB:.1f} GiB a rank, and {limit / GIB:.1f} GiB may be filled; lower "
            "eval.batch_size, or leave it 0 and evaluate checkpoints with eval.py"
        )


def _free_bytes(world: World) -> float:
    """Memory that one rank may fill."""
    if world.device.type == "cuda":
        return FULL * torch.cuda.get_device_properties(world.device).total_memory
    return psutil.virtual_memory().available / world.local_size
