"""Bytes of a micro-step's activations: what autograd keeps, and the peaks.

What autograd keeps was read off the forward of the HF decoders (RMSNorm in fp32, rotary SDPA attention,
gated FFN); a test holds it against what really is kept.
"""

from __future__ import annotations

from dehvf_ds.training.planning.memory import FP32_BYTES
from dehvf_ds.training.planning.shapes import Shapes, Work, positions

# --- what autograd keeps ---


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

    The query as it comes, normalised and with its gains, the value before and after its own, scores before
    and after the activation, and the memory with each of its position tables.
    """
    if shapes.fusion != "ffn":
        return 0
    n = positions(shapes, work)
    per_position = 5 * shapes.rank + 2 * shapes.slots
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


# --- peaks ---


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
