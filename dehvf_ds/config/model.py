"""The frozen backbones and the branch between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from dehvf_ds.config.errors import require
from dehvf_ds.config.kinds import (
    LocalPath,
    PositiveNumber,
    Range,
    ShareBelowOne,
    Width,
    check_ranges,
)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA adapters inside every FFN of the frozen LLM.

    Attributes:
        rank: LoRA rank; 0 switches the adapters off.
        alpha: LoRA alpha; the delta is scaled by ``alpha / rank``.
        dropout: dropout probability on the adapters' input.
        targets: names of the FFN's linear maps that get an adapter.
    """

    rank: Annotated[int, Range(0, 2**16)] = 4
    alpha: PositiveNumber = 8.0
    dropout: ShareBelowOne = 0.0
    targets: tuple[str, ...] = ("down_proj",)

    def __post_init__(self) -> None:
        check_ranges(self, "model.lora.")
        require(self.rank == 0 or len(self.targets) > 0, "model.lora.targets names no linear map")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen backbones and the branch between them.

    Attributes:
        language_model: local directory or hub id of an HF decoder.
        vision_tower: local directory or hub id of an HF vision tower.
        fusion: ``ffn`` DEHVF; ``prefix`` projected patches before the text; ``none`` text only.
        router: how a layer weighs the vision levels: ``layer``, ``static`` or ``last``.
        num_levels: number of vision levels, evenly spaced, the last block included.
        levels: vision levels by block number (1 is the first block); overrides ``num_levels``.
        rank: width of the visual memory.
        router_dim: width of the router's queries and keys.
        image_size: side of the square picture in pixels; None takes what the tower's processor makes.
        prefix_tokens: visual tokens of ``fusion: prefix``, pooled from the patches; None keeps all.
        lora: the FFN adapters.
    """

    language_model: LocalPath
    vision_tower: LocalPath
    fusion: Literal["ffn", "prefix", "none"] = "ffn"
    router: Literal["layer", "static", "last"] = "layer"
    num_levels: Annotated[int, Range(1, 1024)] = 6
    levels: tuple[Annotated[int, Range(1, 1024)], ...] | None = None
    rank: Width = 96
    router_dim: Width = 32
    image_size: Annotated[int, Range(1, 4096)] | None = None
    prefix_tokens: Annotated[int, Range(1, 2**20)] | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        check_ranges(self, "model.")
        require(
            self.fusion != "none" or self.lora.rank > 0,
            "model.fusion none with model.lora.rank 0 leaves nothing to train; set one of them",
        )
        if self.levels is not None:
            require(len(self.levels) > 0, "model.levels is empty")
            require(
                list(self.levels) == sorted(set(self.levels)),
                "model.levels must be rising block numbers, 1 the first",
            )
