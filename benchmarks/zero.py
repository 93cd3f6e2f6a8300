"""Compares a training step under DeepSpeed's configurations with plain DDP, in turn in the same processes.

    torchrun --nproc-per-node 2 benchmarks/zero.py
    torchrun --nproc-per-node 2 benchmarks/zero.py zero3 zero3,stage3_param_persistence_threshold=0

Every rank holds all of them. Prints the seconds of each round on rank 0 and the ratios to DDP; those of the
process's CPU time say what the work costs where other jobs share the cores.
"""

from __future__ import annotations

import time
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
    """Parses the flags, builds the variants, takes the rounds."""
    parser = flags(__doc__, backbones=True)
    parser.add_argument(
        "variants",
        nargs="*",
        default=["zero2", "zero3"],
        help="names of ds_configs, each with settings of zero_optimization: NAME,KEY=NUMBER,...",
    )
    parser.add_argument("--checkpointing", action="store_true", help="recompute the decoder's layers")
    parser.add_argument("--rows", type=int, default=4, help="of a micro-batch; two of them make a step")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5, help="one more before them is not counted")
    args = parser.parse_args(argv)
    world = read_world()
    bases = {"language_model": args.language_model, "vision_tower": args.vision_tower}
    config = run_config(args.rows, accumulation=2 * world.size, checkpointing=args.checkpointing, **bases)
    init_process_group(world)
    batches = [random_batch(args.rows, args.tokens, seed=2 * world.rank + number) for number in range(2)]
    cpu_s: dict[str, float] = {}

    def counted(name: str, step: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            started = time.process_time()
            step()
            cpu_s[name] = time.process_time() - started

        return run

    steps = {"ddp": counted("ddp", ddp_step(config, batches))}
    for name in args.variants:
        steps[name] = counted(name, engine_step(config, world, batches, name))
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    # DeepSpeed learns the order of modules in the first step.
    for seconds in seconds_in_turn(steps, args.rounds, warm_ups=2, wait=torch.distributed.barrier):
        if world.is_main:
            print("  ".join(f"{name} {value:.3f} s" for name, value in seconds.items()), flush=True)
        for name, value in seconds.items():
            ratios[name].append((value / seconds["ddp"], cpu_s[name] / cpu_s["ddp"]))
    for name, pairs in ratios.items() if world.is_main else ():
        wall, cpu = map(median_and_range, zip(*pairs, strict=True))
        print(f"{name} / ddp: {wall}; CPU time {cpu}", flush=True)


def engine_step(config: RunConfig, world: World, batches: list[Batch], variant: str) -> Callable[[], object]:
    """A step of the trainer's own."""
    name, *settings = variant.split(",")
    ds_config = read_deepspeed_json(f"{REPOSITORY}/ds_configs/{name}.json", config, world.size)
    for key, _, value in (setting.partition("=") for setting in settings):
        ds_config["zero_optimization"][key] = int(float(value))
    ds_config["bf16"] = {"enabled": False}
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
            (wrapped(**batches[0].inputs()).loss_sum / tokens).backward()
        (wrapped(**batches[1].inputs()).loss_sum / tokens).backward()
        torch.nn.utils.clip_grad_norm_(trainable.values(), config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    run_entry(main)
