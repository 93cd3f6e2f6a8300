"""A training run from its directory to its last step."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from dehvf_ds.batch import Batch
from dehvf_ds.config import JobError, UnsupervisedError, to_plain
from dehvf_ds.distributed import (
    REQUEUE_EXIT_CODE,
    init_process_group,
    on_abort,
    on_main,
    set_timeout,
    wait_for_ranks,
)
from dehvf_ds.training.checkpoint import Checkpoint, Checkpoints, Progress, restore_adapter
from dehvf_ds.training.deepspeed_json import compute_dtype
from dehvf_ds.training.engine import GradientWatch, build_engine, learning_rate, set_learning_rate
from dehvf_ds.training.flops import count_flops
from dehvf_ds.training.metrics import (
    Evaluation,
    Metrics,
    MetricsWriter,
    SubstitutionLog,
    Trackers,
    router_metrics,
    step_speed,
)
from dehvf_ds.training.resolve import ResolvedRun
from dehvf_ds.training.run_dir import ADAPTER_DIR, METRICS_FILE, flatten, open_run_dir
from dehvf_ds.training.run_lock import RunLock
from dehvf_ds.training.step import StepResult, StopRequest, train_step, validation_loss
from dehvf_ds.training.zero import numel

MIN_SAMPLES_OF_SHARE = 1000
"""A share of fewer samples counts as a share of so many: one damaged among the first ten says nothing."""

UNSUPERVISED_WARNING_SHARE = 0.01
"""Share of rows without a token to learn above which a run warns, once."""


class Trainer:
    """One rank of a run. ``evaluation`` is called every ``eval.every_steps`` steps and at the end."""

    def __init__(self, run: ResolvedRun, evaluation: Evaluation | None = None) -> None:
        self.run, self.config, self.world = run, run.config, run.world
        self.evaluation = evaluation
        self.run_dir = Path(run.config.run_dir)
        self.dtype = compute_dtype(run.ds_config)
        self.stop, self.progress = StopRequest(), Progress()
        self.lock: RunLock | None = None
        self.writer: MetricsWriter | None = None
        self.on_exit = ExitStack()
        self.substitutions = SubstitutionLog(run.world)
        self.warned_of_unsupervised = False

    def fit(self) -> int:
        """Trains to the last step; returns the exit code: 0 finished, 85 stopped on request."""
        # First: a job whose ranks never come together must not lock the directory.
        wait_for_ranks(self.config.train.start_timeout_minutes)
        with self.on_exit:
            checkpoint = on_main(self.world, self._open_run_dir)
            if checkpoint is not None:
                self.progress = checkpoint.progress
                if self.progress.step >= self.run.num_steps:
                    return self._already_finished(checkpoint)
            self._set_up(checkpoint)
            try:
                finished = self._train()
            except UnsupervisedError:
                if self.progress.step:
                    self.save_adapter()
                raise
        if finished:
            self._print(f"adapter: {self.run_dir / ADAPTER_DIR}   metrics: {self.run_dir / METRICS_FILE}")
            return 0
        self._print(f"stopped on request after step {self.progress.step}; the same command continues")
        return REQUEUE_EXIT_CODE

    # --- set-up ---

    def _open_run_dir(self) -> Checkpoint | None:
        self.lock, checkpoint = open_run_dir(self.config, self.run.index.digest)
        self.on_exit.callback(self.lock.release)
        on_abort(self.lock.release)
        return checkpoint

    def _already_finished(self, last: Checkpoint) -> int:
        """A finished run may have been killed between its last checkpoint and its adapter."""
        adapter = self.run_dir / ADAPTER_DIR
        written = on_main(self.world, lambda: restore_adapter(adapter, last))
        self._print(f"{self.run_dir}: finished already, all {self.run.num_steps} steps")
        if written:
            self._print(f"adapter: {adapter}, restored because it was missing or damaged")
        return 0

    def _set_up(self, checkpoint: Checkpoint | None) -> None:
        train, world = self.config.train, self.world
        # Loader workers are forked before CUDA, NCCL or gloo start threads.
        steps_left, on_gpu = self.run.num_steps - self.progress.step, world.device.type == "cuda"
        self.batches = self.run.training_batches(self.progress.samples, steps_left, pin_memory=on_gpu)
        self.validation_batches = self.run.validation_batches()
        for loader in (self.batches, self.validation_batches):
            if loader is not None:
                loader.start()
        init_process_group(world, train.start_timeout_minutes)
        # Until here there was nothing to save, and a signal ended the job at once.
        self.stop.install()
        self._print(f"{self.run_dir}: loading the frozen weights")
        self.engine, self.model = build_engine(self.config, self.run.model_config, self.run.ds_config, world)
        self.checkpoints = Checkpoints(
            self.config, world, self.model, self.engine, self.dtype, self.run.index.digest
        )
        if checkpoint is not None:
            self.checkpoints.load(checkpoint)
        self.flops = count_flops(self.model)
        self._announce()
        if self.evaluation is not None:
            self.evaluation.open()
        set_timeout(train.timeout_minutes)
        if world.is_main:
            start, settings = self.progress.step, flatten(to_plain(self.config))
            self.writer = MetricsWriter(
                self.run_dir,
                Trackers(train.trackers, self.run_dir, settings, start),
                num_steps=self.run.num_steps,
                log_every=train.log_every,
                start_step=start,
            )
            self.on_exit.callback(self.writer.close)

    def _announce(self) -> None:
        num_trainable = sum(map(numel, self.model.trainable_parameters().values()))
        begins = f"; continuing after step {self.progress.step}" if self.progress.step else ""
        self._print(
            f"{self.run_dir}: {self.run.num_steps} steps of {self.config.train.global_batch_size} rows on "
            f"{self.world.size} x {self.world.device.type}, {num_trainable / 1e6:.2f} M trainable "
            f"parameters, fusion {self.config.model.fusion}"
            f"{', compiled in the first steps' if self.config.train.compile else ''}{begins}"
        )

    # --- the loop ---

    def _train(self) -> bool:
        """Trains until the last step or a request to stop; returns whether the run is finished."""
        batches = iter(self.batches)
        watch = GradientWatch(self.model.trainable_parameters())
        for step in range(self.progress.step + 1, self.run.num_steps + 1):
            last = step == self.run.num_steps
            result, metrics = self._step(step, batches)
            if watch is not None and (silent := watch.finish()):
                raise JobError(
                    f"no gradient reached {len(silent)} trainable parameters in the first step: "
                    f"{', '.join(silent[:4])}"
                )
            watch = None
            self._warn_of_unsupervised(last)
            if last:
                # First: validation data may be damaged, and what was trained must not be lost.
                self.save_adapter()
            occasional = self._measure(step, result, last)
            if self.lock is not None:
                self.lock.beat()
            if self.writer is not None:
                self.writer.write(metrics | occasional)
            self._require_health()
            if result.num_stopping and not last:
                self.save(last=True)
                return False
            every, best = self.config.train.save_every, self.progress.best_step == step
            if every and (step % every == 0 or best or last):
                self.save(last=last)
        if count := self.progress.substituted:
            line = f"substituted {count} damaged samples; by shard: {self.substitutions.by_shard()}"
            self._print(line, file=sys.stderr)
        return True

    def _step(self, step: int, batches: Iterator[Batch]) -> tuple[StepResult, Metrics]:
        """Reads one accumulation window and trains on it; returns the step's numbers, too."""
        train, progress = self.config.train, self.progress
        started = time.perf_counter()
        micro_batches = [next(batches) for _ in range(train.accumulation(self.world.size))]
        data_seconds = time.perf_counter() - started
        lr = learning_rate(step - 1, train, self.run.num_steps)
        set_learning_rate(self.engine.optimizer.param_groups, lr)
        result = train_step(
            self.engine,
            micro_batches,
            self.world,
            self.dtype,
            seed=self.config.seed,
            step=step,
            stopping=self.stop.requested,
            record_router=self._records_router(step),
        )
        taken = self.engine.was_step_applied()
        progress.count(result, train.global_batch_size, taken=taken)
        self.substitutions.add(micro_batches)
        seconds = time.perf_counter() - started
        grad_norm = self.engine.get_global_grad_norm() if taken else None
        return result, {
            "step": progress.step,
            "epoch": progress.samples / self.run.samples_per_epoch,
            "samples": progress.samples,
            "tokens": progress.tokens,
            "train/loss": result.loss,
            "train/grad_norm": None if grad_norm is None else float(grad_norm),
            "lr": lr,
            "seconds": seconds,
            "data_seconds": data_seconds,
            **step_speed(result, seconds, self.flops, self.world),
            "skipped": progress.skipped,
            "unsupervised_rows": progress.unsupervised_rows,
            "substituted": progress.substituted,
            "rows_crc": result.rows_crc,
        }

    def _measure(self, step: int, result: StepResult, last: bool) -> dict[str, float]:
        """Measures what is not measured in every step: the router, the validation loss, scores."""
        train, found = self.config.train, {}
        if self._records_router(step):
            found |= router_metrics(self.model, result.router_weights)
        if last or (train.validate_every and step % train.validate_every == 0):
            found |= self.validate()
        if self.evaluation is not None and (last or step % self.config.eval.every_steps == 0):
            found |= self.evaluate(self.evaluation)
        return found

    def _records_router(self, step: int) -> bool:
        every = self.config.train.router_every
        return every > 0 and (step % every == 0 or step in (1, self.run.num_steps))

    def validate(self) -> dict[str, float]:
        """Measures the loss on the validation rows, where there are any. Every rank must call it."""
        if self.validation_batches is None:
            return {}
        loss = validation_loss(self.engine, self.validation_batches, self.world, self.dtype, self.stop)
        if loss is None:
            return {}
        self.progress.note_loss(loss, decides=self.evaluation is None)
        return {"val/loss": loss}

    def evaluate(self, evaluation: Evaluation) -> dict[str, float]:
        """Runs the in-training evaluation. Every rank must call it."""
        found = evaluation(self.model, self.progress.step, self.stop)
        if found is None:
            return {}
        self.progress.note_score(found.score)
        if self.writer is not None and found.sheet is not None:
            self.writer.write_picture("eval/examples", found.sheet, self.progress.step)
        return found.numbers

    # --- saving and stopping ---

    def save(self, *, last: bool) -> None:
        """Writes a checkpoint, the ``last`` one perhaps. Every rank must call it."""
        self._check_lock()
        self.checkpoints.save(self.progress, last=last)

    def save_adapter(self) -> None:
        """Writes the adapter as it is now. Every rank must call it."""
        self._check_lock()
        self.checkpoints.save_adapter(self.progress)

    def _check_lock(self) -> None:
        on_main(self.world, lambda: None if self.lock is None else self.lock.check())

    def _require_health(self) -> None:
        """Ends a run that does not train, or trains on too few samples; the adapter is saved."""
        progress, limit = self.progress, self.config.data.max_bad_share
        skipped, substituted = progress.skipped_in_a_row, progress.substituted
        if skipped >= self.config.train.max_bad_steps:
            # The skipped steps did not change the weights.
            self.save_adapter()
            raise JobError(
                f"{skipped} steps in a row had a loss or gradient that is not finite; stopped at step "
                f"{progress.step}, weights as of step {progress.step - skipped} are saved"
            )
        if substituted > limit * max(progress.samples, MIN_SAMPLES_OF_SHARE):
            self.save_adapter()
            raise JobError(
                f"{substituted} of {progress.samples} samples are damaged, more than data.max_bad_share "
                f"{limit:g} of them; by shard: {self.substitutions.by_shard()}"
            )

    def _warn_of_unsupervised(self, last: bool) -> None:
        progress = self.progress
        seen = progress.samples if last else max(progress.samples, MIN_SAMPLES_OF_SHARE)
        if self.warned_of_unsupervised or progress.unsupervised_rows <= UNSUPERVISED_WARNING_SHARE * seen:
            return
        self.warned_of_unsupervised = True
        self._print(
            f"warning: {progress.unsupervised_rows} of {progress.samples} rows had no token to learn: their "
            "prompts fill all data.max_tokens; raise it",
            file=sys.stderr,
        )

    def _print(self, line: str, file: TextIO | None = None) -> None:
        if self.world.is_main:
            print(line, file=file or sys.stdout, flush=True)
