"""Arithmetic of a step in closed form, as published utilisations count it: model FLOPs and hardware FLOPs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dehvf_ds.batch import BatchFacts
from dehvf_ds.model import DehvfForConditionalGeneration
from dehvf_ds.model.ffn import decoder_layers
from dehvf_ds.training.zero import numel


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """FLOPs of forward and backward, a product of matrices costing 2 for each multiplication with addition.

    A frozen weight costs 4 a token: 2 forward, 2 for the gradient of its input; a trained one 6. Attention
    counts every pair of positions of a row, as if nothing were masked (as PaLM does, arXiv 2204.02311).

    Attributes:
        decoder: parameters of the decoder, its embeddings, head and adapters among them.
        per_position: of one position, padding and prefix included, through the decoder's layers.
        per_pair: of one pair of positions of a row, in all layers' attention.
        per_supervised: of the head at one supervised position.
        per_picture: of tower, projector and fuser.
        prefix: positions before the text of a row.
    """

    decoder: int
    per_position: float
    per_pair: float
    per_supervised: float
    per_picture: float
    prefix: int

    def model(self, num_text_tokens: int) -> float:
        """4 per parameter of the decoder and text token: no padding, pictures, attention or recomputation.

        So MFU compares with that of LoRA and of other ways to show the pictures, whose tokens do not count.
        """
        return 4.0 * self.decoder * num_text_tokens

    def hardware(self, counts: BatchFacts) -> float:
        """What the device computes of micro-batches whose facts are summed; element-wise work is left out."""
        rows, positions, prefix = counts.num_rows, counts.num_positions, self.prefix
        pairs = counts.num_pairs + 2 * prefix * positions + prefix**2 * rows
        return (
            (positions + prefix * rows) * self.per_position
            + pairs * self.per_pair
            + counts.num_supervised * self.per_supervised
            + counts.num_pictures * self.per_picture
        )


def count_flops(model: DehvfForConditionalGeneration) -> StepFlops:
    """Counts a model on any device, also one that ZeRO-3 has partitioned, by the sizes of its weights."""
    config, decoder = model.config, model.language_model
    trained = {id(parameter) for parameter in model.trainable_parameters().values()}
    layers = decoder_layers(decoder)
    recomputed = any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules())
    again = 1 if recomputed else 0
    # Nothing before the first layer is trained, except a prefix: there no gradient passes its frozen weights.
    with_backward = len(layers) - (config.fusion != "prefix")

    frozen = [sum(numel(p) for p in layer.parameters() if id(p) not in trained) for layer in layers]
    adapters = sum(numel(p) for layer in layers for p in layer.parameters() if id(p) in trained)
    per_position = 2.0 * (sum(frozen) * (1 + again) + sum(frozen[len(layers) - with_backward :]))
    per_position += 2.0 * adapters * (3 + again)

    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # Scores and values forward; backward computes the scores again and four gradients (FlashAttention).
    pairs = 2.0 * text.num_attention_heads * head_dim
    per_pair = pairs * (2 * (1 + again) * len(layers) + 5 * with_backward)

    per_picture, prefix = 0.0, 0
    if config.fusion != "none":
        per_picture, slots = _tower(model), config.num_slots
    if config.fusion == "ffn":
        rank, feature_layers = config.rank, len(config.feature_layers)
        # Query, scores, reading and output.
        read = 2.0 * (2 * text.hidden_size * rank + 2 * slots * rank)
        per_position += read * len(layers) * (3 + again)
        per_picture += 2 * 2.0 * feature_layers * slots * numel(model.projector.w_down)
        per_picture += 3 * 2.0 * len(layers) * feature_layers * slots * rank
    elif config.fusion == "prefix":
        prefix = config.prefix_tokens or slots - 1
        projector = model.prefix_projector
        # The features have no gradient.
        per_picture += 2.0 * prefix * (2 * numel(projector.w_in) + 3 * numel(projector.w_out))
    head = model.get_output_embeddings()
    return StepFlops(
        decoder=sum(map(numel, decoder.parameters())),
        per_position=per_position,
        per_pair=per_pair,
        per_supervised=2 * 2.0 * sum(map(numel, head.parameters())),
        per_picture=per_picture,
        prefix=prefix,
    )


def _tower(model: DehvfForConditionalGeneration) -> float:
    """Of one picture through the frozen tower."""
    vision, slots = model.config.vision_config, model.config.num_slots
    maps = [m for m in model.vision_tower.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    named = [pair for m in maps for pair in m.named_parameters(recurse=False)]
    weights = sum(numel(parameter) for name, parameter in named if name == "weight")
    return 2.0 * slots * weights + 4.0 * slots**2 * vision.hidden_size * vision.num_hidden_layers
