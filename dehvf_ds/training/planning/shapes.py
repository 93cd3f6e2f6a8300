"""The model and a micro-step as numbers: what every formula takes.

Numbers of elements come from the model on the meta device; all else follows from shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

from dehvf_ds.model import DehvfForConditionalGeneration
from dehvf_ds.model.adapters import decoder_layers


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes of a model, as the formulas need them.

    Attributes:
        language: frozen parameters of the decoder.
        tower: frozen parameters of the vision tower; 0 where the model has none.
        trainable: parameters that train.
        lora: of these, in the FFN adapters.
        largest: parameters of the largest frozen tensor.
        persistent: frozen parameters in tensors small enough that ZeRO-3 keeps them whole.
        persistent_tower: of these, in the tower.
        layers: decoder layers L.
        dim: decoder width d.
        heads: attention heads.
        attention_dim: heads times their width.
        ffn_dim: width of the FFN.
        vocab: size of the vocabulary.
        lora_rank: rank of the adapters, 0 without.
        lora_inputs: input widths of the adapted linear maps of one FFN.
        lora_dropout: whether the adapters drop inputs out.
        fusion: ``ffn``, ``prefix`` or ``none``.
        rank: width r of the visual memory.
        levels: vision levels J.
        slots: visual tokens M of a level.
        prefix: visual tokens before the text, 0 but for ``prefix``.
        vision_dim: width of the tower.
        vision_blocks: blocks of the tower.
        image_size: side of the picture in pixels.
    """

    language: int
    tower: int
    trainable: int
    lora: int
    largest: int
    persistent: int
    persistent_tower: int
    layers: int
    dim: int
    heads: int
    attention_dim: int
    ffn_dim: int
    vocab: int
    lora_rank: int
    lora_inputs: tuple[int, ...]
    lora_dropout: bool
    fusion: str
    rank: int
    levels: int
    slots: int
    prefix: int
    vision_dim: int
    vision_blocks: int
    image_size: int

    @property
    def frozen(self) -> int:
        """Frozen parameters."""
        return self.language + self.tower


@dataclass(frozen=True, kw_only=True)
class Work:
    """One micro-step of one rank.

    Attributes:
        rows: rows B.
        tokens: text tokens T of a row, padding included.
        supervised: positions with a loss, over all rows.
        element_bytes: bytes of a number in the compute dtype.
        checkpointing: whether decoder layers are recomputed in backward.
        padded: whether rows are padded, so that attention needs a mask.
        zero3_linear: whether ``F.linear`` is ZeRO-3's, which keeps the input of frozen maps too.
    """

    rows: int
    tokens: int
    supervised: int
    element_bytes: int
    checkpointing: bool = False
    padded: bool = True
    zero3_linear: bool = True


def count_shapes(model: DehvfForConditionalGeneration, persistence_threshold: int) -> Shapes:
    """Counts a model, on the meta device or elsewhere, without touching its values."""
    config, text = model.config, model.config.text_config
    trainable = {name: p.numel() for name, p in model.trainable_parameters().items()}
    frozen = {name: p.numel() for name, p in model.named_parameters() if name not in trainable}
    lora = config.lora or {"rank": 0, "targets": [], "dropout": 0.0}
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    patches = config.patches_per_side**2
    language = {name: n for name, n in frozen.items() if name.startswith("language_model.")}
    tower = {name: n for name, n in frozen.items() if name not in language}
    return Shapes(
        language=sum(language.values()),
        tower=sum(tower.values()),
        trainable=sum(trainable.values()),
        lora=sum(n for name, n in trainable.items() if ".lora_" in name),
        largest=max(frozen.values()),
        persistent=sum(n for n in frozen.values() if n <= persistence_threshold),
        persistent_tower=sum(n for n in tower.values() if n <= persistence_threshold),
        layers=config.num_layers,
        dim=text.hidden_size,
        heads=text.num_attention_heads,
        attention_dim=text.num_attention_heads * head_dim,
        ffn_dim=text.intermediate_size,
        vocab=text.vocab_size,
        lora_rank=lora["rank"],
        lora_inputs=tuple(_input_width(model, name) for name in lora["targets"]),
        lora_dropout=lora["dropout"] > 0,
        fusion=config.fusion,
        rank=config.rank,
        levels=len(config.levels),
        slots=config.num_slots,
        prefix=(config.prefix_tokens or patches) if config.fusion == "prefix" else 0,
        vision_dim=config.vision_config.hidden_size,
        vision_blocks=config.vision_config.num_hidden_layers,
        image_size=config.image_size,
    )


def _input_width(model: DehvfForConditionalGeneration, target: str) -> int:
    mlp = decoder_layers(model.language_model)[0].mlp
    return getattr(getattr(mlp, "ffn", mlp), target).in_features


def positions(shapes: Shapes, work: Work) -> int:
    """Positions that pass through the decoder in a micro-step: text, and the prefix where there is one."""
    return work.rows * (work.tokens + shapes.prefix)
