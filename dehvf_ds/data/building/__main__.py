"""Builds training and evaluation shards from the files that data sets are published as.

    python tools/build_shards.py coco --annotations captions_train2017.json --images train2017 --output DIR
    python tools/build_shards.py karpathy --dataset dataset_coco.json --images coco --split test --output DIR
    python tools/build_shards.py csv --captions captions.txt --images Images --output DIR
    python tools/build_shards.py scienceqa --root scienceqa --split train --output DIR
    python tools/build_shards.py llava --json llava_v1_5_mix665k.json --images images --output DIR
    python tools/build_shards.py index DIR     # the index of another tool's shards (img2dataset)
    python tools/build_shards.py verify DIR    # reads everything again and says what is damaged

Pictures are copied as they are, or made smaller by --shorter-side. The same input gives the same bytes,
whatever --num-workers. A build that was interrupted is finished by the same call again. Exit code 2 and one
line for a mistake.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dehvf_ds.config import UserError, expand_flags
from dehvf_ds.data.building import sources
from dehvf_ds.data.building.sources import BadRows, describe_file
from dehvf_ds.data.building.verify import adopt_shards, verify_shards
from dehvf_ds.data.building.writer import BuildSettings, build_shards
from dehvf_ds.distributed import run_entry

MAX_SHOWN = 20
INTERRUPTED = 130

SOURCES = {
    "coco": (sources.read_coco, "official COCO captions_*.json", ("annotations", "images")),
    "karpathy": (sources.read_karpathy, "Karpathy's dataset_*.json", ("dataset", "images", "split")),
    "csv": (sources.read_csv, "a table with a header, as image,caption", ("captions", "images")),
    "scienceqa": (sources.read_scienceqa, "ScienceQA's problems.json and pictures", ("root", "split")),
    "llava": (sources.read_llava, "conversations of LLaVA or ShareGPT", ("json", "images")),
}
"""What reads each layout, what it is, and the flags that its reader takes in this order."""

FLAGS = {
    "annotations": "captions_*.json",
    "dataset": "dataset_coco.json or dataset_flickr8k.json",
    "captions": "the table, of commas, tabs, semicolons or bars",
    "json": "a .json list, or a .jsonl",
    "root": "holds problems.json, pid_splits.json, images/",
    "images": "directory of the pictures",
    "split": "train, val, test, ..; of karpathy also several as train+restval",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code."""
    args = expand_flags(_parser().parse_args(argv))
    try:
        return args.run(args)
    except OSError as error:
        raise UserError(str(error)) from error
    except KeyboardInterrupt:
        print("interrupted; the same call again goes on", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    workers = argparse.ArgumentParser(add_help=False)
    cores = len(os.sched_getaffinity(0))
    workers.add_argument(
        "--num-workers", type=int, default=cores, metavar="N", help="processes (%(default)s, the cores)"
    )
    workers.add_argument("--no-decode", action="store_true", help="do not decode the pictures")
    checks = argparse.ArgumentParser(add_help=False, parents=[workers])
    checks.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out rows whose picture is missing or cannot be decoded, that have no caption or several "
        "pictures, or whose text or record is damaged, and count them by reason; without it the first is an "
        "error",
    )
    build = argparse.ArgumentParser(add_help=False, parents=[checks])
    build.add_argument(
        "--output", type=Path, required=True, help="directory; empty, absent, or begun by the same call"
    )
    sizes = build.add_mutually_exclusive_group()
    sizes.add_argument("--samples-per-shard", type=int, default=1000, help="samples of a shard (1000)")
    sizes.add_argument(
        "--bytes-per-shard", type=_size, metavar="SIZE", help="largest sum of its source files: 500M, 1G"
    )
    build.add_argument("--name", help="the shards' name; the source's by default")
    build.add_argument(
        "--shorter-side", type=int, metavar="N", help="make larger pictures smaller, to this shorter side"
    )
    build.add_argument("--jpeg-quality", type=int, default=90, metavar="Q", help="of those (%(default)s)")

    parser = argparse.ArgumentParser(prog="build_shards.py", description="Builds shards of a data set.")
    commands = parser.add_subparsers(dest="source", required=True)
    for name, (_, text, flags) in SOURCES.items():
        command = commands.add_parser(name, help=text, description=f"Shards of {text}.", parents=[build])
        for flag in flags:
            kind = str if flag == "split" else Path
            command.add_argument(f"--{flag}", type=kind, required=True, help=FLAGS[flag])
        command.set_defaults(run=_run_build)
        if name == "scienceqa":
            command.add_argument(
                "--captions", type=Path, help="captions.json, to put the pictures' captions in"
            )
            command.add_argument(
                "--allow-missing-images", action="store_true", help="keep problems without their picture"
            )
    index = commands.add_parser("index", help="index shards made by another tool", parents=[checks])
    index.add_argument("--overwrite", action="store_true", help="index anew what has a manifest")
    index.set_defaults(run=_run_index)
    verify = commands.add_parser("verify", help="read all again, say what is damaged", parents=[workers])
    verify.set_defaults(run=_run_verify)
    for command in (index, verify):
        command.add_argument("directory", type=Path, metavar="DIR", help="holds the shards, *.tar")
    return parser


def _size(text: str) -> int:
    """Bytes of a size such as 500M, 1.5G or 1000000; the units are powers of 1000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.strip().upper())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 500M, 1G or a number of bytes")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2] or " "))


def _facts(args: argparse.Namespace) -> dict[str, Any]:
    """What the manifest says of the source: flags, and files by name and hash, for paths differ."""
    names = ("source", "split", "allow_missing_images")
    files = {name: path for name in FLAGS if isinstance(path := getattr(args, name, None), Path)}
    files = {name: path for name, path in files.items() if path.is_file()}
    if "root" in args:
        files |= {name: args.root / f"{name}.json" for name in ("problems", "pid_splits")}
    facts = {name: getattr(args, name) for name in names if name in args}
    return facts | {name: describe_file(path) for name, path in files.items()}


def _run_build(args: argparse.Namespace) -> int:
    settings = BuildSettings(
        samples_per_shard=args.samples_per_shard if args.bytes_per_shard is None else None,
        bytes_per_shard=args.bytes_per_shard,
        shorter_side=args.shorter_side,
        jpeg_quality=args.jpeg_quality,
        skip_bad=args.skip_bad,
        decode=not args.no_decode,
    )
    read, _, flags = SOURCES[args.source]
    bad = BadRows(skip=args.skip_bad)
    options = {}
    if args.source == "scienceqa":
        options = {"captions": args.captions, "allow_missing_images": args.allow_missing_images}
    rows = read(*(getattr(args, flag) for flag in flags), **options, bad=bad)
    manifest, was_there = build_shards(
        rows,
        args.output,
        name=args.name or args.source,
        settings=settings,
        facts=_facts(args),
        num_workers=args.num_workers,
        bad=bad,
    )
    print(f"{args.output}: {'complete already: ' if was_there else ''}{_counts(manifest)}")
    return 0


def _run_index(args: argparse.Namespace) -> int:
    manifest = adopt_shards(
        args.directory,
        skip_bad=args.skip_bad,
        overwrite=args.overwrite,
        decode=not args.no_decode,
        num_workers=args.num_workers,
    )
    print(f"{args.directory}: {_counts(manifest)}")
    return 0


def _run_verify(args: argparse.Namespace) -> int:
    manifest, problems = verify_shards(
        args.directory, decode=not args.no_decode, num_workers=args.num_workers
    )
    shards = f"{args.directory}: {len(manifest['shards'])} shards, {manifest['num_samples']:,} samples"
    for line in problems[:MAX_SHOWN]:
        # Names in a damaged shard may hold anything.
        print(" ".join(line.encode(errors="backslashreplace").decode().split()))
    if len(problems) > MAX_SHOWN:
        print(f"and {len(problems) - MAX_SHOWN} others")
    if problems:
        raise UserError(f"{shards}: {len(problems)} of them damaged")
    print(f"{shards}, all as the manifest says")
    return 0


def _counts(manifest: dict[str, Any]) -> str:
    total = sum(shard["bytes"] for shard in manifest["shards"])
    return (
        f"{manifest['num_samples']} samples, {manifest['num_captions']} captions, "
        f"{manifest['num_pictures']} pictures, {len(manifest['shards'])} shards, {total / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    run_entry(main)
