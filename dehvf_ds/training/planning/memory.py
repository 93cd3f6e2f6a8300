"""Bytes of what lies in memory whatever the micro-batch: weights, states, gradients, buckets."""

from __future__ import annotations

import math

from dehvf_ds.training.planning.shapes import Shapes
from dehvf_ds.training.planning.zero import Strategy, Zero, gather_ranks

GIB = 2**30
FP32_BYTES = 4


def parameter_bytes(
    numel: int, persistent: int, strategy: Strategy, nodes: int, gpus_per_node: int, element_bytes: int
) -> int:
    """Frozen parameters at rest on one GPU; ``persistent`` of them also whole under ZeRO-3."""
    world = nodes * gpus_per_node
    if strategy == "ZeRO-2":
        return numel * element_bytes
    # Of offloaded parameters only the persistent ones' shards stay on the GPU.
    shard = math.ceil((persistent if strategy == "ZeRO-3 + offload" else numel) / world)
    ranks = gather_ranks(strategy, nodes, gpus_per_node)
    if ranks < world:
        shard += math.ceil(numel / ranks)
    # One rank's shard is the parameter itself.
    return (shard + (persistent if world > 1 else 0)) * element_bytes


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


def host_load_bytes(shapes: Shapes, strategy: Strategy, element_bytes: int) -> int:
    """Host memory of the first node while weights load.

    Under ZeRO-3 rank 0 merges the whole checkpoint once; under ZeRO-2 each weight goes to the GPU as it is
    read, and the host holds pages of the mapped files alone.
    """
    return 0 if strategy == "ZeRO-2" else shapes.frozen * element_bytes


def host_run_bytes(shapes: Shapes, strategy: Strategy, nodes: int, element_bytes: int) -> int:
    """Pinned host memory of a node while it trains."""
    return math.ceil(shapes.frozen / nodes) * element_bytes if strategy == "ZeRO-3 + offload" else 0


def checkpoint_bytes(shapes: Shapes) -> int:
    """A checkpoint: fp32 masters, two moments, and the adapter artifact in fp32."""
    return shapes.trainable * 4 * FP32_BYTES
