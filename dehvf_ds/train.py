"""Trains DEHVF: parse, find out the launch environment, build, fit.

    deepspeed dehvf_ds/train.py --deepspeed ds_configs/zero3.json [--config RECIPE|FILE] [--train.lr 1e-3 ...]

Also under ``torchrun`` and ``srun``, or alone as ``python dehvf_ds/train.py``.
"""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path

# Run as a script, dehvf_ds/ is first on the path, where our module names would shadow other packages'.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from dehvf_ds.config import RunConfig, UserError, parse_run_config, save_run_config
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.loader import (
    build_loader,
    build_validation_loader,
    epoch_samples,
    open_examples,
)
from dehvf_ds.data.prompts import CAPTION_PROMPT
from dehvf_ds.data.tokenizer import load_tokenizer
from dehvf_ds.data.transforms import build_image_transform
from dehvf_ds.distributed import World, init_process_group, on_main, read_world, run_entry
from dehvf_ds.model import ModelError
from dehvf_ds.model.weights import find_adapter
from dehvf_ds.training.checkpoint import (
    Checkpoint,
    Checkpoints,
    Progress,
    check_bases,
    check_same_config,
    check_same_run,
    find_checkpoint,
    save_artifact,
)
from dehvf_ds.training.engine import build_engine, build_model_config, compute_dtype, read_deepspeed_json
from dehvf_ds.training.lease import Lease
from dehvf_ds.training.loop import Actions, Job, TrainingError, fit
from dehvf_ds.training.metrics import MetricsWriter
from dehvf_ds.training.signals import REQUEUE_EXIT_CODE, StopRequest
from dehvf_ds.training.validation import validation_loss

# What a run leaves in its directory.
RUN_PARTS = ("adapter", "eval", "tensorboard", "checkpoints", "merged")


def main(argv: list[str]) -> int:
    """Runs one training; returns the exit code: 0 finished, 85 stopped on request and to be started again.

    Raises:
        UserError: anything in the configuration, the files or the environment that the user must mend.
    """
    config = parse_run_config(argv)
    world = read_world()
    # All that can be wrong is looked at before processes meet and weights load.
    ds_config = read_deepspeed_json(config.deepspeed, config, world.size, world.local_size)
    transform = build_image_transform(config.model.vision_tower, config.model.image_size)
    model_config = build_model_config(
        config.model,
        image_size=transform.image_size,
        prompt=(config.data.prompt or CAPTION_PROMPT) if config.data.task == "caption" else None,
    )
    tokenizer = load_tokenizer(config.model.language_model)
    index, examples = open_examples(config.data, seed=config.seed)
    if config.data.val is not None:
        ShardIndex(config.data.val)
    if world.is_main:
        index.check_sizes()
    samples_per_epoch = epoch_samples(config.data, len(examples), config.train.global_batch_size)
    num_steps = planned_steps(config, samples_per_epoch)
    stop = StopRequest()
    stop.install()

    init_process_group(world, config.train.timeout_minutes)
    lease: Lease | None = None

    def open_run() -> Checkpoint | None:
        nonlocal lease
        lease, found = _open_run(config, index.digest)
        return found

    checkpoint = on_main(world, open_run)
    try:
        start = Progress() if checkpoint is None else checkpoint.progress
        if start.step >= num_steps:
            if world.is_main:
                print(f"{config.run_dir}: finished already, all {num_steps} steps", flush=True)
            return 0
        engine, model = build_engine(config, model_config, ds_config, world)
        dtype = compute_dtype(ds_config)
        checkpoints = Checkpoints(config, world, model, engine, dtype, index.digest)
        if checkpoint is not None:
            checkpoints.load(checkpoint)
        _announce(config, world, model, num_steps, start)
        place = {
            "rank": world.rank,
            "world_size": world.size,
            "micro_batch_size": config.train.micro_batch_size,
        }
        loader = build_loader(
            config.data,
            tokenizer,
            transform,
            **place,
            seed=config.seed,
            accumulation=config.train.accumulation(world.size),
            start_sample=start.samples,
            num_steps=num_steps - start.step,
        )
        validate = None
        if config.data.val is not None:
            held_out = build_validation_loader(config.data, tokenizer, transform, **place)
            validate = partial(validation_loss, engine, held_out, world, dtype, stop)
        job = Job(
            config=config.train,
            world=world,
            dtype=dtype,
            seed=config.seed,
            num_steps=num_steps,
            epoch_samples=samples_per_epoch,
            max_bad_share=config.data.max_bad_share,
            num_parameters=sum(_numel(p) for p in model.language_model.parameters()),
        )
        actions = Actions(
            checkpoint=checkpoints.save,
            finish=lambda progress: _save_last(config, model, world, dtype, progress),
            validate=validate,
            renew=None if lease is None else lease.renew,
        )
        return _fit(engine, loader, job, start, actions, stop, config)
    finally:
        if lease is not None:
            lease.release()


def _fit(
    engine, loader, job: Job, progress: Progress, actions: Actions, stop: StopRequest, config: RunConfig
) -> int:
    run_dir, main = Path(config.run_dir), job.world.is_main
    writer = MetricsWriter(run_dir, job.num_steps, job.config.log_every, progress.step) if main else None
    try:
        finished = fit(engine, loader, job, progress, actions, writer=writer, stop=stop)
    except TrainingError as error:
        if main:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        if writer is not None:
            writer.close()
    if main and finished:
        print(f"adapter: {run_dir / 'adapter'}   metrics: {run_dir / 'metrics.jsonl'}", flush=True)
    elif main:
        print(f"stopped on request after step {progress.step}; the same command goes on", flush=True)
    return 0 if finished else REQUEUE_EXIT_CODE


def _open_run(config: RunConfig, data_digest: str) -> tuple[Lease, Checkpoint | None]:
    """Takes the run directory for this job, and finds what to go on from. Rank 0 alone.

    Raises:
        UserError: the directory is in use, or holds another run.
    """
    run_dir = Path(config.run_dir)
    lease = Lease(run_dir)
    try:
        if config.overwrite:
            for name in RUN_PARTS:
                shutil.rmtree(run_dir / name, ignore_errors=True)
            (run_dir / "metrics.jsonl").unlink(missing_ok=True)
        checkpoint = None if config.overwrite else find_checkpoint(run_dir, config.resume)
        if checkpoint is not None:
            check_same_run(checkpoint, config, data_digest)
            check_bases(checkpoint.path / "adapter", config.model, str(checkpoint.path))
        elif (run_dir / "metrics.jsonl").exists():
            _check_can_start_again(config, run_dir)
        if checkpoint is None and config.init_from is not None:
            check_bases(_find_init(config.init_from), config.model, config.init_from)
        save_run_config(config, run_dir / "config.yaml")
    except BaseException:
        lease.release()
        raise
    return lease, checkpoint


def _find_init(source: str) -> Path:
    try:
        return find_adapter(source)
    except ModelError as error:
        raise UserError(f"--init_from {source}: {error}") from None


def _check_can_start_again(config: RunConfig, run_dir: Path) -> None:
    """A run that was killed before its first checkpoint starts again by itself; anything else is kept."""
    remedy = "name another, or pass --overwrite true"
    if config.resume == "never" or (run_dir / "adapter").exists() or not (run_dir / "config.yaml").exists():
        raise UserError(f"run_dir {config.run_dir} holds a run; {remedy}")
    check_same_config(run_dir / "config.yaml", config, remedy)


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


def planned_steps(config: RunConfig, num_samples: int) -> int:
    """Optimizer steps of the run: ``train.steps``, or full batches in ``train.epochs`` passes.

    Args:
        config: the run.
        num_samples: samples that an epoch consumes.

    Raises:
        UserError: the data do not fill one batch.
    """
    if config.train.steps is not None:
        return config.train.steps
    steps = int(config.train.epochs * num_samples) // config.train.global_batch_size
    if steps == 0:
        raise UserError(
            f"{config.data.train}: {num_samples} samples x {config.train.epochs:g} epochs do not fill one "
            f"batch of train.global_batch_size {config.train.global_batch_size}"
        )
    return steps


def _numel(parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


if __name__ == "__main__":
    run_entry(main)
