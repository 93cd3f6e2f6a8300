"""Makes the data of the comparison: drawn scenes, questions about them, and what the tower sees.

    python benchmarks/method/prepare.py [--flickr8k DIR]

DIR holds Flickr8k: ``dataset_flickr8k.json`` (Karpathy's) and the pictures in ``Images``. What is there
already is left as it is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from random import Random

from tasks import DATA, PICTURES, TASKS, Split

from dehvf_ds.atomic import atomic_file
from dehvf_ds.demo.scenes import ask_about_picture, ask_in_words, draw_scene

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
        if not (asked := world / f"questions_{split}.json").exists():
            write_questions(world, split, asked)
        build(
            "llava",
            "--json",
            asked,
            "--images",
            world / "images" / split,
            to=DATA / "shards/questions" / split,
        )
    if args.flickr8k:
        source = ("--dataset", args.flickr8k / "dataset_flickr8k.json", "--images", args.flickr8k / "Images")
        build("karpathy", *source, "--split", "train+val+test", to=DATA / "shards/flickr8k/all")
    for task in TASKS.values():
        if (DATA / "shards" / task.name).is_dir():
            for split in ("train", "val") if task.folds else SPLITS:
                print(f"{task.name} {split}: {len(Split(task, split).rows)} rows")


def write_questions(world: Path, split: str, to: Path) -> None:
    """Writes a conversation about every picture of the world; every fourth is about a text instead."""
    pictures = json.loads((world / f"annotations/captions_{split}.json").read_text())["images"]
    rows = []
    for number, picture in enumerate(pictures):
        # As `make_scenes.py` drew it.
        scene = draw_scene(Random(f"0/{split}/{number}"), split)
        random, in_words = Random(f"questions/{split}/{number}"), number % 4 == 3
        turns: list[dict[str, str]] = []
        for _ in range(12):
            asked = (ask_in_words if in_words else ask_about_picture)(random, scene)
            question = f"{asked.hint} {asked.text}" if in_words else asked.text
            # An answer is not given away by what was said before it; without a text nothing tells it.
            told = any(asked.right in turn["value"] or question == turn["value"] for turn in turns)
            if not told and len(turns) < 10 and (asked.hint or not in_words):
                turns += ({"from": "human", "value": question}, {"from": "gpt", "value": asked.right})
        rows.append({"id": f"{number:06d}", "conversations": turns})
        if not in_words:
            rows[-1]["image"] = picture["file_name"]
    with atomic_file(to) as path:
        path.write_text(json.dumps(rows), encoding="utf-8")


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
