"""Makes the data of the comparison: drawn scenes, questions about them, and what the tower sees.

    python benchmarks/method/prepare.py [--flickr8k DIR]

DIR holds Flickr8k: ``dataset_flickr8k.json`` (Karpathy's) and the pictures in ``Images``. What is there
already is left as it is.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tasks import DATA, PICTURES, TASKS, Split

SPLITS = ("train", "val", "test")


def main() -> None:
    """Draws, builds shards, runs the tower."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--flickr8k", type=Path)
    args = parser.parse_args()
    world = DATA / "world"
    if not world.exists():
        counts = (f"--{split}={count}" for split, count in PICTURES["scenes"].items())
        tool("make_scenes", "--output", world, *counts)
    for split in SPLITS:
        captions = ("--annotations", world / f"annotations/captions_{split}.json")
        build("coco", *captions, "--images", world / "images" / split, to=DATA / "shards/scenes" / split)
        root = world / "scienceqa"
        build("scienceqa", "--root", root, "--split", split, to=DATA / "shards/questions" / split)
        if args.flickr8k:
            source = (
                "--dataset",
                args.flickr8k / "dataset_flickr8k.json",
                "--images",
                args.flickr8k / "Images",
            )
            build("karpathy", *source, "--split", split, to=DATA / "shards/flickr8k" / split)
    for task in TASKS.values():
        for split in SPLITS if (DATA / "shards" / task.name).is_dir() else ():
            print(f"{task.name} {split}: {Split(task, split).size} rows")


def build(layout: str, *arguments: object, to: Path) -> None:
    """Builds shards, if they are not there."""
    if not to.exists():
        tool("build_shards", layout, *arguments, "--output", to, "--samples-per-shard", 100)


def tool(name: str, *arguments: object) -> None:
    """Runs one of the repository's tools."""
    script = Path(__file__).parents[2] / "tools" / f"{name}.py"
    subprocess.run([sys.executable, str(script), *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()
