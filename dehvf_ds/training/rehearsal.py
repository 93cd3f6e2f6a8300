"""A dry run's step: the run's own batches and engine around a scaled-down copy of its model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from dehvf_ds.batch import Batch
from dehvf_ds.config import RunConfig, UserError
from dehvf_ds.distributed import World
from dehvf_ds.model import DehvfConfig
from dehvf_ds.model.trial import NUM_LAYERS, scaled_down
from dehvf_ds.training.deepspeed_json import compute_dtype
from dehvf_ds.training.engine import build_engine, build_model_config
from dehvf_ds.training.optim import GradientWatch
from dehvf_ds.training.signals import StopRequest
from dehvf_ds.training.step import train_step
from dehvf_ds.training.validation import validation_loss

TELLING = ("flops_profiler", "comms_logger", "dump_state", "memory_breakdown", "wall_clock_breakdown")
"""Keys of the DeepSpeed JSON that make it write or print, which is not for a copy."""


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What came of it.

    Attributes:
        loss: of the step, in nats a supervised token.
        grad_norm: of the step, before clipping.
        val_loss: of one validation batch a rank; None without validation.
        silent: trainables that no gradient reached.
    """

    loss: float
    grad_norm: float
    val_loss: float | None
    silent: tuple[str, ...]


def rehearse(
    config: RunConfig,
    model_config: DehvfConfig,
    ds_config: dict[str, Any],
    world: World,
    micro_batches: Sequence[Batch],
    held_out: Batch | None,
) -> Rehearsal:
    """Takes one step with a scaled-down copy and measures a validation batch. Every rank must call it.

    Args:
        config: the run.
        model_config: its model.
        ds_config: its completed DeepSpeed configuration.
        world: this process's place.
        micro_batches: this rank's share of one step.
        held_out: this rank's first validation micro-batch.

    Raises:
        UserError: no copy of such a model can be built.
    """
    dtype = compute_dtype(ds_config)
    ds_config = {key: value for key, value in ds_config.items() if key not in TELLING}
    with tempfile.TemporaryDirectory() as directory:
        small = _write_backbones(config, model_config, Path(directory))
        small_config = build_model_config(small.model, image_size=model_config.image_size)
        engine, model = build_engine(small, small_config, ds_config, world)
    watch = GradientWatch(model.trainable_parameters())
    result = train_step(engine, list(micro_batches), world, dtype, seed=config.seed, step=1)
    silent = watch.finish()
    grad_norm = engine.get_global_grad_norm()
    val_loss = None
    if held_out is not None:
        val_loss = validation_loss(engine, [held_out], world, dtype, StopRequest())
    return Rehearsal(
        loss=result.loss,
        grad_norm=float("nan") if grad_norm is None else float(grad_norm),
        val_loss=val_loss,
        silent=tuple(silent),
    )


def _write_backbones(config: RunConfig, model_config: DehvfConfig, directory: Path) -> RunConfig:
    """Writes small random backbones; returns the run over them."""
    torch.manual_seed(config.seed)
    text = scaled_down(model_config.text_config, num_layers=NUM_LAYERS)
    vision = scaled_down(model_config.vision_config)
    try:
        _save(AutoModelForCausalLM.from_config(text), directory / "language_model")
        _save(AutoModel.from_config(vision), directory / "vision_tower")
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        raise UserError(
            f"dry run: everything before the step is in order, but no scaled-down copy of "
            f"{text.model_type} and {vision.model_type} could be built: {error}"
        ) from None
    backbones = {
        "language_model": str(directory / "language_model"),
        "vision_tower": str(directory / "vision_tower"),
    }
    return replace(config, init_from=None, model=replace(config.model, **backbones))


def _save(model: PreTrainedModel, directory: Path) -> None:
    # Not the model's own save_pretrained: it writes nothing on ranks other than 0.
    model.config.save_pretrained(directory)
    save_model(model, str(directory / "model.safetensors"), metadata={"format": "pt"})
