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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dehvf_ds.config import DataConfig
from dehvf_ds.data.examples import open_examples
from dehvf_ds.data.manifest import FORMAT_VERSION, INDEX_NAME, LENGTHS_NAME, MANIFEST_NAME
from dehvf_ds.data.order import MicroBatches, SampleOrder


def main() -> None:
    """Parses the flags; the process that is started with ``--measure`` does the timing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=20_000_000)
    parser.add_argument("--start", type=int, default=10_000_000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args)
        return
    with tempfile.TemporaryDirectory() as directory:
        write_synthetic(Path(directory), args.shards, args.samples // args.shards)
        print(f"{args.shards} shards, {args.samples} samples")
        runs = [
            json.loads(subprocess.check_output([sys.executable, *sys.argv, "--measure", directory]))
            for _ in range(5)
        ]
    for name in runs[0]:
        print(f"{name}: {min(run[name] for run in runs):.3f} s")


def write_synthetic(directory: Path, num_shards: int, samples: int) -> None:
    """A directory that opens as a shard directory of one-caption samples; its shards are holes."""
    names = [f"synthetic-{i:06d}.tar" for i in range(num_shards)]
    total = num_shards * samples
    for name, width, dtype in ((INDEX_NAME, (4,), np.int64), (LENGTHS_NAME, (), np.int32)):
        table = np.lib.format.open_memmap(directory / name, mode="w+", dtype=dtype, shape=(total, *width))
        if width:
            table[:, 2] = 1
    for name in names:
        with (directory / name).open("wb") as file:
            file.truncate(1024)
    shard = {"samples": samples, "examples": samples, "bytes": 1024, "sha256": "0" * 64}
    manifest = {
        "format_version": FORMAT_VERSION,
        "num_samples": total,
        "num_captions": total,
        "num_pictures": total,
        "tasks": {"caption": total},
        "key_prefix": None,
        "shards": [{"name": name, **shard} for name in names],
        "builder": {},
    }
    (directory / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2))


def measure(args: argparse.Namespace) -> None:
    """Opens, looks at the files' sizes, and plans one global batch for one rank; prints the seconds."""
    started = time.perf_counter()
    examples = open_examples(DataConfig(train=args.measure), seed=0)
    opened = time.perf_counter()
    examples.index.check_sizes()
    checked = time.perf_counter()
    order = SampleOrder(examples.shard_sizes, seed=0, window=4096)
    batches = MicroBatches(
        order=order,
        rank=0,
        world_size=1,
        micro_batch_size=args.batch,
        accumulation=1,
        start_sample=args.start,
        num_steps=1,
    )
    planned = [examples.resolve(epoch, example) for epoch, example in next(iter(batches))]
    assert len(set(planned)) == args.batch
    done = time.perf_counter()
    print(json.dumps({"open": opened - started, "sizes": checked - opened, "resume": done - checked}))


if __name__ == "__main__":
    main()
