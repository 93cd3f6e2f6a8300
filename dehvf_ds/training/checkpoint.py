"""What leaves the loop: the adapter artifact, gathered from wherever ZeRO keeps its parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dehvf_ds.config import ModelConfig
from dehvf_ds.distributed import World, barrier
from dehvf_ds.model import DehvfForConditionalGeneration
from dehvf_ds.model.artifact import save_adapter


def gather_trainables(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Gathers the fp32 master values of all trainables. Every rank must call it.

    Args:
        parameters: trainables of a model inside a DeepSpeed engine, by name.

    Returns:
        Whole fp32 tensors on the CPU, on every rank.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    gathered = {}
    for name, parameter in parameters.items():
        value = safe_get_full_fp32_param(parameter)
        gathered[name] = (parameter.data if value is None else value).detach().float().cpu().clone()
    return gathered


def save_artifact(
    directory: Path,
    model: DehvfForConditionalGeneration,
    config: ModelConfig,
    world: World,
    dtype: torch.dtype,
    info: Mapping[str, Any],
) -> None:
    """Writes the adapter artifact from rank 0. Every rank must call it.

    Raises:
        ModelError: a trainable is not finite; the artifact already there stays.
    """
    tensors = gather_trainables(model.trainable_parameters())
    if world.is_main:
        save_adapter(
            directory,
            tensors,
            model,
            language_model=config.language_model,
            vision_tower=config.vision_tower,
            dtype=dtype,
            info=info,
        )
    barrier()
