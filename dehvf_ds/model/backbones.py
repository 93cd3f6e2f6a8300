"""The frozen backbones: an HF decoder and an HF vision tower, read strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .configuration import ModelError


def load_backbone_config(source: str, *, vision: bool) -> PreTrainedConfig:
    """Reads a backbone's configuration from a directory or hub id.

    Of a two-tower checkpoint (CLIP) the vision part is taken when ``vision``.

    Raises:
        ModelError: nothing readable is there, or a vision part is asked of a model without one.
    """
    kind = "vision tower" if vision else "language model"
    if _is_path(source) and not Path(source).is_dir():
        where = "" if Path(source).is_absolute() else f" in {Path.cwd()}"
        flag = kind.replace(" ", "_")
        raise ModelError(f"{kind} {source}: no such directory{where}; set {flag} to where it lies")
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelError(f"{kind} {source}: {_first_line(error)}") from None
    if vision:
        config = getattr(config, "vision_config", config)
        if not hasattr(config, "patch_size"):
            raise ModelError(f"vision tower {source}: a {config.model_type} model has no patches")
    return config


def load_backbone(
    source: str, config: PreTrainedConfig, dtype: torch.dtype, *, vision: bool
) -> PreTrainedModel:
    """Loads a backbone's weights; partitioned where an ``HfDeepSpeedConfig`` of ZeRO-3 is alive.

    Args:
        source: directory or hub id.
        config: what ``load_backbone_config`` gave.
        dtype: dtype of the weights.
        vision: whether it is the tower.

    Raises:
        ModelError: the checkpoint cannot be read or lacks weights.
    """
    auto_class: Any = AutoModel if vision else AutoModelForCausalLM
    try:
        model, info = auto_class.from_pretrained(source, config=config, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{source}: {_first_line(error)}") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{source}: the checkpoint lacks {len(missing)} weights, {missing[0]} among them")
    return model


def _is_path(source: str) -> bool:
    """Whether it cannot be a hub id, which has one slash at most."""
    return source.startswith((".", "~", "/")) or source.rstrip("/").count("/") > 1


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
