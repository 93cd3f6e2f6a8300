"""A DeepSpeed configuration as a whole, and the choice among several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dehvf_ds.training.planning.activations import activation_peak_bytes, visual_share_bytes
from dehvf_ds.training.planning.flops import micro_step_flops
from dehvf_ds.training.planning.memory import (
    bucket_bytes,
    gradient_bytes,
    host_load_bytes,
    host_run_bytes,
    optimizer_bytes,
    parameter_bytes,
    trainable_bytes,
)
from dehvf_ds.training.planning.shapes import Shapes, Work
from dehvf_ds.training.planning.times import (
    Cluster,
    arithmetic_s,
    gather_bytes,
    gather_s,
    gradient_traffic_bytes,
    ring_s,
    rows_that_hide,
)
from dehvf_ds.training.planning.zero import (
    Strategy,
    Zero,
    gather_ranks,
    gathered_parameters,
    live_parameters,
)

PREFERENCE: tuple[Strategy, ...] = ("ZeRO-2", "ZeRO-3", "ZeRO-3 + hpZ", "ZeRO-3 + offload")
"""Among equally fast ones, the first: it leans least on links and hosts being as fast as assumed."""


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
    ranks = gather_ranks(strategy, cluster.nodes, cluster.gpus_per_node)
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
        host_load_bytes=host_load_bytes(shapes, strategy, size),
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
