"""FLOPs of a micro-step on one rank."""

from __future__ import annotations

from dehvf_ds.training.metrics import model_flops
from dehvf_ds.training.planning.shapes import Shapes, Work, positions


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
