"""Trains DEHVF: parse, find out the launch environment, build, fit.

    deepspeed dehvf_ds/train.py --deepspeed ds_configs/zero3.json [--config RECIPE|FILE] [--train.lr 1e-3 ...]

Also under ``torchrun`` and ``srun``, or alone as ``python dehvf_ds/train.py``.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

# Run as a script, dehvf_ds/ is first on the path, where our module names would shadow other packages'.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dehvf_ds.config import RunConfig, UserError, parse_run_config, save_run_config
from dehvf_ds.data.loader import build_loader, epoch_samples, open_examples
from dehvf_ds.data.prompts import CAPTION_PROMPT
from dehvf_ds.data.tokenizer import load_tokenizer
from dehvf_ds.data.transforms import build_image_transform
from dehvf_ds.distributed import barrier, init_process_group, read_world, run_entry
from dehvf_ds.training.checkpoint import save_artifact
from dehvf_ds.training.engine import build_engine, build_model_config, compute_dtype, read_deepspeed_json
from dehvf_ds.training.loop import TrainingError, fit
from dehvf_ds.training.metrics import MetricsWriter


def main(argv: list[str]) -> int:
    """Runs one training; returns the exit code.

    Raises:
        UserError: anything in the configuration, the files or the environment that the user must mend.
    """
    config = parse_run_config(argv)
    world = read_world()
    # All that can be wrong is looked at before processes meet and weights load.
    ds_config = read_deepspeed_json(config.deepspeed, config, world.size)
    transform = build_image_transform(config.model.vision_tower, config.model.image_size)
    model_config = build_model_config(
        config.model,
        image_size=transform.image_size,
        prompt=(config.data.prompt or CAPTION_PROMPT) if config.data.task == "caption" else None,
    )
    tokenizer = load_tokenizer(config.model.language_model)
    index, examples = open_examples(config.data, seed=config.seed)
    if world.is_main:
        index.check_sizes()
    samples_per_epoch = epoch_samples(config.data, len(examples), config.train.global_batch_size)
    num_steps = planned_steps(config, samples_per_epoch)
    _require_fresh(config)

    init_process_group(world)
    engine, model = build_engine(config, model_config, ds_config, world)
    run_dir = Path(config.run_dir)
    if world.is_main:
        _start_run_dir(config, run_dir)
    barrier()
    loader = build_loader(
        config.data,
        tokenizer,
        transform,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        micro_batch_size=config.train.micro_batch_size,
        accumulation=config.train.accumulation(world.size),
        start_sample=0,
        num_steps=num_steps,
    )
    dtype = compute_dtype(ds_config)
    num_trainable = sum(_numel(p) for p in model.trainable_parameters().values())
    num_language = sum(_numel(p) for p in model.language_model.parameters())
    if world.is_main:
        print(
            f"{config.run_dir}: {num_steps} steps of {config.train.global_batch_size} rows on {world.size} x "
            f"{world.device.type}, {num_trainable / 1e6:.2f} M trainable parameters, fusion "
            f"{config.model.fusion}",
            flush=True,
        )

    def save(step: int, samples: int) -> None:
        info = {"step": step, "samples": samples, "task": config.data.task}
        save_artifact(run_dir / "adapter", model, config.model, world, dtype, info)

    writer = MetricsWriter(run_dir, num_steps, config.train.log_every) if world.is_main else None
    try:
        fit(
            engine,
            loader,
            config.train,
            seed=config.seed,
            num_steps=num_steps,
            epoch_samples=samples_per_epoch,
            max_bad_share=config.data.max_bad_share,
            num_parameters=num_language,
            world=world,
            dtype=dtype,
            writer=writer,
            save=save,
        )
    except TrainingError as error:
        if world.is_main:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        if writer is not None:
            writer.close()
    if world.is_main:
        print(f"adapter: {run_dir / 'adapter'}   metrics: {run_dir / 'metrics.jsonl'}", flush=True)
    return 0


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


def _require_fresh(config: RunConfig) -> None:
    if not config.overwrite and (Path(config.run_dir) / "metrics.jsonl").exists():
        raise UserError(f"run_dir {config.run_dir} holds a run; name another, or pass --overwrite true")


def _start_run_dir(config: RunConfig, run_dir: Path) -> None:
    if config.overwrite:
        for name in ("adapter", "eval", "tensorboard", "checkpoints", "merged"):
            shutil.rmtree(run_dir / name, ignore_errors=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    save_run_config(config, run_dir / "config.yaml")


def _numel(parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


if __name__ == "__main__":
    run_entry(main)
