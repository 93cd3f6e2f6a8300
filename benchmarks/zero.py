"""Compares training steps under DeepSpeed's configurations with each other or plain DDP, in turn.

    torchrun --nproc-per-node 2 benchmarks/zero.py
    torchrun --nproc-per-node 2 benchmarks/zero.py ddp zero3 zero3,stage3_param_persistence_threshold=0
    torchrun --nproc-per-node 2 benchmarks/zero.py zero3,together=4 zero3 --rows 8 --accumulation 1

A variant is `ddp` or a name of ds_configs, with settings of zero_optimization; `together` rows share a
picture, `bf16=1` computes in bf16. Every rank holds all of them. Prints the seconds of each round on rank 0
and the ratios to the first; those of the process's CPU time say what the work costs where other jobs share
the cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from bench import (
    REPOSITORY,
    flags,
    median_and_range,
    print_profile,
    random_batch,
    run_config,
    seconds_in_turn,
)
from torch.nn.parallel import DistributedDataParallel

from dehvf_ds.batch import Batch
from dehvf_ds.config import RunConfig
from dehvf_ds.distributed import World, init_process_group, read_world, run_entry
from dehvf_ds.model.backbones import load_model
from dehvf_ds.training.deepspeed_json import compute_dtype, read_deepspeed_json
from dehvf_ds.training.engine import build_engine, build_model_config, parameter_groups
from dehvf_ds.training.step import train_step


def main(argv: list[str]) -> None:
    """Parses the flags, builds the variants, takes the rounds."""
    parser = flags(__doc__, backbones=True)
    parser.add_argument("variants", nargs="*", default=["ddp", "zero2", "zero3"], help="NAME,KEY=NUMBER,...")
    parser.add_argument("--checkpointing", action="store_true", help="recompute the decoder's layers")
    parser.add_argument("--rows", type=int, default=4, help="of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5, help="two more before them are not counted")
    parser.add_argument("--profile", action="store_true", help="where the first variant spends its time")
    args = parser.parse_args(argv)
    world = read_world()
    bases = {"language_model": args.language_model, "vision_tower": args.vision_tower}
    accumulation = args.accumulation * world.size
    config = run_config(args.rows, accumulation=accumulation, checkpointing=args.checkpointing, **bases)
    init_process_group(world)
    cpu_s: dict[str, float] = {}

    def counted(variant: str) -> Callable[[], None]:
        name, *given = variant.split(",")
        settings = {key: int(float(value)) for key, _, value in (item.partition("=") for item in given)}
        together = settings.pop("together", 1)
        batches = [
            random_batch(
                args.rows, args.tokens, seed=args.accumulation * world.rank + number, together=together
            )
            for number in range(args.accumulation)
        ]
        is_ddp = name == "ddp"
        step = ddp_step(config, batches) if is_ddp else engine_step(config, world, batches, name, settings)

        def run() -> None:
            started = time.process_time()
            step()
            cpu_s[variant] = time.process_time() - started

        return run

    steps = {variant: counted(variant) for variant in args.variants}
    if args.profile:
        # DeepSpeed learns the order of modules in the first step.
        for _ in range(2):
            steps[args.variants[0]]()
        if world.is_main:
            print_profile(steps[args.variants[0]])
        else:
            for _ in range(2):
                steps[args.variants[0]]()
    base = args.variants[0]
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for seconds in seconds_in_turn(steps, args.rounds, warm_ups=2, wait=torch.distributed.barrier):
        if world.is_main:
            print("  ".join(f"{name} {value:.3f} s" for name, value in seconds.items()), flush=True)
        for name, value in seconds.items():
            ratios[name].append((value / seconds[base], cpu_s[name] / cpu_s[base]))
    for name, pairs in list(ratios.items())[1:] if world.is_main else ():
        wall, cpu = map(median_and_range, zip(*pairs, strict=True))
        print(f"{name} / {base}: {wall}; CPU time {cpu}", flush=True)


def engine_step(
    config: RunConfig, world: World, batches: list[Batch], name: str, settings: dict[str, int]
) -> Callable[[], object]:
    """A step of the trainer's own."""
    ds_config = read_deepspeed_json(f"{REPOSITORY}/ds_configs/{name}.json", config, world.size)
    ds_config["bf16"] = {"enabled": bool(settings.pop("bf16", 0))}
    ds_config["zero_optimization"] |= settings
    engine, _ = build_engine(config, build_model_config(config.model, image_size=224), ds_config, world)
    dtype = compute_dtype(ds_config)
    return lambda: train_step(engine, batches, world, dtype, seed=0, step=1)


def ddp_step(config: RunConfig, batches: list[Batch]) -> Callable[[], object]:
    """The same step in plain PyTorch: gradients averaged once, in the last micro-step."""
    bases = (config.model.language_model, config.model.vision_tower)
    model = load_model(build_model_config(config.model, image_size=224), *bases, dtype=torch.float32)
    if config.train.activation_checkpointing:
        model.recompute_layers()
    model.train()  # or nothing is recomputed
    trainable = model.trainable_parameters()
    optimizer = torch.optim.AdamW(parameter_groups(trainable, config.train.weight_decay), lr=config.train.lr)
    wrapped = DistributedDataParallel(model)
    tokens = sum(batch.num_supervised() for batch in batches)

    def step() -> None:
        with wrapped.no_sync():
            for batch in batches[:-1]:
                (wrapped(**batch.inputs()).loss_sum / tokens).backward()
        (wrapped(**batches[-1].inputs()).loss_sum / tokens).backward()
        torch.nn.utils.clip_grad_norm_(trainable.values(), config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    run_entry(main)
