"""Builds training and evaluation shards from the files that data sets are published as.

    python tools/build_shards.py coco --annotations captions_train2017.json --images train2017 --output DIR
    python tools/build_shards.py karpathy --dataset dataset_coco.json --images coco --split test --output DIR
    python tools/build_shards.py csv --captions captions.txt --images Images --output DIR
    python tools/build_shards.py scienceqa --root scienceqa --split train --output DIR

Pictures are copied as they are. The same input gives the same bytes. Exit code 2 and one line for a mistake.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from dehvf_ds.config import UserError
from dehvf_ds.data.index import ShardRow, write_shards

MEMBER_OF_SUFFIX = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
MAX_KEY_LENGTH = 80


@dataclass(frozen=True)
class SourceRow:
    """One row before its picture is read: a name for its key, the picture's path or None, the record."""

    name: str
    image: Path | None
    record: dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        if args.samples_per_shard < 1:
            raise UserError(f"--samples-per-shard {args.samples_per_shard}: must be at least 1")
        rows = _read_source(args)
        _check_pictures(rows)
        manifest = write_shards(
            _shard_rows(rows),
            args.output,
            name=args.name or args.source,
            samples_per_shard=args.samples_per_shard,
            builder={
                name: str(value) if isinstance(value, Path) else value
                for name, value in sorted(vars(args).items())
                if name not in ("output", "read")
            },
        )
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    total = sum(shard["bytes"] for shard in manifest["shards"])
    print(
        f"{args.output}: {manifest['num_samples']} samples, {manifest['num_captions']} captions, "
        f"{len(manifest['shards'])} shards, {total / 1e6:.1f} MB"
    )
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser: one subcommand a source."""
    parser = argparse.ArgumentParser(
        prog="build_shards.py", description="Builds shards of a published data set."
    )
    sources = parser.add_subparsers(dest="source", required=True)

    coco = _add_source(sources, "coco", read_coco, "official COCO captions_*.json")
    coco.add_argument("--annotations", type=Path, required=True, help="captions_*.json")
    coco.add_argument("--images", type=Path, required=True, help="directory of the pictures")

    karpathy = _add_source(sources, "karpathy", read_karpathy, "Karpathy's dataset_*.json")
    karpathy.add_argument(
        "--dataset", type=Path, required=True, help="dataset_coco.json or dataset_flickr8k.json"
    )
    karpathy.add_argument("--images", type=Path, required=True, help="directory of the pictures")
    karpathy.add_argument("--split", required=True, help="train, val, test, or several as train+restval")

    table = _add_source(sources, "csv", read_csv, "Flickr8k's captions.txt, with the header image,caption")
    table.add_argument("--captions", type=Path, required=True, help="the csv file")
    table.add_argument("--images", type=Path, required=True, help="directory of the pictures")

    problems = _add_source(sources, "scienceqa", read_scienceqa, "ScienceQA's problems.json and pictures")
    problems.add_argument(
        "--root", type=Path, required=True, help="holds problems.json, pid_splits.json, images/"
    )
    problems.add_argument("--split", required=True, help="a split of pid_splits.json")
    problems.add_argument(
        "--allow-missing-images",
        action="store_true",
        help="keep problems without their picture",
    )
    return parser


def read_coco(args: argparse.Namespace) -> list[SourceRow]:
    """Reads COCO's official annotations: pictures in the file's order, their captions in the file's order.

    Raises:
        UserError: the file is not of this kind, or an annotation names an unknown picture.
    """
    content = _read_json(args.annotations, ("images", "annotations"), "COCO captions")
    captions: dict[Any, list[str]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        if annotation["image_id"] not in captions:
            raise UserError(
                f"{args.annotations}: annotation {annotation.get('id')} names an unknown image_id"
            )
        captions[annotation["image_id"]].append(annotation["caption"])
    return _caption_rows(
        (image["id"], image["file_name"], args.images / image["file_name"], captions[image["id"]])
        for image in content["images"]
    )


def read_karpathy(args: argparse.Namespace) -> list[SourceRow]:
    """Reads a Karpathy split; pictures lie at IMAGES/filepath/filename or IMAGES/filename.

    Raises:
        UserError: the file is not of this kind, or has no such split.
    """
    images = _read_json(args.dataset, ("images",), "Karpathy's split")["images"]
    counts = Counter(image["split"] for image in images)
    wanted = args.split.split("+")
    if unknown := [split for split in wanted if split not in counts]:
        found = ", ".join(f"{split} ({count})" for split, count in sorted(counts.items()))
        raise UserError(f"--split {args.split}: {args.dataset} has no split {unknown[0]!r}; it has {found}")

    def path_of(image: dict[str, Any]) -> Path:
        nested = args.images / image.get("filepath", "") / image["filename"]
        return nested if nested.is_file() else args.images / image["filename"]

    return _caption_rows(
        (
            image["cocoid"] if "cocoid" in image else image["imgid"],
            image["filename"],
            path_of(image),
            _sentences(image),
        )
        for image in images
        if image["split"] in wanted
    )


def read_csv(args: argparse.Namespace) -> list[SourceRow]:
    """Reads a csv file with the header ``image,caption``; rows of one picture are joined.

    Raises:
        UserError: the file or its header is not there, or a line is not of two fields.
    """
    captions: dict[str, list[str]] = {}
    _require_file(args.captions)
    with args.captions.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file)
        if next(lines, None) != ["image", "caption"]:
            raise UserError(f"{args.captions}: its first line is not the header image,caption")
        for fields in lines:
            if len(fields) != 2:
                raise UserError(
                    f"{args.captions}, line {lines.line_num}: {len(fields)} fields, not 2; quote commas"
                )
            captions.setdefault(fields[0], []).append(fields[1])
    return _caption_rows(
        (Path(name).stem, name, args.images / name, texts) for name, texts in captions.items()
    )


def read_scienceqa(args: argparse.Namespace) -> list[SourceRow]:
    """Reads a ScienceQA split. A record is the problem's own fields and its ``pid``.

    With ``--allow-missing-images`` a problem whose picture is not there gets ``image_missing``: true.

    Raises:
        UserError: the files are not of this kind, or there is no such split.
    """
    problems = _read_json(args.root / "problems.json", (), "ScienceQA")
    splits = _read_json(args.root / "pid_splits.json", (), "ScienceQA")
    if args.split not in splits:
        raise UserError(
            f"--split {args.split}: not in {args.root / 'pid_splits.json'}; it has {', '.join(splits)}"
        )
    rows, missing, pictures = [], 0, 0
    for pid in splits[args.split]:
        if pid not in problems:
            raise UserError(
                f"{args.root / 'problems.json'}: has no problem {pid}, which pid_splits.json names"
            )
        record = {**problems[pid], "pid": pid}
        image = None
        if record.get("image"):
            pictures += 1
            image = args.root / "images" / record["split"] / pid / record["image"]
            if args.allow_missing_images and not image.is_file():
                image, missing = None, missing + 1
                record["image_missing"] = True
        rows.append(SourceRow(f"{int(pid):06d}", image, record))
    if missing:
        print(
            f"note: {missing} of {pictures} pictures are missing; their problems are text only",
            file=sys.stderr,
        )
    return rows


def _add_source(
    sources: Any, name: str, read: Callable[[argparse.Namespace], list[SourceRow]], text: str
) -> argparse.ArgumentParser:
    parser = sources.add_parser(name, help=text, description=f"Builds shards from {text}.")
    parser.add_argument(
        "--output", type=Path, required=True, help="directory to write; must be empty or absent"
    )
    parser.add_argument(
        "--samples-per-shard", type=int, default=1000, help="samples of a shard (%(default)s)"
    )
    parser.add_argument("--name", help="the shards' name; the source's by default")
    parser.set_defaults(read=read)
    return parser


def _read_source(args: argparse.Namespace) -> list[SourceRow]:
    try:
        return args.read(args)
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__} {error}"
        raise UserError(f"{args.source}: an entry lacks a field or has another type: {reason}") from error


def _sentences(image: dict[str, Any]) -> list[str]:
    return [sentence["raw"] for sentence in image["sentences"]]


def _caption_rows(pictures: Iterator[tuple[Any, str, Path, list[str]]]) -> list[SourceRow]:
    rows, bare, blank = [], 0, 0
    for image_id, file_name, path, raw in pictures:
        captions = [caption.strip() for caption in raw if caption.strip()]
        blank += len(raw) - len(captions)
        if captions:
            record = {"image_id": image_id, "file_name": file_name, "captions": captions}
            rows.append(SourceRow(Path(file_name).stem, path, record))
        else:
            bare += 1
    if bare or blank:
        print(f"note: left out {blank} empty captions and {bare} pictures without a caption", file=sys.stderr)
    return rows


def _check_pictures(rows: Sequence[SourceRow]) -> None:
    paths = [row.image for row in rows if row.image is not None]
    if missing := [path for path in paths if not path.is_file()]:
        others = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise UserError(f"{missing[0]}: no such picture{others} of {len(paths)}; look at --images or --root")
    for path in paths:
        if path.suffix.lower() not in MEMBER_OF_SUFFIX:
            known = ", ".join(MEMBER_OF_SUFFIX)
            raise UserError(f"{path}: a picture's name ends in one of {known}; convert it")


def _shard_rows(rows: Sequence[SourceRow]) -> Iterator[ShardRow]:
    console = Console(stderr=True)
    used: set[str] = set()
    for row in track(rows, "Writing shards", console=console, disable=not console.is_terminal):
        members = {"json": json.dumps(row.record, ensure_ascii=False, sort_keys=True).encode()}
        if row.image is not None:
            members[MEMBER_OF_SUFFIX[row.image.suffix.lower()]] = row.image.read_bytes()
        yield ShardRow(
            key=_unique_key(row.name, used), members=members, captions=len(row.record.get("captions", ()))
        )


def _unique_key(name: str, used: set[str]) -> str:
    """A key of plain characters; a number sets names apart that become equal."""
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:MAX_KEY_LENGTH] or "sample"
    key, number = stem, 1
    while key in used:
        number += 1
        key = f"{stem}-{number}"
    used.add(key)
    return key


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file")


def _read_json(path: Path, fields: Sequence[str], kind: str) -> dict[str, Any]:
    _require_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict) or any(field not in content for field in fields):
        raise UserError(f"{path}: not {kind}: needs an object with {' and '.join(fields) or 'problems'}")
    return content


if __name__ == "__main__":
    sys.exit(main())
