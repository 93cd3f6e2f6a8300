"""What opening a large index and resuming deep in it cost, on a synthetic shard directory (no pictures).

    python benchmarks/order.py --shards 10000 --samples 20000000 --start 10000000
    python benchmarks/order.py --passes                 # tower passes a row, of data with COCO's counts

Writes manifest, index and (sparse, empty) shard files into a temporary directory, opens them in a fresh
process as training does, and plans the first global batch after ``--start`` samples. Prints seconds, the
smallest of 5. ``--passes`` looks at the micro-batches of 20 epochs, of which every thousandth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from bench import flags

from dehvf_ds.config import DataConfig
from dehvf_ds.data.examples import open_examples
from dehvf_ds.data.index import FORMAT_VERSION, INDEX_NAME, LENGTHS_NAME, MANIFEST_NAME
from dehvf_ds.data.order import MicroBatches, SampleOrder, Units

COCO = (113, np.repeat([5, 6, 7], [1000, 1, 1]))
"""Shards, and captions of each row of one: 113,287 pictures have 566,747, nearly all five."""
EPOCHS, EVERY = 20, 1000


def main() -> None:
    """Parses the flags; the process that is started with ``--measure`` does the timing."""
    parser = flags(__doc__)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=20_000_000)
    parser.add_argument("--start", type=int, default=10_000_000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--passes", action="store_true", help="count the pictures of micro-batches instead")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as directory:
        if args.passes:
            write_synthetic(Path(directory), *COCO)
            print_passes(directory)
            return
        write_synthetic(Path(directory), args.shards, np.ones(args.samples // args.shards, dtype=np.int64))
        print(f"{args.shards} shards, {args.samples} samples")
        command = [sys.executable, *sys.argv, "--measure", directory]
        runs = [json.loads(subprocess.check_output(command)) for _ in range(5)]
    for name in runs[0]:
        print(f"{name}: {min(run[name] for run in runs):.3f} s")


def write_synthetic(directory: Path, num_shards: int, captions: np.ndarray) -> None:
    """A directory that opens as shards with so many captions a row each; its shards are holes."""
    total, texts = num_shards * len(captions), num_shards * int(captions.sum())
    shape = {"mode": "w+", "dtype": np.int64, "shape": (total, 4)}
    np.lib.format.open_memmap(directory / INDEX_NAME, **shape)[:, 2] = np.tile(captions, num_shards)
    np.lib.format.open_memmap(directory / LENGTHS_NAME, mode="w+", dtype=np.int32, shape=(texts,))
    shards = []
    for i in range(num_shards):
        name = f"synthetic-{i:06d}.tar"
        with (directory / name).open("wb") as file:
            file.truncate(1024)
        sizes = {"samples": len(captions), "examples": int(captions.sum()), "bytes": 1024}
        shards.append({"name": name, **sizes, "sha256": "0" * 64})
    counts = {"num_samples": total, "num_captions": texts, "num_pictures": total}
    manifest = {"format_version": FORMAT_VERSION, **counts, "tasks": {"caption": total}}
    manifest |= {"key_prefix": None, "shards": shards, "builder": {}}
    (directory / MANIFEST_NAME).write_text(json.dumps(manifest))


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of opening, of a look at the files' sizes, and of planning one global batch for one rank."""
    times = [time.perf_counter()]
    examples = open_examples(DataConfig(train=args.measure), seed=0)
    times.append(time.perf_counter())
    examples.index.check_sizes()
    times.append(time.perf_counter())
    batches = MicroBatches(
        order=SampleOrder(examples.shard_sizes, seed=0, window=4096),
        rank=0,
        world_size=1,
        micro_batch_size=args.batch,
        accumulation=1,
        start_sample=args.start,
        num_steps=1,
    )
    planned = [examples.resolve(epoch, example) for epoch, example in next(iter(batches))]
    assert len(set(planned)) == args.batch
    times.append(time.perf_counter())
    return dict(zip(("open", "sizes", "resume"), np.diff(times).tolist(), strict=True))


def print_passes(directory: str) -> None:
    """A table of ``data.captions_together``: pictures that the tower sees, for each row that trains."""
    examples = open_examples(DataConfig(train=directory), seed=0)
    print(f"{len(examples.index)} pictures, {len(examples)} captions\n")
    print("| k | micro-batch | passes a row | most pictures in a micro-batch |\n" + "|---" * 4 + "|")
    for together, rows in ((1, 20), (2, 20), (4, 20), (5, 20), (8, 16), (16, 16), (20, 20)):
        units = Units(together, partial(examples.leaders, size=together)) if together > 1 else None
        order = SampleOrder(examples.shard_sizes, seed=0, window=4096, units=units)
        pictures = []
        for number in range(0, EPOCHS * len(examples) // rows, EVERY):
            (drawn,) = MicroBatches(
                order=order,
                rank=0,
                world_size=1,
                micro_batch_size=rows,
                accumulation=1,
                start_sample=number * rows,
                num_steps=1,
            )
            pictures.append(len({examples.resolve(epoch, example)[0] for epoch, example in drawn}))
        passes = sum(pictures) / rows / len(pictures)
        print(f"| {together} | {rows} | {passes:.2f} | {max(pictures)} |", flush=True)


if __name__ == "__main__":
    main()
