"""Holds the plan's memory formula against the peak of a real training process on the CPU.

    python benchmarks/memory.py --micro-batch 8 32
    python benchmarks/memory.py --fusion none --malloc default

Each case is a fresh process: one rank, the trainer's own engine (ZeRO-3, fp32) and its own training step on
random captions, a few optimizer steps. Measured is the peak resident memory of the steps less what the
process had after its imports and one step of an 8 x 8 map; loading is a peak of its own. Predicted is
planning/memory.py, nothing fitted.

`--malloc returned` (default) makes glibc give every freed block of 64 KiB or more back to the system, so
that resident memory is memory in use. `default` leaves glibc alone: it keeps freed blocks of up to 32 MB in
its heap, where they stay resident, and the excess is the allocator's, not the step's. On a GPU PyTorch's
caching allocator has such an excess too; the share of a GPU that a plan leaves empty stands for it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import deepspeed
import torch
from bench import MIB, REPOSITORY, flags, random_batch, resident_bytes, run_config

from dehvf_ds.data.collate import build_image_transform
from dehvf_ds.distributed import init_process_group, read_world
from dehvf_ds.planning.memory import FP32_BYTES, build_on_meta, step_bytes
from dehvf_ds.training.deepspeed_json import compute_dtype, read_deepspeed_json
from dehvf_ds.training.engine import build_engine, build_model_config
from dehvf_ds.training.step import train_step

RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
MALLOC = {"returned": RETURNED, "default": {}}


def main() -> None:
    """Parses the flags, runs every case, prints a line for each."""
    parser = flags(__doc__, backbones=True)
    parser.add_argument("--fusion", default="ffn", choices=["ffn", "prefix", "none"])
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--tokens", type=int, default=48, help="tokens of the longest row")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--malloc", default="returned", choices=sorted(MALLOC))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(args, **json.loads(args.case))))
        return
    print(f"fusion {args.fusion}, {args.tokens} tokens, {args.steps} steps, malloc {args.malloc}; MiB")
    print("rows  recompute  weights+state  activations  predicted  measured  pred./meas.  after load  load")
    environment = os.environ | MALLOC[args.malloc] | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    for rows in args.micro_batch:
        for checkpointing in (False, True):
            case = json.dumps({"rows": rows, "checkpointing": checkpointing})
            command = [sys.executable, __file__, *sys.argv[1:], "--case", case]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"case {case} failed:\n{done.stderr[-3000:]}")
            found = json.loads(done.stdout.strip().splitlines()[-1])
            fixed, activations, measured, rest, load = (value / MIB for value in found)
            predicted = fixed + activations
            print(
                f"{rows:4d}  {'on' if checkpointing else 'off':9s}  {fixed:13.0f}  {activations:11.0f}  "
                f"{predicted:9.0f}  {measured:8.0f}  {predicted / measured:11.3f}  {rest:10.0f}  {load:4.0f}",
                flush=True,
            )


def run_case(args: argparse.Namespace, rows: int, checkpointing: bool) -> list[int]:
    """Builds the engine, takes the steps, measures and predicts.

    Returns bytes: predicted of weights and state, of activations; measured at the peak, after loading, in it.
    """
    world = read_world()
    init_process_group(world)
    image_size = build_image_transform(args.vision_tower, None).image_size
    bases = {"language_model": args.language_model, "vision_tower": args.vision_tower}
    config = run_config(rows, checkpointing=checkpointing, fusion=args.fusion, **bases)
    given = json.loads((REPOSITORY / "ds_configs/zero3.json").read_text())
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "fp32.json"
        path.write_text(json.dumps(given | {"bf16": {"enabled": False}}))
        ds_config = read_deepspeed_json(str(path), config, world.size)
    model_config = build_model_config(config.model, image_size=image_size)
    # A step of a single small map: DeepSpeed imports some 560 modules only then, of 60 MiB.
    small = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(small.parameters())
    engine, *_ = deepspeed.initialize(model=small, optimizer=optimizer, config=ds_config)
    engine.backward(engine(torch.ones(1, 8)).sum())
    engine.step()
    baseline = resident_bytes("VmRSS")
    engine, _ = build_engine(config, model_config, ds_config, world)
    load, rest = resident_bytes("VmHWM") - baseline, resident_bytes("VmRSS") - baseline
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    batches = [
        random_batch(
            rows,
            args.tokens,
            lengths=[args.tokens // 2 if row == 1 else args.tokens for row in range(rows)],
            prompt_tokens=8,
            vocab=model_config.text_config.vocab_size,
            image_size=image_size,
            pictures=args.fusion != "none",
            seed=step,
        )
        for step in range(args.steps)
    ]
    for step, batch in enumerate(batches, start=1):
        train_step(engine, [batch], world, compute_dtype(ds_config), seed=0, step=step)
    measured = resident_bytes("VmHWM") - baseline
    held = step_bytes(model_config, batches[-1], ds_config, checkpointing=checkpointing)
    # Host memory counts once it is touched: of the bucket, as much as there are gradients.
    trainable = sum(p.numel() for p in build_on_meta(model_config).trainable_parameters().values())
    held["gradient buckets"] = min(held["gradient buckets"], trainable * FP32_BYTES)
    activations = held.pop("activations")
    return [sum(held.values()), activations, measured, rest, load]


if __name__ == "__main__":
    main()
