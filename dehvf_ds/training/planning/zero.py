"""The DeepSpeed configurations: their sizes, what ZeRO-3 gathers and what of it it keeps.

Read off DeepSpeed 0.19.8; a test holds the counts against what really is gathered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dehvf_ds.training.planning.shapes import Shapes

Strategy = Literal["ZeRO-3", "ZeRO-3 + hpZ", "ZeRO-3 + offload", "ZeRO-2"]
STRATEGIES: tuple[Strategy, ...] = ("ZeRO-3", "ZeRO-3 + hpZ", "ZeRO-3 + offload", "ZeRO-2")


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


def gather_ranks(strategy: Strategy, nodes: int, gpus_per_node: int) -> int:
    """Ranks whose shards make a frozen parameter whole: with hpZ those of a node, otherwise all.

    A node of one GPU has no second copy, as ``"auto"`` for ``zero_hpz_partition_size`` is filled.
    """
    within = strategy == "ZeRO-3 + hpZ" and gpus_per_node > 1
    return gpus_per_node if within else nodes * gpus_per_node


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


def gathered_parameters(shapes: Shapes, zero: Zero, strategy: Strategy, world: int, recompute: bool) -> int:
    """Frozen parameters that a micro-step gathers under ZeRO-3.

    Tower and decoder in forward, the decoder in backward but for what was kept at the turn. Recomputation
    gathers the decoder once more, since DeepSpeed lets a recomputed layer's parameters go before its own
    backward, whatever the window: with it a block travels three times, two where the decoder fits into what
    is kept.
    """
    if strategy == "ZeRO-2" or (world == 1 and strategy != "ZeRO-3 + offload"):
        return 0
    forward = shapes.frozen - shapes.persistent
    language = shapes.language - (shapes.persistent - shapes.persistent_tower)
    backward = max(0, language - kept_at_turn(zero))
    return forward + backward + (language if recompute else 0)


def strategy_of(ds_config: dict[str, Any]) -> Strategy:
    """The configuration that a DeepSpeed JSON describes; stages below 3 count as ZeRO-2."""
    zero = ds_config["zero_optimization"]
    if zero.get("stage", 0) < 3:
        return "ZeRO-2"
    if "offload_param" in zero:
        return "ZeRO-3 + offload"
    return "ZeRO-3 + hpZ" if zero.get("zero_hpz_partition_size", 1) > 1 else "ZeRO-3"
