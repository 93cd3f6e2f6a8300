"""Trains DEHVF: parse, find out the launch environment, build, fit.

    deepspeed dehvf_ds/train.py --deepspeed ds_configs/zero3.json [--config RECIPE|FILE] [--train.lr 1e-3 ...]

Also under ``torchrun`` and ``srun``, or alone as ``python dehvf_ds/train.py``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Run as a script, dehvf_ds/ is first on the path, where our module names would shadow other packages'.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from transformers import PreTrainedTokenizerBase

from dehvf_ds.config import RunConfig, UserError, parse_run_config
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.loader import (
    build_loader,
    build_validation_loader,
    epoch_samples,
    open_examples,
)
from dehvf_ds.data.prompts import CAPTION_PROMPT
from dehvf_ds.data.tokenizer import load_tokenizer
from dehvf_ds.data.transforms import ImageTransform, build_image_transform
from dehvf_ds.distributed import World, init_process_group, on_main, read_world, run_entry
from dehvf_ds.model import DehvfConfig
from dehvf_ds.training.checkpoint import Checkpoints, save_artifact
from dehvf_ds.training.deepspeed_json import compute_dtype, read_deepspeed_json
from dehvf_ds.training.engine import build_engine, build_model_config
from dehvf_ds.training.lease import Lease
from dehvf_ds.training.loop import Actions, Job, TrainingError, fit
from dehvf_ds.training.metrics import MetricsWriter
from dehvf_ds.training.progress import Progress
from dehvf_ds.training.rehearsal import rehearse
from dehvf_ds.training.resume import Checkpoint, choose_start, open_run
from dehvf_ds.training.signals import REQUEUE_EXIT_CODE, StopRequest
from dehvf_ds.training.validation import validation_loss


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A run whose configuration and files were looked at; nothing of it is loaded.

    Attributes:
        config: the run.
        world: this process's place.
        ds_config: the completed DeepSpeed configuration.
        model_config: the model's configuration.
        tokenizer: the language model's.
        transform: the vision tower's picture transform.
        index: the training shards.
        samples_per_epoch: rows that an epoch consumes.
        num_steps: optimizer steps of the whole run.
    """

    config: RunConfig
    world: World
    ds_config: dict[str, Any]
    model_config: DehvfConfig
    tokenizer: PreTrainedTokenizerBase
    transform: ImageTransform
    index: ShardIndex
    samples_per_epoch: int
    num_steps: int

    def training_batches(self, start_sample: int, num_steps: int):
        """This rank's loader of ``num_steps`` steps from ``start_sample`` on."""
        return build_loader(
            self.config.data,
            self.tokenizer,
            self.transform,
            **self._place(),
            seed=self.config.seed,
            accumulation=self.config.train.accumulation(self.world.size),
            start_sample=start_sample,
            num_steps=num_steps,
        )

    def validation_batches(self):
        """This rank's loader of the validation rows; None where there are none."""
        if self.config.data.val is None:
            return None
        return build_validation_loader(self.config.data, self.tokenizer, self.transform, **self._place())

    def _place(self) -> dict[str, int]:
        micro_batch_size = self.config.train.micro_batch_size
        return {"rank": self.world.rank, "world_size": self.world.size, "micro_batch_size": micro_batch_size}


def main(argv: list[str]) -> int:
    """Runs one training; returns the exit code: 0 finished, 85 stopped on request and to be started again.

    Raises:
        UserError: anything in the configuration, the files or the environment that the user must mend.
    """
    config = parse_run_config(argv)
    run = check(config, read_world())
    stop = StopRequest()
    stop.install()
    init_process_group(run.world, config.train.timeout_minutes)
    return dry_run(run) if config.dry_run else train(run, stop)


def check(config: RunConfig, world: World) -> Checked:
    """Looks at all that can be wrong before processes meet and weights load.

    Raises:
        UserError: what is.
    """
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
    return Checked(
        config=config,
        world=world,
        ds_config=ds_config,
        model_config=model_config,
        tokenizer=tokenizer,
        transform=transform,
        index=index,
        samples_per_epoch=samples_per_epoch,
        num_steps=planned_steps(config, samples_per_epoch),
    )


def train(run: Checked, stop: StopRequest) -> int:
    """Trains from the newest checkpoint, or from the start, to the last step or the request to stop."""
    config, world = run.config, run.world
    lease: Lease | None = None

    def take_directory() -> Checkpoint | None:
        nonlocal lease
        lease, found = open_run(config, run.index.digest)
        return found

    checkpoint = on_main(world, take_directory)
    try:
        start = Progress() if checkpoint is None else checkpoint.progress
        if start.step >= run.num_steps:
            if world.is_main:
                print(f"{config.run_dir}: finished already, all {run.num_steps} steps", flush=True)
            return 0
        engine, model = build_engine(config, run.model_config, run.ds_config, world)
        dtype = compute_dtype(run.ds_config)
        checkpoints = Checkpoints(config, world, model, engine, dtype, run.index.digest)
        if checkpoint is not None:
            checkpoints.load(checkpoint)
        _announce(config, world, model, run.num_steps, start)
        loader = run.training_batches(start.samples, run.num_steps - start.step)
        held_out = run.validation_batches()
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
        actions = Actions(
            checkpoint=checkpoints.save,
            finish=lambda progress: _save_last(config, model, world, dtype, progress),
            validate=None
            if held_out is None
            else partial(validation_loss, engine, held_out, world, dtype, stop),
            renew=None if lease is None else lease.renew,
        )
        return _fit(engine, loader, job, start, actions, stop, config)
    finally:
        if lease is not None:
            lease.release()


def dry_run(run: Checked) -> int:
    """Does all that a run does up to its first step, and that with a scaled-down copy; writes nothing."""
    config, world = run.config, run.world
    checkpoint = on_main(world, lambda: _look_at_run_dir(run))
    start = Progress() if checkpoint is None else checkpoint.progress
    accumulation = config.train.accumulation(world.size)
    micro_batches = list(run.training_batches(start.samples, 1))
    held_out = run.validation_batches()
    held_out_batch = None if held_out is None else next(iter(held_out))
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
        validated = "" if rehearsed.val_loss is None else f", validation {rehearsed.val_loss:.3f}"
        lines.append(
            f"  one step of a scaled-down copy, 32 wide: loss {rehearsed.loss:.3f}, "
            f"gradient norm {rehearsed.grad_norm:.3g}{validated}"
        )
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
    if run_dir.is_dir():
        Lease(run_dir).release()
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
