"""How long a training step waits for the loader, with a stand-in that sleeps as long as a step takes.

    python benchmarks/loader.py --data demo_data/flickr8k/train --workers 0 1 2 --step-seconds 2.7

Prints how long a picture takes to become pixels, and how long the library's processor takes for the same;
then images/s of the loader alone, and the share of the time that a sleeping step waited, for each number of
workers. The first batch (start of the workers) is not counted.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from bench import flags, median_and_range, seconds_in_turn

from dehvf_ds.config import DataConfig
from dehvf_ds.data.collate import build_image_transform, load_tokenizer
from dehvf_ds.data.examples import open_examples, read_sample
from dehvf_ds.data.loader import TrainingLoader, build_loader


def main() -> None:
    """Parses the flags and measures each number of workers."""
    parser = flags(__doc__, backbones=True)
    parser.add_argument("--data", default="demo_data/scenes/shards/train")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--step-seconds", type=float, default=2.7, help="what the stand-in sleeps a batch")
    args = parser.parse_args()
    torch.set_num_threads(1)
    time_pixels(args)
    print(f"{args.data}, micro-batches of {args.batch}")
    for workers in args.workers:
        rate, _ = run(build(args, workers), 0.0)
        line = f"{workers} workers: {rate * args.batch:.0f} images/s alone"
        if args.step_seconds and workers:
            _, share = run(build(args, workers), args.step_seconds)
            line += f"; waits {100 * share:.2f} % of the time at {args.step_seconds:g} s a step"
        print(line, flush=True)


def time_pixels(args: argparse.Namespace) -> None:
    """Times pictures that are decoded already, in turn with the tower's own processor."""
    transform = build_image_transform(args.vision_tower, None)
    index = open_examples(DataConfig(train=args.data), seed=0).index
    samples = [read_sample(index, row, shorter_side=transform.image_size) for row in range(args.batch)]
    pictures = [sample.image for sample in samples if sample.image is not None]

    def by_processor() -> list[torch.Tensor]:
        return [transform.processor(picture, return_tensors="pt")["pixel_values"][0] for picture in pictures]

    runs = {"pixels": lambda: list(map(transform, pictures)), "processor": by_processor}
    found = list(seconds_in_turn(runs, 9))
    assert all(map(torch.equal, runs["pixels"](), by_processor()))
    pixels, processor = (1e3 * median(each[name] for each in found) / len(pictures) for name in runs)
    ratios = [each["processor"] / each["pixels"] for each in found]
    print(f"a picture: {pixels:.2f} ms; by the processor {processor:.2f} ms: {median_and_range(ratios)}")


def build(args: argparse.Namespace, workers: int) -> TrainingLoader:
    """A loader of the flags' data; its augmentation is off."""
    config = DataConfig(train=args.data, num_workers=workers)
    return build_loader(
        config,
        open_examples(config, seed=0),
        load_tokenizer(args.language_model),
        build_image_transform(args.vision_tower, None),
        seed=0,
        rank=0,
        world_size=1,
        micro_batch_size=args.batch,
        accumulation=1,
        start_sample=0,
        num_steps=args.batches + 1,
    )


def run(loader: TrainingLoader, step_seconds: float) -> tuple[float, float]:
    """Batches a second, and the share of the time that was spent waiting for them."""
    batches = iter(loader)
    next(batches)
    # The workers fill their queues while the first step runs.
    time.sleep(step_seconds)
    started = asked = time.perf_counter()
    waited, count = 0.0, 0
    for _ in batches:
        waited += time.perf_counter() - asked
        count += 1
        time.sleep(step_seconds)
        asked = time.perf_counter()
    seconds = time.perf_counter() - started
    return count / seconds, waited / seconds


if __name__ == "__main__":
    main()
