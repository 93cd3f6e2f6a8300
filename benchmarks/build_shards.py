"""Speed of tools/build_shards.py on synthetic photographs of about 300 KB: pictures and MB a second.

    python benchmarks/build_shards.py --count 3000
    python benchmarks/build_shards.py --count 300 --tool=--shorter-side --tool=256

Runs the tool as a user would, in its own process, so the time holds its start. The pictures are JPEG files of
noise, which nothing on the way can compress.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from PIL import Image

ROOT = Path(__file__).parents[1]
WIDTH, HEIGHT = 640, 480
QUALITY = 91
NUM_DISTINCT = 32


def main() -> int:
    """Makes the pictures, builds, prints one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=3000, help="pictures (%(default)s)")
    parser.add_argument("--num-workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--directory", type=Path, help="where to work; a temporary directory by default")
    parser.add_argument("--tool", action="append", default=[], help="a further argument of the tool")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        work = Path(name)
        num_bytes = make_pictures(work, args.count)
        load = os.getloadavg()[0]
        began = time.perf_counter()
        run_tool(work, ["--num-workers", str(args.num_workers), *args.tool])
        seconds = time.perf_counter() - began
    result = {
        "pictures": args.count,
        "mean_kb": round(num_bytes / args.count / 1e3),
        "num_workers": args.num_workers,
        "seconds": round(seconds, 2),
        "pictures_per_s": round(args.count / seconds),
        "mb_per_s": round(num_bytes / seconds / 1e6),
        "load_before": round(load, 1),
        "cores": len(os.sched_getaffinity(0)),
    }
    print(json.dumps(result))
    return 0


def make_pictures(work: Path, count: int) -> int:
    """Writes ``count`` files and their captions; returns the sum of their sizes in bytes."""
    random, total = Random(0), 0
    distinct = [noise_picture(random) for _ in range(NUM_DISTINCT)]
    (work / "images").mkdir()
    with (work / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["image", "caption"])
        for number in range(count):
            data = distinct[number % NUM_DISTINCT]
            (work / "images" / f"{number:06d}.jpg").write_bytes(data)
            total += len(data)
            lines.writerow([f"{number:06d}.jpg", f"Noise number {number}, in all colours."])
    return total


def noise_picture(random: Random) -> bytes:
    """A JPEG of uniform noise."""
    image = Image.frombytes("RGB", (WIDTH, HEIGHT), random.randbytes(3 * WIDTH * HEIGHT))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def run_tool(work: Path, more: list[str]) -> None:
    """Builds shards of the pictures."""
    tool = [sys.executable, str(ROOT / "tools" / "build_shards.py"), "csv"]
    paths = ["--captions", str(work / "captions.csv"), "--images", str(work / "images")]
    command = [*tool, *paths, "--output", str(work / "shards"), *more]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
