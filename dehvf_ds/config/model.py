"""The frozen backbones and the branch between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dehvf_ds.config.errors import require


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA adapters inside every FFN of the frozen LLM.

    Attributes:
        rank: LoRA rank; 0 switches the adapters off.
        alpha: LoRA alpha; the delta is scaled by ``alpha / rank``.
        dropout: dropout probability on the adapters' input.
        targets: names of the FFN's linear maps that get an adapter.
    """

    rank: int = 4
    alpha: float = 8.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("down_proj",)

    def __post_init__(self) -> None:
        require(self.rank >= 0, "model.lora.rank must be at least 0")
        require(0 <= self.dropout < 1, "model.lora.dropout must lie in [0, 1)")
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

    language_model: str
    vision_tower: str
    fusion: Literal["ffn", "prefix", "none"] = "ffn"
    router: Literal["layer", "static", "last"] = "layer"
    num_levels: int = 6
    levels: tuple[int, ...] | None = None
    rank: int = 96
    router_dim: int = 32
    image_size: int | None = None
    prefix_tokens: int | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        require(self.num_levels >= 1, "model.num_levels must be at least 1")
        require(self.rank >= 1, "model.rank must be at least 1")
        require(self.router_dim >= 1, "model.router_dim must be at least 1")
        if self.levels is not None:
            require(len(self.levels) > 0, "model.levels is empty")
            require(
                list(self.levels) == sorted(set(self.levels)) and min(self.levels) >= 1,
                "model.levels must be rising block numbers, 1 the first",
            )
