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
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dehvf_ds.config import UserError, expand_flags
from dehvf_ds.data.building.directory import adopt_shards, verify_shards
from dehvf_ds.data.building.scan import BadRows
from dehvf_ds.data.building.sources import LAYOUTS, read_layout
from dehvf_ds.data.building.writer import BuildSettings, build_shards
from dehvf_ds.distributed import run_entry

MAX_SHOWN = 20
INTERRUPTED = 130

FLAGS: dict[str, dict[str, Any]] = {
    "annotations": {"help": "captions_*.json"},
    "dataset": {"help": "dataset_coco.json or dataset_flickr8k.json"},
    "captions": {"help": "a table, of commas, tabs, semicolons or bars; of scienceqa captions.json"},
    "json": {"help": "a .json list, or a .jsonl"},
    "root": {"help": "holds problems.json, pid_splits.json, images/"},
    "images": {"help": "directory of the pictures"},
    "split": {"help": "train, val, test, ..; of karpathy also several as train+restval", "type": str},
    "allow_missing_images": {"help": "keep problems without their picture", "action": "store_true"},
}
"""The flags that ``LAYOUTS`` name; paths, unless an action or a type is given."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code."""
    args = expand_flags(_parser().parse_args(argv))
    try:
        return args.run(args)
    except OSError as error:
        remedy = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "; free space there and call again"
            remedy += ": what is finished is kept; or give another --output" if "output" in args else ""
        where = args.output if "output" in args else args.directory
        raise UserError(f"{where}: {error}{remedy}") from error
    except KeyboardInterrupt:
        print("interrupted; the same call again continues", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    workers = argparse.ArgumentParser(add_help=False)
    cores = len(os.sched_getaffinity(0))
    workers.add_argument(
        "--num-workers", type=_count, default=cores, metavar="N", help="processes (%(default)s, the cores)"
    )
    workers.add_argument("--no-decode", action="store_true", help="do not decode the pictures")
    checks = argparse.ArgumentParser(add_help=False, parents=[workers])
    checks.add_argument(
        "--skip-bad", action="store_true", help="leave out unusable rows and count them, instead of stopping"
    )
    build = argparse.ArgumentParser(add_help=False, parents=[checks])
    build.add_argument(
        "--output", type=Path, required=True, help="directory; empty, absent, or begun by the same call"
    )
    build.add_argument(
        "--samples-per-shard", type=_count, default=1000, metavar="N", help="samples of a shard (1000)"
    )
    build.add_argument(
        "--shorter-side", type=_count, metavar="N", help="make larger pictures smaller, to this shorter side"
    )

    parser = argparse.ArgumentParser(prog="build_shards.py", description="Builds shards of a data set.")
    commands = parser.add_subparsers(dest="source", required=True)
    for name, layout in LAYOUTS.items():
        about = layout.about
        command = commands.add_parser(name, help=about, description=f"Shards of {about}.", parents=[build])
        for flag in layout.flags:
            options: dict[str, Any] = {} if "action" in FLAGS[flag] else {"type": Path}
            options |= {"required": flag not in layout.optional}
            command.add_argument(f"--{flag.replace('_', '-')}", **options | FLAGS[flag])
        command.set_defaults(run=_run_build)
    index = commands.add_parser("index", help="index shards made by another tool", parents=[checks])
    index.add_argument("--overwrite", action="store_true", help="index anew what has a manifest")
    index.set_defaults(run=_run_index)
    verify = commands.add_parser("verify", help="read all again, say what is damaged", parents=[workers])
    verify.set_defaults(run=_run_verify)
    for command in (index, verify):
        command.add_argument("directory", type=Path, metavar="DIR", help="holds the shards, *.tar")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _run_build(args: argparse.Namespace) -> int:
    settings = BuildSettings(
        samples_per_shard=args.samples_per_shard,
        shorter_side=args.shorter_side,
        skip_bad=args.skip_bad,
        decode=not args.no_decode,
    )
    bad = BadRows(skip=args.skip_bad)
    rows, facts = read_layout(args.source, vars(args), bad=bad)
    manifest, was_there = build_shards(
        rows,
        args.output,
        name=args.source,
        settings=settings,
        facts=facts,
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
