"""A dry run: everything a run does up to its first step, and that step with a scaled-down model."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_model
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from dehvf_ds.batch import Batch
from dehvf_ds.config import DataConfig, RunConfig, UnsupervisedError, UserError
from dehvf_ds.distributed import World, all_reduce_sum, gather_to_main, init_process_group, on_main
from dehvf_ds.model import DehvfConfig
from dehvf_ds.model.trial import NUM_LAYERS, scaled_down
from dehvf_ds.training.checkpoint import Checkpoint
from dehvf_ds.training.deepspeed_json import compute_dtype
from dehvf_ds.training.engine import GradientWatch, build_engine, build_model_config
from dehvf_ds.training.resolve import ResolvedRun
from dehvf_ds.training.run_dir import choose_start
from dehvf_ds.training.run_lock import LOCK_FILE, RunLock
from dehvf_ds.training.step import StopRequest, train_step, validation_loss

MAX_UNSUPERVISED_SHARE = 0.25
"""Share of the first step's rows without a token to learn above which a dry run refuses the data."""

NOISY_KEYS = ("flops_profiler", "comms_logger", "dump_state", "memory_breakdown", "wall_clock_breakdown")
"""Keys of the DeepSpeed JSON that make it write files or print."""


def dry_run(run: ResolvedRun, describe_evaluation: Callable[[], str] | None) -> int:
    """Does what a run does up to its first step, and that step with a scaled-down model; writes nothing.

    ``describe_evaluation`` opens the in-training evaluation and describes it in one line, on rank 0 alone.
    """
    config, world = run.config, run.world
    checkpoint = on_main(world, lambda: _try_run_dir(run))
    evaluated = on_main(world, describe_evaluation) if describe_evaluation is not None else None
    start_step, start_sample = 0, 0
    if checkpoint is not None:
        start_step, start_sample = checkpoint.progress.step, checkpoint.progress.samples
    micro_batches = list(run.training_batches(start_sample, 1))
    validation = run.validation_batches()
    validation_batch = None if validation is None else next(iter(validation))
    init_process_group(world, config.train.start_timeout_minutes)
    warning = check_supervised(micro_batches, world, config.data)
    begins = f"continues after step {start_step} of" if start_step else "begins, for"
    lines = [
        f"dry run on {world.size} x {world.device.type}; {config.run_dir} {begins} {run.num_steps} steps",
        f"  {config.deepspeed}: ZeRO stage {run.ds_config['zero_optimization']['stage']}, "
        f"{str(compute_dtype(run.ds_config))[6:]}, {config.train.accumulation(world.size)} micro-batches of "
        f"{config.train.micro_batch_size} rows a rank and step",
        f"  {config.data.train}: {run.samples_per_epoch} rows an epoch; "
        f"first micro-batch {_describe(micro_batches[0])}",
    ]
    if validation_batch is not None:
        lines.append(f"  {config.data.val}: first micro-batch {_describe(validation_batch)}")
    if evaluated is not None:
        lines.append(f"  {evaluated}")
    line, fault = _small_step(run, micro_batches, validation_batch)
    lines.append(f"  {line}")
    if warning is not None:
        lines.append(f"  warning: {warning}")
    if world.is_main:
        print("\n".join(lines), flush=True)
    if fault:
        raise UserError(f"dry run: {fault}")
    if world.is_main:
        print("the dry run passed; nothing was written", flush=True)
    return 0


def _try_run_dir(run: ResolvedRun) -> Checkpoint | None:
    """Finds the checkpoint to resume from, and checks that the directory can be locked. Rank 0 alone."""
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
    shown = int(batch.has_image.sum())
    share = "" if len(batch.pixel_values) >= shown else f" ({len(batch.pixel_values)} in all)"
    return (
        f"{rows} rows of up to {tokens} tokens, {shown} with a picture{share}, "
        f"{batch.num_supervised()} supervised tokens"
    )


# --- the step ---


def _small_step(
    run: ResolvedRun, micro_batches: list[Batch], validation_batch: Batch | None
) -> tuple[str, str | None]:
    """Takes the run's first step with a scaled-down model, and measures a validation batch.

    Returns the result in one line, and what is wrong with it, if anything.
    """
    config, world, dtype = run.config, run.world, compute_dtype(run.ds_config)
    ds_config = {key: value for key, value in run.ds_config.items() if key not in NOISY_KEYS}
    with tempfile.TemporaryDirectory() as directory:
        small = _write_backbones(config, run.model_config, Path(directory))
        small_config = build_model_config(small.model, image_size=run.model_config.image_size)
        engine, model = build_engine(small, small_config, ds_config, world)
    watch = GradientWatch(model.trainable_parameters())
    loss = train_step(engine, micro_batches, world, dtype, seed=config.seed, step=1).loss
    silent = watch.finish()
    grad_norm = engine.get_global_grad_norm()
    norm = math.nan if grad_norm is None else float(grad_norm)
    line = f"one step of a scaled-down copy, 32 wide: loss {loss:.3f}, gradient norm {norm:.3g}"
    if validation_batch is not None:
        val_loss = validation_loss(engine, [validation_batch], world, dtype, StopRequest())
        line += "" if val_loss is None else f", validation {val_loss:.3f}"
    if not loss < math.inf or silent:
        missed = f"; no gradient reached {', '.join(silent[:4])}" if silent else ""
        return line, f"loss {loss:g}{missed}"
    return line, None


def _write_backbones(config: RunConfig, model_config: DehvfConfig, directory: Path) -> RunConfig:
    """Writes small random backbones; returns the configuration with their paths."""
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
    # The model's own save_pretrained writes only on rank 0.
    model.config.save_pretrained(directory)
    save_model(model, str(directory / "model.safetensors"), metadata={"format": "pt"})


# --- rows without a token to learn ---


def check_supervised(batches: Sequence[Batch], world: World, data: DataConfig) -> str | None:
    """Refuses this rank's first batches if too few rows have a token to learn. Every rank must call it.

    Refused are a micro-batch without any, and more than ``MAX_UNSUPERVISED_SHARE`` of all rows without;
    fewer are returned as a warning.
    """
    counts = (
        sum(len(batch.labels) for batch in batches),
        sum(batch.num_unsupervised_rows() for batch in batches),
        sum(not batch.num_supervised() for batch in batches),
    )
    rows, unsupervised, empty = map(int, all_reduce_sum([float(count) for count in counts], world.device))
    if not unsupervised:
        return None
    keys = [batch.keys[row] for batch in batches for row in batch.unsupervised_rows()]
    keys = gather_to_main(keys, world)
    first = on_main(world, lambda: keys[0])
    line = (
        f"{data.train}: {unsupervised} of the first {rows} rows have no token to learn, {first} the first: "
        f"their prompts fill all data.max_tokens {data.max_tokens}; raise it"
    )
    if empty or unsupervised > MAX_UNSUPERVISED_SHARE * rows:
        raise UnsupervisedError(line)
    return line
