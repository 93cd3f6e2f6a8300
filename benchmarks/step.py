"""Compares a forward and backward of two variants of the model, run in turn on random captions.

    python benchmarks/step.py --a dtype=fp32 --b dtype=bf16
    python benchmarks/step.py --a fusion=ffn --b fusion=prefix,prefix_tokens=64

Plain torch, no DeepSpeed and no loader. Prints the seconds of each pair and the ratio's median and range.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from timing import median_and_range, random_batch, seconds_in_turn

from dehvf_ds.batch import Batch
from dehvf_ds.model import DehvfForConditionalGeneration
from dehvf_ds.model.backbones import build_config, load_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Parses the flags, runs the pairs, prints the ratio b / a."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--a", default="dtype=fp32", help="settings of variant a, comma-separated")
    parser.add_argument("--b", default="dtype=bf16", help="settings of variant b")
    parser.add_argument("--language-model", default="demo_data/backbones/smollm2-135m")
    parser.add_argument("--vision-tower", default="demo_data/backbones/dinov2-small")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print where variant a spends its time")
    args = parser.parse_args()

    runs = {name: partial(run_step, *build_variant(args, getattr(args, name))) for name in "ab"}
    if args.profile:
        runs["a"]()
        with torch.profiler.profile() as profile:
            runs["a"]()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))
    ratios = []
    for seconds in seconds_in_turn(runs, args.pairs):
        ratios.append(seconds["b"] / seconds["a"])
        print(f"a {seconds['a']:.3f} s   b {seconds['b']:.3f} s   b / a {ratios[-1]:.2f}", flush=True)
    print(f"b / a: {median_and_range(ratios)}")


def build_variant(args: argparse.Namespace, settings: str) -> tuple[DehvfForConditionalGeneration, Batch]:
    """A model with these settings and a batch in its dtype."""
    given: dict[str, Any] = dict(item.split("=", 1) for item in settings.split(",") if item)
    dtype = DTYPES[given.pop("dtype", "fp32")]
    if "prefix_tokens" in given:
        given["prefix_tokens"] = int(given["prefix_tokens"])
    config = build_config(
        args.language_model,
        args.vision_tower,
        num_levels=6,
        image_size=args.image_size,
        lora={"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["down_proj"]},
        **given,
    )
    model = load_model(config, args.language_model, args.vision_tower, dtype=dtype)
    batch = random_batch(args.batch, args.tokens, image_size=args.image_size)
    return model, batch.to(torch.device("cpu"), dtype)


def run_step(model: DehvfForConditionalGeneration, batch: Batch) -> None:
    """One forward and backward."""
    model.zero_grad()
    model(**batch.inputs()).loss_sum.backward()


if __name__ == "__main__":
    main()
