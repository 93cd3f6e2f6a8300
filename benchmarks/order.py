"""What opening a large index and resuming deep in it cost, on a synthetic shard directory (no pictures).

    python benchmarks/order.py --shards 10000 --samples 20000000 --start 10000000

Writes manifest, index and (sparse, empty) shard files into a temporary directory, opens them in a fresh
process as training does, and plans the first global batch after ``--start`` samples. Prints seconds, the
smallest of 5.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from bench import flags

from dehvf_ds.config import DataConfig
from dehvf_ds.data.examples import open_examples
from dehvf_ds.data.index import FORMAT_VERSION, INDEX_NAME, LENGTHS_NAME, MANIFEST_NAME
from dehvf_ds.data.order import MicroBatches, SampleOrder


def main() -> None:
    """Parses the flags; the process that is started with ``--measure`` does the timing."""
    parser = flags(__doc__)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=20_000_000)
    parser.add_argument("--start", type=int, default=10_000_000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as directory:
        write_synthetic(Path(directory), args.shards, args.samples // args.shards)
        print(f"{args.shards} shards, {args.samples} samples")
        command = [sys.executable, *sys.argv, "--measure", directory]
        runs = [json.loads(subprocess.check_output(command)) for _ in range(5)]
    for name in runs[0]:
        print(f"{name}: {min(run[name] for run in runs):.3f} s")


def write_synthetic(directory: Path, num_shards: int, samples: int) -> None:
    """A directory that opens as a shard directory of one-caption samples; its shards are holes."""
    total = num_shards * samples
    shape = {"mode": "w+", "dtype": np.int64, "shape": (total, 4)}
    np.lib.format.open_memmap(directory / INDEX_NAME, **shape)[:, 2] = 1
    np.lib.format.open_memmap(directory / LENGTHS_NAME, mode="w+", dtype=np.int32, shape=(total,))
    shards = []
    for i in range(num_shards):
        name = f"synthetic-{i:06d}.tar"
        with (directory / name).open("wb") as file:
            file.truncate(1024)
        sizes = {"samples": samples, "examples": samples, "bytes": 1024}
        shards.append({"name": name, **sizes, "sha256": "0" * 64})
    counts = dict.fromkeys(("num_samples", "num_captions", "num_pictures"), total)
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


if __name__ == "__main__":
    main()
