"""Where a run goes, and the time that arithmetic and traffic take there."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dehvf_ds.training.planning.memory import FP32_BYTES
from dehvf_ds.training.planning.shapes import Shapes
from dehvf_ds.training.planning.zero import Strategy, gather_ranks


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


def arithmetic_s(flops: float, cluster: Cluster) -> float:
    """Time of so many FLOPs at the assumed utilisation."""
    return flops / (cluster.peak_flops * cluster.mfu)


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
    ranks = gather_ranks(strategy, cluster.nodes, cluster.gpus_per_node)
    where = cluster if ranks == cluster.world else replace(cluster, nodes=1)
    seconds = ring_s(gather_bytes(numel, ranks, element_bytes), where)
    if strategy == "ZeRO-3 + offload":
        seconds = max(seconds, numel * element_bytes / cluster.world / cluster.host_bytes_per_s)
    return seconds


def gradient_traffic_bytes(shapes: Shapes, cluster: Cluster, accumulation: int, element_bytes: int) -> float:
    """Bytes that a GPU receives in a step for the trainables, the same in all configurations.

    Gradients are scattered in every micro-step, in fp32 as the configurations have it, weights gathered once.
    """
    scattered = accumulation * gather_bytes(shapes.trainable, cluster.world, FP32_BYTES)
    return scattered + gather_bytes(shapes.trainable, cluster.world, element_bytes)


def rows_that_hide(gather_seconds: float, row_seconds: float) -> int:
    """Smallest micro-batch whose arithmetic takes no less time than the gathers."""
    return max(1, math.ceil(gather_seconds / row_seconds))
