"""Compares a training step under ZeRO-3, ZeRO-2 and plain DDP, taken in turn in the same processes.

    torchrun --nproc-per-node 2 benchmarks/zero.py

Every rank holds all three. Prints the seconds of each round on rank 0 and the ratios to DDP.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from bench import REPOSITORY, flags, median_and_range, random_batch, run_config, seconds_in_turn
from torch.nn.parallel import DistributedDataParallel

from dehvf_ds.batch import Batch
from dehvf_ds.config import RunConfig
from dehvf_ds.distributed import World, init_process_group, read_world, run_entry
from dehvf_ds.model.backbones import load_model
from dehvf_ds.training.deepspeed_json import compute_dtype, read_deepspeed_json
from dehvf_ds.training.engine import build_engine, build_model_config, parameter_groups
from dehvf_ds.training.step import train_step


def main(argv: list[str]) -> None:
    """Parses the flags, builds the three, takes the rounds."""
    parser = flags(__doc__, backbones=True)
    parser.add_argument("--rows", type=int, default=4, help="of a micro-batch; two of them make a step")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5, help="one more before them is not counted")
    args = parser.parse_args(argv)
    world = read_world()
    bases = {"language_model": args.language_model, "vision_tower": args.vision_tower}
    config = run_config(args.rows, accumulation=2 * world.size, **bases)
    init_process_group(world)
    batches = [random_batch(args.rows, args.tokens, seed=2 * world.rank + number) for number in range(2)]
    variants = {"ddp": ddp_step(config, batches)}
    for name in ("zero2", "zero3"):
        variants[name] = engine_step(config, world, batches, f"{REPOSITORY}/ds_configs/{name}.json")
    ratios: dict[str, list[float]] = {name: [] for name in variants}
    for seconds in seconds_in_turn(variants, args.rounds, wait=torch.distributed.barrier):
        if world.is_main:
            print("  ".join(f"{name} {value:.3f} s" for name, value in seconds.items()), flush=True)
        for name, value in seconds.items():
            ratios[name].append(value / seconds["ddp"])
    for name, values in ratios.items() if world.is_main else ():
        print(f"{name} / ddp: {median_and_range(values)}", flush=True)


def engine_step(config: RunConfig, world: World, batches: list[Batch], path: str) -> Callable[[], object]:
    """A step of the trainer's own."""
    ds_config = read_deepspeed_json(path, config, world.size)
    ds_config["bf16"] = {"enabled": False}
    engine, _ = build_engine(config, build_model_config(config.model, image_size=224), ds_config, world)
    dtype = compute_dtype(ds_config)
    return lambda: train_step(engine, batches, world, dtype, seed=0, step=1)


def ddp_step(config: RunConfig, batches: list[Batch]) -> Callable[[], object]:
    """The same step in plain PyTorch: gradients averaged once, in the last micro-step."""
    bases = (config.model.language_model, config.model.vision_tower)
    model = load_model(build_model_config(config.model, image_size=224), *bases, dtype=torch.float32)
    trainable = model.trainable_parameters()
    optimizer = torch.optim.AdamW(parameter_groups(trainable, config.train.weight_decay), lr=config.train.lr)
    wrapped = DistributedDataParallel(model)
    tokens = sum(batch.num_supervised() for batch in batches)

    def step() -> None:
        with wrapped.no_sync():
            (wrapped(**batches[0].inputs()).loss_sum / tokens).backward()
        (wrapped(**batches[1].inputs()).loss_sum / tokens).backward()
        torch.nn.utils.clip_grad_norm_(trainable.values(), config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    run_entry(main)
