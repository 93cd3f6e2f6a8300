"""Draws a small world of shapes with captions and questions, in the official COCO and ScienceQA layouts.

    python tools/make_scenes.py --output scenes

writes pictures (``images/SPLIT/NAME.png``), five captions for each (``annotations/captions_SPLIT.json``) and
as many multiple-choice questions as pictures (``scienceqa/problems.json``, ``scienceqa/pid_splits.json``,
``scienceqa/images/SPLIT/ID/image.png``), so that training and evaluation need no download. The same arguments
and the same version of pillow give the same bytes.

An object is a combination of colour, texture and shape (8 x 4 x 8 = 256): 192 are drawn in ``train`` only, 32
in ``val`` only and 32 in ``test`` only, while every *pair* of values occurs in ``train``. So no object of a
val or test picture is seen in training: a model must put it together from known parts.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from random import Random

from dehvf_ds.atomic import atomic_directory
from dehvf_ds.config import expand_flags, require
from dehvf_ds.demo.scenes import SPLITS, draw_picture, draw_problem, draw_scene
from dehvf_ds.distributed import run_entry

IMAGE_SIZE = 224
"""Side of the pictures in pixels."""


def write_json(path: Path, content: dict) -> None:
    """Writes ``content``; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def write_world(directory: Path, counts: dict[str, int], seed: int) -> None:
    """Writes ``counts`` pictures of every split with their captions, and a question about each."""
    problems, pids = {}, {}
    number = 0
    for split, count in counts.items():
        images, annotations, pids[split] = [], [], []
        (directory / "images" / split).mkdir(parents=True)
        for index in range(count):
            number += 1
            # A string seeds the same generator on every platform and Python version.
            random = Random(f"{seed}/{split}/{index}")
            scene = draw_scene(random, split)
            picture = directory / "images" / split / f"{number:06d}.png"
            draw_picture(random, scene, IMAGE_SIZE).save(picture)
            size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
            images.append({"id": number, "file_name": picture.name} | size)
            for key, caption in enumerate(scene.captions, start=5 * number - 4):
                annotations.append({"id": key, "image_id": number, "caption": caption})

            problem = problems[str(number)] = draw_problem(random, scene, split)
            pids[split].append(str(number))
            if problem["image"]:
                target = directory / "scienceqa" / "images" / split / str(number) / "image.png"
                target.parent.mkdir(parents=True)
                shutil.copyfile(picture, target)
        info = {"description": "dehvf_ds scenes", "version": "1", "seed": seed, "split": split}
        captions = {"info": info, "images": images, "annotations": annotations}
        write_json(directory / "annotations" / f"captions_{split}.json", captions)
    pids["trainval"] = pids["train"] + pids["val"]
    write_json(directory / "scienceqa" / "problems.json", problems)
    write_json(directory / "scienceqa" / "pid_splits.json", pids)


def main(argv: list[str] | None = None) -> int:
    """Draws the world; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, required=True, help="directory to write; must not exist yet")
    for split in SPLITS:
        default = 4000 if split == "train" else 100
        parser.add_argument(f"--{split}", type=int, default=default, help=f"pictures (default {default})")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default 0)")
    args = expand_flags(parser.parse_args(argv))
    counts = {split: getattr(args, split) for split in SPLITS}
    for split, count in counts.items():
        require(count > 0, f"--{split} {count}: at least 1 picture is needed")
    exists = f"--output {args.output} exists; remove it or name another directory"
    require(not args.output.exists(), exists)
    with atomic_directory(args.output) as directory:
        write_world(directory, counts, args.seed)
    total = sum(counts.values())
    print(f"{args.output}: {total} pictures, {5 * total} captions, {total} questions ({counts})")
    return 0


if __name__ == "__main__":
    run_entry(main)
