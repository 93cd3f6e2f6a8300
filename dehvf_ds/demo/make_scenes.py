"""Draw a small world of shapes with captions and questions, in the official COCO and ScienceQA layouts.

    python tools/make_scenes.py --output scenes

writes pictures (``images/SPLIT/NAME.png``), five captions for each (``annotations/captions_SPLIT.json``,
COCO) and as many multiple-choice questions as pictures (``scienceqa/problems.json`` and ``pid_splits.json``,
``scienceqa/images/SPLIT/ID/image.png``), so that training and evaluation can be tried with no download. The
same arguments and the same pillow give the same bytes.

Unseen means unseen: an object is a combination of colour, texture and shape (8 x 4 x 8 = 256). Of these 192
are drawn in ``train`` only, 32 in ``val`` only and 32 in ``test`` only, while every *pair* of values is left
to ``train``. So no object of a val or test picture was ever shown in training, in any picture: a model must
put it together from parts it knows. The world, its wording and this split are ours.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

from dehvf_ds.config import UserError, expand_flags
from dehvf_ds.demo.scenes.pictures import draw_picture
from dehvf_ds.demo.scenes.questions import ask_about_picture, ask_in_words
from dehvf_ds.demo.scenes.world import SPLITS, draw_scene


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, the folder made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def write_world(directory: Path, counts: dict[str, int], seed: int, image_size: int) -> None:
    """Write pictures, captions and questions of every split into ``directory``.

    Args:
        directory: an empty directory.
        counts: pictures of each split; as many questions, of which three in ten are text-only.
        seed: seed of everything drawn; each picture has a generator of its own.
        image_size: side of the pictures in pixels.
    """
    problems: dict[str, Any] = {}
    pids: dict[str, list[str]] = {}
    number = 0
    for split, count in counts.items():
        images, annotations = [], []
        pids[split] = []
        (directory / "images" / split).mkdir(parents=True)
        for index in range(count):
            number += 1
            # A string seeds the same generator on every platform and Python version.
            random = Random(f"{seed}/{split}/{index}")
            scene = draw_scene(random, split)
            name = f"{number:06d}.png"
            picture = directory / "images" / split / name
            draw_picture(random, scene, image_size).save(picture)
            images.append({"id": number, "file_name": name, "height": image_size, "width": image_size})
            for caption in scene.captions:
                key = 5 * (number - 1) + len(annotations) % 5 + 1
                annotations.append({"id": key, "image_id": number, "caption": caption})

            ask = ask_in_words if random.random() < 0.3 else ask_about_picture
            record = ask(random, scene).record(random, split)
            problems[str(number)] = record
            pids[split].append(str(number))
            if record["image"]:
                target = directory / "scienceqa" / "images" / split / str(number) / record["image"]
                target.parent.mkdir(parents=True)
                shutil.copyfile(picture, target)
        info = {"description": "dehvf_ds scenes", "version": "1", "seed": seed, "split": split}
        captions = {"info": info, "images": images, "annotations": annotations}
        write_json(directory / "annotations" / f"captions_{split}.json", captions)
    pids["trainval"] = pids["train"] + pids["val"]
    write_json(directory / "scienceqa" / "problems.json", problems)
    write_json(directory / "scienceqa" / "pid_splits.json", pids)


def main(argv: list[str] | None = None) -> int:
    """Entry of the script; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, required=True, help="directory to write; must not exist yet")
    parser.add_argument("--train", type=int, default=1200, help="pictures for training (default 1200)")
    parser.add_argument("--val", type=int, default=100, help="pictures for validation (default 100)")
    parser.add_argument("--test", type=int, default=100, help="pictures for the test (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default 0)")
    parser.add_argument("--image-size", type=int, default=224, help="side in pixels (default 224)")
    args = parser.parse_args(argv)
    counts = {split: getattr(args, split) for split in SPLITS}
    try:
        expand_flags(args)
        for split, count in counts.items():
            if count < 1:
                raise UserError(f"--{split} {count}: give at least 1 picture")
        if not 64 <= args.image_size <= 2048:
            raise UserError(f"--image-size {args.image_size}: give 64 to 2048 pixels")
        if args.output.exists():
            raise UserError(f"--output {args.output} exists; remove it or name another directory")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{args.output.name}-", dir=args.output.parent))
        try:
            write_world(partial, counts, args.seed, args.image_size)
            partial.chmod(0o755)
            partial.replace(args.output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    total = sum(counts.values())
    print(f"{args.output}: {total} pictures, {5 * total} captions, {total} questions ({counts})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
