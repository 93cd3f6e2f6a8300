"""A dry run: all that a run does up to its first step, and that step with a scaled-down copy of its model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from dehvf_ds.batch import IGNORE_INDEX, Batch
from dehvf_ds.config import RunConfig, UnsupervisedError, UserError
from dehvf_ds.distributed import World, all_reduce_sum, gather_to_main, init_process_group, on_main
from dehvf_ds.model import DehvfConfig
from dehvf_ds.model.trial import NUM_LAYERS, scaled_down
from dehvf_ds.training.checkpoint import Checkpoint
from dehvf_ds.training.deepspeed_json import compute_dtype
from dehvf_ds.training.engine import build_engine, build_model_config
from dehvf_ds.training.optim import GradientWatch
from dehvf_ds.training.resolve import ResolvedRun
from dehvf_ds.training.run_dir import choose_start
from dehvf_ds.training.run_lock import LOCK_FILE, RunLock
from dehvf_ds.training.step import train_step, validation_loss
from dehvf_ds.training.stop import StopRequest

MAX_UNSUPERVISED_SHARE = 0.25
"""Share of the first step's rows without a token to learn that a dry run refuses; fewer are only reported."""

NOISY_KEYS = ("flops_profiler", "comms_logger", "dump_state", "memory_breakdown", "wall_clock_breakdown")
"""Keys of the DeepSpeed JSON that make it write or print, which is not for a copy."""


def dry_run(run: ResolvedRun, describe_evaluation: Callable[[], str] | None) -> int:
    """Does all that a run does up to its first step, and that with a scaled-down copy; writes nothing.

    ``describe_evaluation`` opens the in-training evaluation, and says in one line what it asks; rank 0 alone
    calls it.
    """
    config, world = run.config, run.world
    checkpoint = on_main(world, lambda: _look_at_run_dir(run))
    evaluated = on_main(world, describe_evaluation) if describe_evaluation is not None else None
    start_step, start_sample = 0, 0
    if checkpoint is not None:
        start_step, start_sample = checkpoint.progress.step, checkpoint.progress.samples
    micro_batches = list(run.training_batches(start_sample, 1))
    validation = run.validation_batches()
    validation_batch = None if validation is None else next(iter(validation))
    init_process_group(world, config.train.start_timeout_minutes)
    max_tokens = config.data.max_tokens
    warning = check_supervised(micro_batches, world, data=config.data.train, max_tokens=max_tokens)
    if validation_batch is not None and config.data.val is not None:
        # Rows that fill up a last micro-batch have none either, so that no share of them is looked at.
        (supervised,) = all_reduce_sum([float(validation_batch.num_supervised())], world.device)
        if not supervised:
            check_supervised([validation_batch], world, data=config.data.val, max_tokens=max_tokens)
    step = step_of_copy(config, run.model_config, run.ds_config, world, micro_batches, validation_batch)
    if world.is_main:
        accumulation = config.train.accumulation(world.size)
        stage = run.ds_config["zero_optimization"].get("stage", 0)
        begins = f"continues after step {start_step} of" if start_step else "begins, for"
        validated = "" if step.val_loss is None else f", validation {step.val_loss:.3f}"
        lines = [
            f"dry run on {world.size} x {world.device.type}; {config.run_dir} {begins} {run.num_steps} steps",
            f"  {config.deepspeed}: ZeRO stage {stage}, {str(compute_dtype(run.ds_config))[6:]}, "
            f"{accumulation} micro-batches of {config.train.micro_batch_size} rows a rank and step",
            f"  {config.data.train}: {run.samples_per_epoch} rows an epoch; "
            f"first micro-batch {_describe(micro_batches[0])}",
        ]
        if validation_batch is not None:
            lines.append(f"  {config.data.val}: first micro-batch {_describe(validation_batch)}")
        if evaluated is not None:
            lines.append(f"  {evaluated}")
        lines.append(
            f"  one step of a scaled-down copy, 32 wide: loss {step.loss:.3f}, "
            f"gradient norm {step.grad_norm:.3g}{validated}"
        )
        if warning is not None:
            lines.append(f"  warning: {warning}")
        print("\n".join(lines), flush=True)
    if step.silent or not step.loss < float("inf"):
        names = ", ".join(step.silent[:4]) or "none missed"
        raise UserError(f"dry run: loss {step.loss:g}; trainables that no gradient reached: {names}")
    if world.is_main:
        print("nothing is wrong, and nothing was written", flush=True)
    return 0


def _look_at_run_dir(run: ResolvedRun) -> Checkpoint | None:
    """Finds what the run would continue from, and that its directory can be had. Rank 0 alone."""
    run_dir = Path(run.config.run_dir)
    made = [path for path in (run_dir / LOCK_FILE, run_dir, *run_dir.parents) if not os.path.lexists(path)]
    try:
        RunLock(run_dir).release()
    finally:
        for path in made:
            with suppress(OSError, ValueError):
                path.unlink() if path.name == LOCK_FILE else path.rmdir()
    return choose_start(run.config, run.index.digest)


def _describe(batch: Batch) -> str:
    rows, tokens = batch.input_ids.shape
    return (
        f"{rows} rows of up to {tokens} tokens, {int(batch.has_image.sum())} with a picture, "
        f"{batch.num_supervised()} supervised tokens"
    )


# --- the step ---


@dataclass(frozen=True, kw_only=True)
class CopyStep:
    """What came of the step.

    Attributes:
        loss: in nats per supervised token.
        grad_norm: before clipping.
        val_loss: of one validation batch per rank; None without validation.
        silent: trainables that no gradient reached.
    """

    loss: float
    grad_norm: float
    val_loss: float | None
    silent: tuple[str, ...]


def step_of_copy(
    config: RunConfig,
    model_config: DehvfConfig,
    ds_config: dict[str, Any],
    world: World,
    micro_batches: Sequence[Batch],
    validation_batch: Batch | None,
) -> CopyStep:
    """Takes a step with a scaled-down copy and measures a validation batch. Every rank must call it.

    The batches are this rank's share of the run's first step, and its first validation micro-batch.
    """
    dtype = compute_dtype(ds_config)
    ds_config = {key: value for key, value in ds_config.items() if key not in NOISY_KEYS}
    with tempfile.TemporaryDirectory() as directory:
        small = _write_backbones(config, model_config, Path(directory))
        small_config = build_model_config(small.model, image_size=model_config.image_size)
        engine, model = build_engine(small, small_config, ds_config, world)
    watch = GradientWatch(model.trainable_parameters())
    result = train_step(engine, list(micro_batches), world, dtype, seed=config.seed, step=1)
    silent = watch.finish()
    grad_norm = engine.get_global_grad_norm()
    val_loss = None
    if validation_batch is not None:
        val_loss = validation_loss(engine, [validation_batch], world, dtype, StopRequest())
    return CopyStep(
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


# --- rows without a token to learn ---


def check_supervised(batches: Sequence[Batch], world: World, *, data: str, max_tokens: int) -> str | None:
    """Refuses data of which too little can be learnt; warns of less. Every rank must call it.

    ``batches`` are this rank's first; ``data`` and ``max_tokens`` are for the message. Refused are a
    micro-batch without any token to learn, and more than ``MAX_UNSUPERVISED_SHARE`` of all rows.
    """
    counts = (
        sum(len(batch.labels) for batch in batches),
        sum(batch.num_unsupervised_rows() for batch in batches),
        sum(not batch.num_supervised() for batch in batches),
    )
    rows, unsupervised, empty = map(int, all_reduce_sum([float(count) for count in counts], world.device))
    if not unsupervised:
        return None
    found = [
        batch.keys[row]
        for batch in batches
        for row, labels in enumerate(batch.labels)
        if not (labels[1:] != IGNORE_INDEX).any()
    ]
    found = gather_to_main(found, world)
    first = on_main(world, lambda: found[0])
    line = (
        f"{data}: {unsupervised} of the first {rows} rows have no token to learn, {first} the first: their "
        f"prompts fill all data.max_tokens {max_tokens}; raise it"
    )
    if empty or unsupervised > MAX_UNSUPERVISED_SHARE * rows:
        raise UnsupervisedError(line)
    return line
