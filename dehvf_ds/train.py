"""Trains DEHVF: parse, find out the launch environment, build, fit.

    deepspeed dehvf_ds/train.py --deepspeed ds_configs/zero3.json [--config RECIPE|FILE] [--train.lr 1e-3 ...]

Also under ``torchrun`` and ``srun``, or alone as ``python dehvf_ds/train.py``.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

# Run as a script, dehvf_ds/ is first on the path, where our module names would shadow other packages'.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from dehvf_ds.config import RunConfig, UserError, parse_run_config
from dehvf_ds.config.ignored import ignored_settings
from dehvf_ds.data.loader import read_sample
from dehvf_ds.distributed import (
    REQUEUE_EXIT_CODE,
    World,
    before_end,
    init_process_group,
    meet,
    on_main,
    read_world,
    run_entry,
    set_timeout,
    wait_for_ranks,
)
from dehvf_ds.evaluation.inside import InsideEvaluation
from dehvf_ds.evaluation.questions import TASKS, Questions, open_questions
from dehvf_ds.evaluation.scores import open_scorer
from dehvf_ds.planning.memory import check_inside
from dehvf_ds.training.checked import Checked, check
from dehvf_ds.training.checkpoint import Checkpoints, complete_artifact, save_artifact
from dehvf_ds.training.deepspeed_json import compute_dtype
from dehvf_ds.training.engine import build_engine
from dehvf_ds.training.lease import Lease
from dehvf_ds.training.loop import Actions, Job, fit
from dehvf_ds.training.metrics import MetricsWriter
from dehvf_ds.training.progress import Progress
from dehvf_ds.training.rehearsal import rehearse
from dehvf_ds.training.resume import Checkpoint, choose_start, is_finished, open_run
from dehvf_ds.training.signals import StopRequest, exit_on_request
from dehvf_ds.training.supervision import check_supervised, check_validation
from dehvf_ds.training.validation import validation_loss


def main(argv: list[str]) -> int:
    """Runs one training; returns the exit code: 0 finished, 85 stopped on request and to be started again.

    Raises:
        UserError: anything in the configuration, the files or the environment that the user must mend.
    """
    exit_on_request()
    config = parse_run_config(argv)
    idle = ignored_settings(config)
    if config.dry_run:
        # A cache is written; shards are read where they lie.
        config = replace(config, data=replace(config.data, cache_dir=None))
    world = read_world()
    meet(world, config.train.start_timeout_minutes)
    run = check(config, world)
    if run.world.is_main:
        for line in [*idle, *schedule_notes(run)]:
            print(f"note: {line}", file=sys.stderr, flush=True)
    questions = open_inside(run)
    if on_main(run.world, lambda: is_finished(config, run.num_steps)):
        if run.world.is_main:
            told = f"finished already, all {run.num_steps} steps; --overwrite true trains anew"
            print(f"{config.run_dir}: {told}", flush=True)
        return 0
    on_main(run.world, lambda: check_inside(config, run.ds_config, run.world))
    return dry_run(run, questions) if config.dry_run else train(run, questions)


def schedule_notes(run: Checked) -> list[str]:
    """What the schedule does not do in so many steps, though it looks like it."""
    lines, train = [], run.config.train
    if train.warmup_steps >= run.num_steps:
        lines.append(
            f"train.warmup_steps {train.warmup_steps} is not over in the run's {run.num_steps} steps, and "
            f"the learning rate never gets to train.lr {train.lr:g}"
        )
    return lines


def open_inside(run: Checked) -> Questions | None:
    """Opens the rows that the run asks in its middle; None where it asks none.

    Raises:
        UserError: they are of another task, or Java is missing.
    """
    config, settings = run.config, run.config.eval
    data = settings.data or config.data.val
    if not settings.every_steps or data is None:
        return None
    questions = open_questions(
        data,
        TASKS[config.data.task],
        run.tokenizer,
        run.transform,
        prompt=run.model_config.prompt,
        scienceqa=config.data.scienceqa,
        caption_tokenizer=settings.tokenizer,
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.num_beams,
        max_samples=settings.max_samples,
    )
    questions.require_positions(run.model_config)
    return questions


def train(run: Checked, questions: Questions | None) -> int:
    """Trains from the newest checkpoint, or from the start, to the last step or the request to stop."""
    config, world = run.config, run.world
    lease: Lease | None = None

    def take_directory() -> Checkpoint | None:
        nonlocal lease
        lease, found = open_run(config, run.index.digest)
        before_end(lease.release)
        return found

    # A directory is not taken by a job that never begins.
    wait_for_ranks(config.train.start_timeout_minutes)
    checkpoint = on_main(world, take_directory)
    try:
        start = Progress() if checkpoint is None else checkpoint.progress
        if checkpoint is not None and start.step >= run.num_steps:
            # It may have been killed between its last checkpoint and its artifact.
            adapter, last = Path(config.run_dir) / "adapter", checkpoint
            written = on_main(world, lambda: complete_artifact(adapter, last))
            if world.is_main:
                print(f"{config.run_dir}: finished already, all {run.num_steps} steps", flush=True)
            if world.is_main and written:
                print(f"adapter: {adapter}, which was not there or not whole", flush=True)
            return 0
        loader = run.training_batches(start.samples, run.num_steps - start.step)
        held_out = run.validation_batches()
        for batches in (loader, held_out):
            if batches is not None:
                batches.start()
        init_process_group(world, config.train.start_timeout_minutes)
        # Not sooner: until then nothing would be saved, and all end at once.
        stop = StopRequest()
        stop.install()
        engine, model = build_engine(config, run.model_config, run.ds_config, world)
        dtype = compute_dtype(run.ds_config)
        checkpoints = Checkpoints(config, world, model, engine, dtype, run.index.digest)
        if checkpoint is not None:
            checkpoints.load(checkpoint)
        _announce(config, world, model, run.num_steps, start)
        job = Job(
            config=config.train,
            world=world,
            dtype=dtype,
            seed=config.seed,
            num_steps=run.num_steps,
            epoch_samples=run.samples_per_epoch,
            max_bad_share=config.data.max_bad_share,
            num_parameters=sum(_numel(p) for p in model.language_model.parameters()),
        )

        def fence() -> None:
            on_main(world, lambda: None if lease is None else lease.check())

        def save(progress: Progress) -> bool:
            fence()
            return checkpoints.save(progress)

        def finish(progress: Progress) -> None:
            fence()
            _save_last(config, model, world, dtype, progress)

        actions = Actions(
            checkpoint=save,
            finish=finish,
            validate=None
            if held_out is None
            else partial(validation_loss, engine, held_out, world, dtype, stop),
            evaluate=None
            if questions is None
            else InsideEvaluation(
                config=config.eval,
                questions=questions,
                model=model,
                world=world,
                run_dir=Path(config.run_dir),
                stop=stop,
            ),
            evaluate_every=config.eval.every_steps,
            renew=None if lease is None else lease.renew,
        )
        set_timeout(config.train.timeout_minutes)
        return _fit(engine, loader, job, start, actions, stop, config)
    finally:
        if lease is not None:
            lease.release()


def dry_run(run: Checked, questions: Questions | None) -> int:
    """Does all that a run does up to its first step, and that with a scaled-down copy; writes nothing."""
    config, world = run.config, run.world
    checkpoint = on_main(world, lambda: _look_at_run_dir(run))

    def look_at_scores() -> None:
        if questions is not None:
            open_scorer(questions, name=Path(config.run_dir).name, tokenizer=config.eval.tokenizer)

    on_main(world, look_at_scores)
    start = Progress() if checkpoint is None else checkpoint.progress
    accumulation = config.train.accumulation(world.size)
    micro_batches = list(run.training_batches(start.samples, 1))
    held_out = run.validation_batches()
    held_out_batch = None if held_out is None else next(iter(held_out))
    init_process_group(world, config.train.start_timeout_minutes)
    limit = config.data.max_tokens
    told = check_supervised(
        micro_batches,
        lambda: run.without_limit().training_batches(start.samples, 1),
        world,
        data=config.data.train,
        max_tokens=limit,
    )
    if held_out_batch is not None and config.data.val is not None:
        check_validation(
            held_out_batch,
            lambda: run.without_limit().validation_batches() or (),
            world,
            data=config.data.val,
            max_tokens=limit,
        )
    rehearsed = rehearse(config, run.model_config, run.ds_config, world, micro_batches, held_out_batch)
    if world.is_main:
        zero = run.ds_config["zero_optimization"].get("stage", 0)
        where = f"goes on after step {start.step} of" if start.step else "begins, for"
        lines = [
            f"dry run on {world.size} x {world.device.type}; {config.run_dir} {where} {run.num_steps} steps",
            f"  {config.deepspeed}: ZeRO stage {zero}, {str(compute_dtype(run.ds_config))[6:]}, "
            f"{accumulation} micro-batches of {config.train.micro_batch_size} rows a rank and step",
            f"  {config.data.train}: {run.samples_per_epoch} rows an epoch; "
            f"first micro-batch {_describe(micro_batches[0])}",
        ]
        if held_out_batch is not None:
            lines.append(f"  {config.data.val}: first micro-batch {_describe(held_out_batch)}")
        if questions is not None:
            num_tokens = questions.collator([read_sample(questions.index, 0)]).input_ids.shape[1]
            lines.append(
                f"  {config.eval.data or config.data.val}: {questions.num_rows} rows asked every "
                f"{config.eval.every_steps} steps, the first in {num_tokens} tokens"
            )
        validated = "" if rehearsed.val_loss is None else f", validation {rehearsed.val_loss:.3f}"
        lines.append(
            f"  one step of a scaled-down copy, 32 wide: loss {rehearsed.loss:.3f}, "
            f"gradient norm {rehearsed.grad_norm:.3g}{validated}"
        )
        if told is not None:
            lines.append(f"  warning: {told}")
        print("\n".join(lines), flush=True)
    if rehearsed.silent or not rehearsed.loss < float("inf"):
        names = ", ".join(rehearsed.silent[:4]) or "none missed"
        raise UserError(f"dry run: loss {rehearsed.loss:g}; trainables that no gradient reached: {names}")
    if world.is_main:
        print("nothing is wrong, and nothing was written", flush=True)
    return 0


def _look_at_run_dir(run: Checked) -> Checkpoint | None:
    """Finds what the run would go on from, and that its directory can be had. Rank 0 alone."""
    run_dir = Path(run.config.run_dir)
    made = [path for path in (run_dir, *run_dir.parents) if not os.path.lexists(path)]
    try:
        Lease(run_dir).release()
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()
    return choose_start(run.config, run.index.digest)


def _describe(batch) -> str:
    rows, tokens = batch.input_ids.shape
    return (
        f"{rows} rows of up to {tokens} tokens, {int(batch.has_image.sum())} with a picture, "
        f"{batch.num_supervised()} supervised tokens"
    )


def _fit(
    engine, loader, job: Job, progress: Progress, actions: Actions, stop: StopRequest, config: RunConfig
) -> int:
    run_dir, main = Path(config.run_dir), job.world.is_main
    writer = MetricsWriter(run_dir, job.num_steps, job.config.log_every, progress.step) if main else None
    try:
        finished = fit(engine, loader, job, progress, actions, writer=writer, stop=stop)
    finally:
        if writer is not None:
            writer.close()
    if main and finished:
        print(f"adapter: {run_dir / 'adapter'}   metrics: {run_dir / 'metrics.jsonl'}", flush=True)
    elif main:
        print(f"stopped on request after step {progress.step}; the same command goes on", flush=True)
    return 0 if finished else REQUEUE_EXIT_CODE


def _announce(config: RunConfig, world: World, model, num_steps: int, start: Progress) -> None:
    if not world.is_main:
        return
    num_trainable = sum(_numel(p) for p in model.trainable_parameters().values())
    print(
        f"{config.run_dir}: {num_steps} steps of {config.train.global_batch_size} rows on {world.size} x "
        f"{world.device.type}, {num_trainable / 1e6:.2f} M trainable parameters, fusion {config.model.fusion}"
        + (f"; going on after step {start.step}" if start.step else ""),
        flush=True,
    )


def _save_last(config: RunConfig, model, world: World, dtype: torch.dtype, progress: Progress) -> None:
    info = {"step": progress.step, "samples": progress.samples, "task": config.data.task}
    save_artifact(Path(config.run_dir) / "adapter", model, config.model, world, dtype, info)


def _numel(parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


if __name__ == "__main__":
    run_entry(main, meets=True)
