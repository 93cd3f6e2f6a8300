"""The training loop: which batches make a step, when to save, when to stop."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dehvf_ds.batch import Batch
from dehvf_ds.config import JobError, TrainConfig, UnsupervisedError
from dehvf_ds.distributed import World
from dehvf_ds.training.damage import DamageLog
from dehvf_ds.training.levels import level_metrics
from dehvf_ds.training.metrics import (
    MetricsWriter,
    StepMetrics,
    model_flops,
    peak_flops,
    peak_memory_bytes,
)
from dehvf_ds.training.optim import GradientWatch, learning_rate, set_learning_rate
from dehvf_ds.training.progress import Progress
from dehvf_ds.training.signals import StopRequest
from dehvf_ds.training.step import StepResult, train_step

MIN_SAMPLES_OF_SHARE = 1000
"""Samples before the share of damaged ones is looked at; one among the first ten says nothing."""


MAX_UNSUPERVISED_SHARE = 0.01
"""Share of rows without a token to learn that a run tells of, once."""


class TrainingError(JobError):
    """The run cannot go on; the message says why. What was saved stays."""


class SavingError(JobError):
    """Too many checkpoints in a row could not be written; training on would be for nothing."""

    code = 74


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the loop needs to know of the run.

    Attributes:
        config: schedule, limits and intervals.
        world: this process's place.
        dtype: compute dtype.
        seed: the run's seed, for dropout.
        num_steps: optimizer steps of the whole run.
        epoch_samples: rows that an epoch consumes.
        max_bad_share: share of replaced samples above which the run stops.
        num_parameters: parameters of the language model, for the FLOPs.
    """

    config: TrainConfig
    world: World
    dtype: torch.dtype
    seed: int
    num_steps: int
    epoch_samples: int
    max_bad_share: float
    num_parameters: int


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What an evaluation in the middle of a run found.

    Attributes:
        score: tells the best checkpoint, the higher the better; None where it could not be computed.
        numbers: for the metrics, by name.
        sheet: a PNG of example pictures with their answers; None where it could not be drawn.
    """

    score: float | None
    numbers: dict[str, float]
    sheet: Path | None


@dataclass(frozen=True, kw_only=True)
class Actions:
    """What the loop calls; on every rank.

    Attributes:
        checkpoint: writes a checkpoint of where the run stands; whether it could be written.
        finish: writes the adapter artifact of where the run stands.
        validate: measures the validation loss; None where the stop request came in between.
        evaluate: answers and scores at this step; None where it came to nothing.
        evaluate_every: optimizer steps between them; the last step has one too.
        renew: says that the run is alive.
    """

    checkpoint: Callable[[Progress], bool]
    finish: Callable[[Progress], None]
    validate: Callable[[], float | None] | None = None
    evaluate: Callable[[int], Evaluated | None] | None = None
    evaluate_every: int = 0
    renew: Callable[[], None] | None = None


def fit(
    engine: Any,
    batches: Iterable[Batch],
    job: Job,
    progress: Progress,
    actions: Actions,
    *,
    writer: MetricsWriter | None,
    stop: StopRequest,
) -> bool:
    """Trains from where ``progress`` stands to the run's last step.

    Args:
        engine: DeepSpeed engine around the model.
        batches: this rank's micro-batches from there on, enough for all steps.
        job: the run.
        progress: where the run stands; changed.
        actions: what is called to save and to validate.
        writer: where metrics go; None on ranks other than 0.
        stop: a request to stop, as this rank heard it.

    Returns:
        Whether the run is finished; False if it stopped on request, with a checkpoint.

    Raises:
        TrainingError: a trainable gets no gradient, too many steps in a row were not finite, or too many
            samples are damaged.
        SavingError: too many checkpoints in a row could not be written.
        UnsupervisedError: a step or the validation has no token to learn; the weights until then are saved.
    """
    try:
        return _fit(engine, batches, job, progress, actions, writer, stop)
    except UnsupervisedError:
        if progress.step:
            actions.finish(progress)
        raise


def _fit(
    engine: Any,
    batches: Iterable[Batch],
    job: Job,
    progress: Progress,
    actions: Actions,
    writer: MetricsWriter | None,
    stop: StopRequest,
) -> bool:
    config, world = job.config, job.world
    accumulation = config.accumulation(world.size)
    stream = iter(batches)
    watch = GradientWatch(engine.module.trainable_parameters())
    damage = DamageLog(world)
    told, failed_saves = False, 0
    for step in range(progress.step + 1, job.num_steps + 1):
        started = time.perf_counter()
        micro_batches = [next(stream) for _ in range(accumulation)]
        data_seconds = time.perf_counter() - started
        lr = learning_rate(step - 1, config, job.num_steps)
        set_learning_rate(engine.optimizer.param_groups, lr)
        result = train_step(
            engine, micro_batches, world, job.dtype, seed=job.seed, step=step, stopping=stop.requested
        )
        if watch is not None:
            _require_gradients(watch)
            watch = None
        taken = engine.was_step_applied()
        _count(progress, result, config, taken=taken)
        damage.add(micro_batches)
        seconds = time.perf_counter() - started
        last = step == job.num_steps
        told = told or _tell_of_unsupervised(progress, world, last=last)
        if last:
            # Before other data are read, which may be damaged: what was trained is there all the same.
            actions.finish(progress)
        more = {}
        if config.levels_every and (step % config.levels_every == 0 or step == 1 or last):
            more |= level_metrics(engine.module, result.level_weights)
        if actions.validate and (last or (config.eval_every and step % config.eval_every == 0)):
            more |= _validate(actions.validate, progress, tells_best=actions.evaluate is None)
        if actions.evaluate and (last or step % actions.evaluate_every == 0):
            more |= _evaluate(actions.evaluate, progress, writer)
        if actions.renew is not None:
            actions.renew()
        if writer is not None:
            grad_norm = _number(engine.get_global_grad_norm()) if taken else None
            writer.write(_step_metrics(job, progress, result, lr, grad_norm, seconds, data_seconds), more)
        if progress.skipped_in_a_row >= config.max_bad_steps:
            # No step was taken since the weights were last good, so these are.
            actions.finish(progress)
            raise TrainingError(
                f"{progress.skipped_in_a_row} steps in a row had a loss or gradient that is not finite; "
                f"stopped at step {step}, weights as of step {step - progress.skipped_in_a_row} are saved"
            )
        if progress.replaced > job.max_bad_share * max(progress.samples, MIN_SAMPLES_OF_SHARE):
            actions.finish(progress)
            raise TrainingError(
                f"{progress.replaced} of {progress.samples} samples are damaged, more than "
                f"data.max_bad_share {job.max_bad_share:g} of them; by shard: {damage.by_shard()}"
            )
        if result.num_stopping and not last:
            actions.checkpoint(progress)
            return False
        if config.save_every and (step % config.save_every == 0 or progress.best_step == step or last):
            failed_saves = 0 if actions.checkpoint(progress) else failed_saves + 1
            if failed_saves >= config.max_failed_saves and not last:
                raise SavingError(
                    f"{failed_saves} checkpoints in a row could not be written; stopped at step {step}; the "
                    "same command goes on from the last that was"
                )
    if progress.replaced:
        damage.report()
    return True


def _count(progress: Progress, result: StepResult, config: TrainConfig, *, taken: bool) -> None:
    progress.step += 1
    progress.samples += config.global_batch_size
    progress.tokens += result.num_tokens
    progress.skipped += not taken
    progress.skipped_in_a_row = 0 if taken else progress.skipped_in_a_row + 1
    progress.unsupervised_rows += result.num_unsupervised_rows
    progress.replaced += result.num_replaced


def _tell_of_unsupervised(progress: Progress, world: World, *, last: bool) -> bool:
    """Warns where too many rows had nothing to learn; returns whether it did."""
    seen = progress.samples if last else max(progress.samples, MIN_SAMPLES_OF_SHARE)
    if progress.unsupervised_rows <= MAX_UNSUPERVISED_SHARE * seen:
        return False
    if world.is_main:
        print(
            f"warning: {progress.unsupervised_rows} of {progress.samples} rows had no token to learn: their "
            "prompts fill all data.max_tokens; raise it",
            file=sys.stderr,
            flush=True,
        )
    return True


def _validate(
    validate: Callable[[], float | None], progress: Progress, *, tells_best: bool
) -> dict[str, float]:
    loss = validate()
    if loss is None:
        return {}
    # Of what is not finite nothing is the best.
    if math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
        progress.best_loss = loss
        if tells_best:
            progress.best_step = progress.step
    return {"val/loss": loss}


def _evaluate(
    evaluate: Callable[[int], Evaluated | None], progress: Progress, writer: MetricsWriter | None
) -> dict[str, float]:
    found = evaluate(progress.step)
    if found is None:
        return {}
    score = found.score
    if (
        score is not None
        and math.isfinite(score)
        and (progress.best_score is None or score > progress.best_score)
    ):
        progress.best_score, progress.best_step = score, progress.step
    if writer is not None and found.sheet is not None:
        writer.write_picture("eval/examples", found.sheet, progress.step)
    return found.numbers


def _step_metrics(
    job: Job,
    progress: Progress,
    result: StepResult,
    lr: float,
    grad_norm: float | None,
    seconds: float,
    data_seconds: float,
) -> StepMetrics:
    peak = peak_flops(job.world.device)
    flops = model_flops(job.num_parameters, result.num_tokens) / seconds / job.world.size
    return StepMetrics(
        step=progress.step,
        epoch=progress.samples / job.epoch_samples,
        samples=progress.samples,
        tokens=progress.tokens,
        loss=result.loss,
        grad_norm=grad_norm,
        lr=lr,
        seconds=seconds,
        data_seconds=data_seconds,
        samples_per_s=job.config.global_batch_size / seconds,
        tokens_per_s=result.num_tokens / seconds,
        mfu=None if peak is None else flops / peak,
        memory_bytes=peak_memory_bytes(job.world.device),
        skipped=progress.skipped,
        unsupervised_rows=progress.unsupervised_rows,
        replaced=progress.replaced,
        rows_crc=result.rows_crc,
    )


def _require_gradients(watch: GradientWatch) -> None:
    silent = watch.finish()
    if silent:
        raise TrainingError(
            f"no gradient reached {len(silent)} trainable parameters in the first step: "
            f"{', '.join(silent[:4])}"
        )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
