"""Speed of tools/build_shards.py on synthetic photographs of about 300 KB: pictures and MB a second.

    python benchmarks/build_shards.py --count 3000
    python benchmarks/build_shards.py --count 300 --tool=--shorter-side --tool=256

Runs the tool as a user would, in its own process, so the time holds its start. The pictures are JPEG files of
noise, which nothing on the way can compress.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from bench import REPOSITORY, flags
from PIL import Image

NUM_DISTINCT = 32


def main() -> None:
    """Makes the pictures, builds, prints one JSON line."""
    parser = flags(__doc__)
    parser.add_argument("--count", type=int, default=3000, help="pictures (%(default)s)")
    parser.add_argument("--directory", type=Path, help="where to work; a temporary directory by default")
    parser.add_argument("--tool", action="append", default=[], help="a further argument of the tool")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        work = Path(name)
        num_bytes = make_pictures(work, args.count)
        load = os.getloadavg()[0]
        command = [sys.executable, str(REPOSITORY / "tools/build_shards.py"), "csv"]
        command += ["--captions", str(work / "captions.csv"), "--images", str(work / "images")]
        began = time.perf_counter()
        command += ["--output", str(work / "shards"), *args.tool]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
    result = {
        "pictures": args.count,
        "mean_kb": round(num_bytes / args.count / 1e3),
        "seconds": round(seconds, 2),
        "pictures_per_s": round(args.count / seconds),
        "mb_per_s": round(num_bytes / seconds / 1e6),
        "load_before": round(load, 1),
        "cores": len(os.sched_getaffinity(0)),
    }
    print(json.dumps(result))


def make_pictures(work: Path, count: int) -> int:
    """Writes ``count`` files and their captions; returns the sum of their sizes in bytes."""
    random, distinct, sizes, lines = Random(0), [], [], ["image,caption"]
    for _ in range(NUM_DISTINCT):
        content = io.BytesIO()
        Image.frombytes("RGB", (640, 480), random.randbytes(3 * 640 * 480)).save(content, "JPEG", quality=91)
        distinct.append(content.getvalue())
    (work / "images").mkdir()
    for number in range(count):
        sizes.append((work / f"images/{number:06d}.jpg").write_bytes(distinct[number % NUM_DISTINCT]))
        lines.append(f"{number:06d}.jpg,Noise number {number} in all colours.")
    (work / "captions.csv").write_text("\n".join(lines), encoding="utf-8")
    return sum(sizes)


if __name__ == "__main__":
    main()
