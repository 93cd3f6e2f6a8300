"""Compares a forward and backward of two variants of the model, run in turn on random captions.

    python benchmarks/step.py --a dtype=fp32 --b dtype=bf16
    python benchmarks/step.py --a fusion=ffn --b fusion=prefix,prefix_tokens=64
    python benchmarks/step.py --batch 8 --a together=4 --b together=1       # captions that share a picture
    python benchmarks/step.py --a compile=1 --b compile=0                   # train.compile

Plain torch, no DeepSpeed and no loader. Prints the seconds of each pair and the ratio's median and range.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from bench import DTYPES, LORA, flags, median_and_range, print_profile, random_batch, seconds_in_turn

from dehvf_ds.model.backbones import build_config, load_model
from dehvf_ds.training.engine import compile_units


def main() -> None:
    """Parses the flags, runs the pairs, prints the ratio b / a."""
    parser = flags(__doc__, backbones=True)
    parser.add_argument("--a", default="dtype=fp32", help="settings of variant a, comma-separated")
    parser.add_argument("--b", default="dtype=bf16", help="settings of variant b")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print where variant a spends its time")
    args = parser.parse_args()
    runs = {name: build_variant(args, getattr(args, name)) for name in "ab"}
    if args.profile:
        print_profile(runs["a"])
    ratios = []
    for seconds in seconds_in_turn(runs, args.pairs):
        ratios.append(seconds["b"] / seconds["a"])
        print(f"a {seconds['a']:.3f} s   b {seconds['b']:.3f} s   b / a {ratios[-1]:.2f}", flush=True)
    print(f"b / a: {median_and_range(ratios)}")


def build_variant(args: argparse.Namespace, settings: str) -> Callable[[], None]:
    """A forward and backward of a model with these settings."""
    given: dict[str, Any] = dict(item.split("=", 1) for item in settings.split(",") if item)
    dtype = DTYPES[given.pop("dtype", "fp32")]
    together, compiled = (
        int(given.pop(name, default)) for name, default in (("together", 1), ("compile", 0))
    )
    if "prefix_tokens" in given:
        given["prefix_tokens"] = int(given["prefix_tokens"])
    bases = (args.language_model, args.vision_tower)
    config = build_config(*bases, num_feature_layers=6, image_size=args.image_size, lora=LORA, **given)
    model = load_model(config, *bases, dtype=dtype).train()
    if compiled:
        compile_units(model)
    batch = random_batch(args.batch, args.tokens, image_size=args.image_size, together=together)
    batch = batch.to(torch.device("cpu"), dtype)

    def step() -> None:
        model.zero_grad()
        model(**batch.training_inputs()).loss_sum.backward()

    return step


if __name__ == "__main__":
    main()
