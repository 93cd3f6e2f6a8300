"""The training loop: which batches make a step, how their tokens are weighed, when to stop."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from dehvf_ds.batch import Batch
from dehvf_ds.config import TrainConfig
from dehvf_ds.distributed import World, all_reduce_sum, gather_to_main, seed_micro_step
from dehvf_ds.training.metrics import (
    MetricsWriter,
    StepMetrics,
    model_flops,
    peak_flops,
    peak_memory_bytes,
)
from dehvf_ds.training.optim import GradientWatch, learning_rate, set_learning_rate

MIN_SAMPLES_OF_SHARE = 1000
"""Samples before the share of damaged ones is looked at; one among the first ten says nothing."""

MAX_DAMAGE_LINES = 20


class TrainingError(Exception):
    """The run cannot go on; the message says why. What was saved stays."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step over all ranks.

    Attributes:
        loss: mean cross-entropy a supervised token, in nats; 0 without any.
        num_supervised: tokens that the loss was taken at.
        num_tokens: text tokens that went through the model.
        num_unsupervised_rows: rows that nothing was learnt of.
        num_replaced: damaged samples that others stood in for.
    """

    loss: float
    num_supervised: int
    num_tokens: int
    num_unsupervised_rows: int
    num_replaced: int


def train_step(
    engine: Any, micro_batches: list[Batch], world: World, dtype: torch.dtype, *, seed: int, step: int
) -> StepResult:
    """Forward and backward over one accumulation window, then the optimizer. Every rank must call it.

    Every supervised token of the window counts the same, on whatever rank and in whatever micro-batch it
    stands: the loss is the sum over all tokens divided by their number over all ranks. DeepSpeed
    averages gradients over ranks, hence the factor ``world.size``.

    Args:
        engine: DeepSpeed engine around the model.
        micro_batches: this rank's share of the window, on any device.
        world: this process's place.
        dtype: compute dtype, for the pictures.
        seed: the run's seed, for dropout.
        step: number of this optimizer step, for dropout.
    """
    counts = (
        (b.num_supervised(), b.num_tokens(), b.num_unsupervised_rows(), len(b.replaced))
        for b in micro_batches
    )
    own = [float(sum(column)) for column in zip(*counts, strict=True)]
    num_supervised, *others = all_reduce_sum(own, world.device)
    # A window without any supervised token walks the same road, with a loss of 0.
    divisor = max(num_supervised, 1.0)
    own_loss = torch.zeros((), dtype=torch.float64, device=world.device)
    for micro_step, batch in enumerate(micro_batches):
        seed_micro_step(seed, step, micro_step, world.rank)
        loss_sum = engine(**batch.to(world.device, dtype).inputs()).loss_sum
        engine.backward(loss_sum * (world.size / divisor), scale_wrt_gas=False)
        engine.step()
        own_loss += loss_sum.detach().double()
    (loss_sum_all,) = all_reduce_sum([own_loss.item()], world.device)
    return StepResult(loss_sum_all / divisor, int(num_supervised), *map(int, others))


def fit(
    engine: Any,
    batches: Iterable[Batch],
    config: TrainConfig,
    *,
    seed: int,
    num_steps: int,
    epoch_samples: int,
    max_bad_share: float,
    num_parameters: int,
    world: World,
    dtype: torch.dtype,
    writer: MetricsWriter | None,
    save: Callable[[int, int], None],
) -> None:
    """Trains for ``num_steps`` optimizer steps.

    Args:
        engine: DeepSpeed engine around the model.
        batches: this rank's micro-batches in order, enough for all steps.
        config: schedule, limits and intervals.
        seed: the run's seed, for dropout.
        num_steps: optimizer steps to take.
        epoch_samples: rows that an epoch consumes.
        max_bad_share: share of replaced samples above which the run stops.
        num_parameters: parameters of the language model, for the FLOPs.
        world: this process's place.
        dtype: compute dtype.
        writer: where metrics go; None on ranks other than 0.
        save: called on every rank as ``save(step, samples)`` to write an artifact.

    Raises:
        TrainingError: a trainable gets no gradient, too many steps in a row were not finite, or too many
            samples are damaged.
    """
    accumulation = config.accumulation(world.size)
    stream = iter(batches)
    watch = GradientWatch(engine.module.trainable_parameters())
    peak = peak_flops(world.device)
    tokens = skipped = skipped_in_a_row = unsupervised_rows = replaced = 0
    damage = DamageLog(world)
    for step in range(1, num_steps + 1):
        started = time.perf_counter()
        micro_batches = [next(stream) for _ in range(accumulation)]
        data_seconds = time.perf_counter() - started
        lr = learning_rate(step - 1, config, num_steps)
        set_learning_rate(engine.optimizer.param_groups, lr)
        result = train_step(engine, micro_batches, world, dtype, seed=seed, step=step)
        if step == 1:
            _require_gradients(watch)
        taken = engine.was_step_applied()
        skipped_in_a_row = 0 if taken else skipped_in_a_row + 1
        skipped += not taken
        tokens += result.num_tokens
        unsupervised_rows += result.num_unsupervised_rows
        replaced += result.num_replaced
        damage.add(micro_batches)
        seconds = time.perf_counter() - started
        samples = step * config.global_batch_size
        if writer is not None:
            flops = model_flops(num_parameters, result.num_tokens) / seconds / world.size
            writer.write(
                StepMetrics(
                    step=step,
                    epoch=samples / epoch_samples,
                    samples=samples,
                    tokens=tokens,
                    loss=result.loss,
                    grad_norm=_number(engine.get_global_grad_norm()) if taken else None,
                    lr=lr,
                    seconds=seconds,
                    data_seconds=data_seconds,
                    samples_per_s=config.global_batch_size / seconds,
                    tokens_per_s=result.num_tokens / seconds,
                    mfu=None if peak is None else flops / peak,
                    memory_bytes=peak_memory_bytes(world.device),
                    skipped=skipped,
                    unsupervised_rows=unsupervised_rows,
                    replaced=replaced,
                )
            )
        stop = skipped_in_a_row >= config.max_bad_steps
        if stop or step == num_steps or (config.save_every and step % config.save_every == 0):
            # No step was taken since the weights were last good, so these are.
            save(step, samples)
        if stop:
            raise TrainingError(
                f"{skipped_in_a_row} steps in a row had a loss or gradient that is not finite; stopped at "
                f"step {step}, weights as of step {step - skipped_in_a_row} are saved"
            )
        if replaced > max_bad_share * max(samples, MIN_SAMPLES_OF_SHARE):
            save(step, samples)
            raise TrainingError(
                f"{replaced} of {samples} samples are damaged, more than data.max_bad_share "
                f"{max_bad_share:g} of them; by shard: {damage.by_shard()}"
            )
    if replaced:
        by_shard = damage.by_shard()
        if world.is_main:
            print(f"replaced {replaced} damaged samples; by shard: {by_shard}", file=sys.stderr, flush=True)


class DamageLog:
    """The damaged samples that this rank met: a line for each of the first ones, and counts by shard."""

    def __init__(self, world: World):
        """Starts empty."""
        self._world = world
        self._counts: Counter[str] = Counter()

    def add(self, micro_batches: list[Batch]) -> None:
        """Counts the batches' replaced samples and tells of them."""
        for shard, message in (damage for batch in micro_batches for damage in batch.replaced):
            if self._counts.total() < MAX_DAMAGE_LINES:
                print(f"replaced a damaged sample: {message}", file=sys.stderr, flush=True)
            self._counts[shard] += 1

    def by_shard(self) -> str:
        """The shards with the most damaged samples over all ranks; every rank must call it."""
        total: Counter[str] = Counter()
        for shard, count in gather_to_main(list(self._counts.items()), self._world):
            total[shard] += count
        return ", ".join(f"{shard} {count}" for shard, count in total.most_common(8))


def _require_gradients(watch: GradientWatch) -> None:
    silent = watch.finish()
    if silent:
        raise TrainingError(
            f"no gradient reached {len(silent)} trainable parameters in the first step: "
            f"{', '.join(silent[:4])}"
        )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
