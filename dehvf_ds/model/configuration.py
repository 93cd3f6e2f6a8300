"""The model's configuration: two backbones, the feature layers between them, and the branch's sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, PreTrainedConfig

try:  # Annotations are never evaluated: an export runs without jaxtyping.
    from jaxtyping import Bool as Bool
    from jaxtyping import Float as Float
    from jaxtyping import Int as Int
except ImportError:
    if not TYPE_CHECKING:
        Bool = Float = Int = None

FUNCTION_VERSION = 4
"""Raised when the same weights would compute something else. Version 1 did not normalise the visual FFN's
queries, version 3 did not centre its keys."""

ROUTERS = ("layer", "static", "last")
"""How an LLM layer may weigh the feature layers; see ``HierarchicalFuser``."""

_SIZES = ("hidden_size", "num_hidden_layers")


class ModelError(ValueError):
    """A backbone, a size or an artifact that cannot be used; the message is for users."""


def spaced_layers(num_blocks: int, num_feature_layers: int) -> list[int]:
    """Evenly spaced block numbers of a tower, from 1, the last block included."""
    if not 1 <= num_feature_layers <= num_blocks:
        raise ModelError(f"{num_feature_layers} feature layers do not fit a tower with {num_blocks} blocks")
    return [round(num_blocks * (i + 1) / num_feature_layers) for i in range(num_feature_layers)]


def check_version(version: int, owner: str) -> None:
    """Refuses weights that were trained under another ``FUNCTION_VERSION``."""
    if version != FUNCTION_VERSION:
        raise ModelError(
            f"{owner} was trained by a version of the program with other names or another function of the "
            f"trained weights ({version}, not {FUNCTION_VERSION}): train it anew, or use that version"
        )


def square_side(size: Any) -> int | None:
    """The side of a square, from one number or equal numbers; None for anything else."""
    if isinstance(size, list | tuple) and len(set(size)) == 1:
        size = size[0]
    return size if isinstance(size, int) else None


class DehvfConfig(PreTrainedConfig):
    """Configuration of ``DehvfForConditionalGeneration``; values out of range raise ``ModelError``.

    Args:
        text_config: of the HF decoder.
        vision_config: of the HF vision tower.
        fusion: ``ffn`` (DEHVF), ``prefix`` (projected patches before the text) or ``none``.
        router: how an LLM layer weighs the feature layers: ``layer``, ``static`` or ``last``.
        feature_layers: block numbers in the tower, rising; None takes six, evenly spaced. The router
            ``last`` keeps the deepest only.
        rank: width r of the visual memory.
        router_dim: width k of the router's queries and keys.
        image_size: side of the square input picture in pixels; None takes the tower's own.
        prefix_tokens: visual tokens of ``prefix``, a square number; None keeps every patch.
        lora: ``{"rank", "alpha", "dropout", "targets"}`` of the FFN adapters; None if there are none.
        task: what it was trained for: ``caption``, ``scienceqa`` or ``chat``.
        prompt: the instruction that captions were trained with; the best one for ``generate``.
        version: ``FUNCTION_VERSION`` of the program that trained the weights.
    """

    model_type = "dehvf"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}  # noqa: RUF012  # pyright: ignore

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        fusion: str = "ffn",
        router: str = "layer",
        feature_layers: Sequence[int] | None = None,
        rank: int = 96,
        router_dim: int = 32,
        image_size: int | None = None,
        prefix_tokens: int | None = None,
        lora: dict[str, Any] | None = None,
        task: str | None = None,
        prompt: str | None = None,
        version: int = FUNCTION_VERSION,
        **kwargs: Any,
    ) -> None:
        known = {"fusion": ("ffn", "prefix", "none"), "router": ROUTERS}
        for name, value in (("fusion", fusion), ("router", router)):
            if value not in known[name]:
                raise ModelError(f"{name} {value!r} is not one of {', '.join(known[name])}")
        self.version = version
        self.text_config = _sub_config(text_config, "llama")
        self.vision_config = _sub_config(vision_config, "clip_vision_model")
        for config, kind in ((self.text_config, "decoder"), (self.vision_config, "tower of one width")):
            if not all(isinstance(getattr(config, name, None), int) for name in _SIZES):
                raise ModelError(f"a {config.model_type} model is no {kind}: it lacks {' or '.join(_SIZES)}")
        self.fusion, self.router = fusion, router
        self.rank, self.router_dim = rank, router_dim
        num_blocks = self.vision_config.num_hidden_layers
        self.feature_layers = (
            list(feature_layers) if feature_layers else spaced_layers(num_blocks, min(6, num_blocks))
        )
        if max(self.feature_layers) > num_blocks:
            raise ModelError(f"feature layer {max(self.feature_layers)} of a tower with {num_blocks} blocks")
        if router == "last":
            self.feature_layers = self.feature_layers[-1:]  # the others would be projected and weighed 0
        side = image_size or square_side(getattr(self.vision_config, "image_size", None))
        if side is None or square_side(getattr(self.vision_config, "patch_size", None)) is None:
            raise ModelError(
                f"a {self.vision_config.model_type} tower has no fixed size of square patches and pictures"
            )
        self.image_size: int = side
        self.prefix_tokens = prefix_tokens
        self.lora = dict(lora) if lora else None
        self.task, self.prompt = task, prompt
        if fusion == "prefix" and prefix_tokens is not None:
            side = int(prefix_tokens**0.5)
            if side * side != prefix_tokens or self.patches_per_side % side:
                grid = f"{self.patches_per_side}x{self.patches_per_side}"
                raise ModelError(
                    f"prefix_tokens {prefix_tokens} does not pool {grid} patches into equal squares"
                )
        kwargs.setdefault("tie_word_embeddings", getattr(self.text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds the configuration; refuses another ``FUNCTION_VERSION``."""
        check_version(config_dict.get("version", 1), "the model")
        return super().from_dict(config_dict, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """The values that differ from the defaults, and always the version."""
        return super().to_diff_dict() | {"version": self.version}

    @property
    def patch_size(self) -> int:
        """Side of the tower's patches in pixels."""
        side = square_side(self.vision_config.patch_size)
        assert side is not None
        return side

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of the input picture."""
        return self.image_size // self.patch_size

    @property
    def num_slots(self) -> int:
        """Visual tokens M of one feature layer: the class token and the patches."""
        return self.patches_per_side**2 + 1

    @property
    def num_layers(self) -> int:
        """Layers L of the language model."""
        return self.text_config.num_hidden_layers

    @property
    def max_tokens(self) -> int | None:
        """Text tokens that the decoder has positions for, beside the prefix; None if it does not say.

        A scaling factor of rotary embeddings multiplies them.
        """
        positions = getattr(self.text_config, "max_position_embeddings", None)
        if not isinstance(positions, int) or positions < 1:
            return None
        longest = int(positions * max([1, *_factors(getattr(self.text_config, "rope_parameters", None))]))
        if self.fusion == "prefix":
            longest -= self.prefix_tokens or self.patches_per_side**2
        return longest


def _factors(rope: Any) -> list[float]:
    """Scaling factors of rotary embeddings; kinds of layers may each have one."""
    if not isinstance(rope, dict):
        return []
    own = [rope["factor"]] if isinstance(rope.get("factor"), int | float) else []
    return own + [factor for inner in rope.values() for factor in _factors(inner)]


def _sub_config(value: PreTrainedConfig | dict[str, Any] | None, default_type: str) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    values = dict(value or {})
    return AutoConfig.for_model(values.pop("model_type", default_type), **values)
