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
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from dehvf_ds.config import UserError, expand_flags
from dehvf_ds.data.building import sources
from dehvf_ds.data.building.adopt import adopt_shards
from dehvf_ds.data.building.left_out import BadRows
from dehvf_ds.data.building.plan import BuildSettings, describe_file
from dehvf_ds.data.building.sources import SourceRow
from dehvf_ds.data.building.tables import read_csv
from dehvf_ds.data.building.verify import verify_shards
from dehvf_ds.data.building.write import build_shards

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
MAX_SHOWN = 20
LINE_EVERY_S = 30.0
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help tells more")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code."""
    try:
        args = expand_flags(build_parser().parse_args(argv))
        return args.run(args)
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same call again goes on", file=sys.stderr)
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser: one subcommand a source, and those for finished directories."""
    parser = _Parser(prog="build_shards.py", description="Builds shards of a published data set.")
    commands = parser.add_subparsers(dest="source", required=True)

    coco = _add_source(commands, "coco", _coco, "official COCO captions_*.json")
    coco.add_argument("--annotations", type=Path, required=True, help="captions_*.json")
    coco.add_argument("--images", type=Path, required=True, help="directory of the pictures")

    karpathy = _add_source(commands, "karpathy", _karpathy, "Karpathy's dataset_*.json")
    karpathy.add_argument(
        "--dataset", type=Path, required=True, help="dataset_coco.json or dataset_flickr8k.json"
    )
    karpathy.add_argument("--images", type=Path, required=True, help="directory of the pictures")
    karpathy.add_argument("--split", required=True, help="train, val, test, or several as train+restval")

    table = _add_source(
        commands, "csv", _csv, "a table with a header, as image,caption (Flickr8k, Flickr30k)"
    )
    table.add_argument(
        "--captions", type=Path, required=True, help="the table, of commas, tabs, semicolons or bars"
    )
    table.add_argument("--images", type=Path, required=True, help="directory of the pictures")

    problems = _add_source(commands, "scienceqa", _scienceqa, "ScienceQA's problems.json and pictures")
    problems.add_argument(
        "--root", type=Path, required=True, help="holds problems.json, pid_splits.json, images/"
    )
    problems.add_argument("--split", required=True, help="a split of pid_splits.json")
    problems.add_argument("--captions", type=Path, help="captions.json, to put the pictures' captions in")
    problems.add_argument(
        "--allow-missing-images",
        action="store_true",
        help="keep problems without their picture",
    )

    chats = _add_source(commands, "llava", _llava, "conversations of LLaVA or ShareGPT")
    chats.add_argument("--json", type=Path, required=True, help="a .json list, or a .jsonl")
    chats.add_argument("--images", type=Path, required=True, help="directory of the pictures")

    index = commands.add_parser("index", help="index shards made by another tool")
    index.add_argument("directory", type=Path, metavar="DIR", help="holds *.tar, as img2dataset writes them")
    _add_checks(index, "samples")
    index.add_argument("--overwrite", action="store_true", help="index anew what has a manifest")
    index.set_defaults(run=_run_index)
    verify = commands.add_parser("verify", help="read everything again and say what is damaged")
    verify.add_argument("directory", type=Path, metavar="DIR", help="a shard directory")
    verify.add_argument("--no-decode", action="store_true", help="do not decode the pictures")
    verify.set_defaults(run=_run_verify)
    for command in (index, verify):
        _add_num_workers(command)
    return parser


def parse_size(text: str) -> int:
    """Bytes of a size such as 500M, 1.5G or 1000000; the units are powers of 1000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.strip().upper())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 500M, 1G or a number of bytes")
    return int(float(found[1]) * UNITS[found[2]])


def _add_source(
    commands: Any, name: str, read: Callable[[argparse.Namespace, BadRows], list[SourceRow]], text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=f"Builds shards from {text}.")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="directory to write; empty, absent, or begun by the same call",
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--samples-per-shard", type=int, help="samples of a shard (1000)")
    sizes.add_argument(
        "--bytes-per-shard",
        type=parse_size,
        metavar="SIZE",
        help="largest sum of a shard's source files: 500M, 1G",
    )
    parser.add_argument("--name", help="the shards' name; the source's by default")
    parser.add_argument(
        "--shorter-side", type=int, metavar="N", help="make larger pictures smaller, to this shorter side"
    )
    parser.add_argument("--jpeg-quality", type=int, default=90, metavar="Q", help="of those (%(default)s)")
    _add_checks(parser, "rows")
    _add_num_workers(parser)
    parser.set_defaults(run=_run_build, read=read)
    return parser


def _add_checks(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help=f"leave out {what} whose picture is missing or cannot be decoded, that have no caption "
        "or several pictures, or whose text or record is damaged, and count them by reason; without it the "
        "first is an error",
    )
    parser.add_argument("--no-decode", action="store_true", help="do not decode the pictures")


def _add_num_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (%(default)s, the usable cores)",
    )


def _coco(args: argparse.Namespace, bad: BadRows) -> list[SourceRow]:
    return sources.read_coco(args.annotations, args.images, note=_note, bad=bad)


def _karpathy(args: argparse.Namespace, bad: BadRows) -> list[SourceRow]:
    return sources.read_karpathy(args.dataset, args.images, args.split, note=_note, bad=bad)


def _csv(args: argparse.Namespace, bad: BadRows) -> list[SourceRow]:
    return read_csv(args.captions, args.images, note=_note, bad=bad)


def _scienceqa(args: argparse.Namespace, bad: BadRows) -> list[SourceRow]:
    return sources.read_scienceqa(
        args.root,
        args.split,
        captions=args.captions,
        allow_missing_images=args.allow_missing_images,
        note=_note,
        bad=bad,
    )


def _llava(args: argparse.Namespace, bad: BadRows) -> list[SourceRow]:
    return sources.read_llava(args.json, args.images, bad=bad)


def _facts(args: argparse.Namespace) -> dict[str, Any]:
    """What the manifest says of the source: flags, and files by name and hash, for paths differ."""
    facts: dict[str, Any] = {"source": args.source}
    for flag in ("split", "allow_missing_images"):
        if hasattr(args, flag):
            facts[flag] = getattr(args, flag)
    for flag in ("annotations", "dataset", "captions", "json"):
        if getattr(args, flag, None) is not None:
            facts[flag] = describe_file(getattr(args, flag))
    if hasattr(args, "root"):
        for name in ("problems", "pid_splits"):
            facts[name] = describe_file(args.root / f"{name}.json")
    return facts


def _run_build(args: argparse.Namespace) -> int:
    samples_per_shard = args.samples_per_shard
    if samples_per_shard is None and args.bytes_per_shard is None:
        samples_per_shard = 1000
    settings = BuildSettings(
        samples_per_shard=samples_per_shard,
        bytes_per_shard=args.bytes_per_shard,
        shorter_side=args.shorter_side,
        jpeg_quality=args.jpeg_quality,
        skip_bad=args.skip_bad,
        decode=not args.no_decode,
    )
    bad = BadRows(skip=args.skip_bad)
    rows = args.read(args, bad)
    facts = _facts(args)
    with _Progress("Writing shards", "samples") as progress:
        manifest, was_there = build_shards(
            rows,
            args.output,
            name=args.name or args.source,
            settings=settings,
            facts=facts,
            num_workers=args.num_workers,
            progress=progress,
            note=_note,
            bad=bad,
        )
    print(f"{args.output}: {'complete already: ' if was_there else ''}{_counts(manifest)}")
    return 0


def _run_index(args: argparse.Namespace) -> int:
    with _Progress("Reading shards", "shards") as progress:
        manifest = adopt_shards(
            args.directory,
            skip_bad=args.skip_bad,
            overwrite=args.overwrite,
            num_workers=args.num_workers,
            progress=progress,
            note=_note,
            decode=not args.no_decode,
        )
    print(f"{args.directory}: {_counts(manifest)}")
    return 0


def _run_verify(args: argparse.Namespace) -> int:
    with _Progress("Checking shards", "samples") as progress:
        manifest, problems = verify_shards(
            args.directory, decode=not args.no_decode, num_workers=args.num_workers, progress=progress
        )
    shards = f"{args.directory}: {len(manifest['shards'])} shards, {manifest['num_samples']:,} samples"
    if not problems:
        print(f"{shards}, all as the manifest says")
        return 0
    for line in problems[:MAX_SHOWN]:
        # Names in a damaged shard may hold anything.
        print(" ".join(line.encode(errors="backslashreplace").decode().split()))
    if len(problems) > MAX_SHOWN:
        print(f"and {len(problems) - MAX_SHOWN} others")
    raise UserError(f"{shards}: {len(problems)} of them damaged")


def _counts(manifest: dict[str, Any]) -> str:
    total = sum(shard["bytes"] for shard in manifest["shards"])
    return (
        f"{manifest['num_samples']} samples, {manifest['num_captions']} captions, "
        f"{manifest.get('num_pictures', 'some')} pictures, "
        f"{len(manifest['shards'])} shards, {total / 1e6:.1f} MB"
    )


def _note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


class _Progress:
    """A bar on a terminal; elsewhere a plain line every half minute."""

    def __init__(self, title: str, unit: str):
        console = Console(stderr=True)
        self._title, self._unit = title, unit
        self._total, self._done = 0, 0
        self._began = self._shown = time.monotonic()
        self._bar = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(unit))
            self._bar = RichProgress(*columns, TimeRemainingColumn(), console=console)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, total: int) -> None:
        """Shows the empty bar."""
        self._total = total
        self._began = self._shown = time.monotonic()
        if self._bar is not None:
            self._bar.add_task(self._title, total=total)
            self._bar.start()

    def advance(self, count: int) -> None:
        """Shows that more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], count)
        elif time.monotonic() - self._shown >= LINE_EVERY_S:
            self._shown = time.monotonic()
            speed = self._done / (self._shown - self._began)
            left = (self._total - self._done) / speed / 60
            print(
                f"{self._title}: {self._done:,} of {self._total:,} {self._unit}, {speed:.0f} a second, "
                f"{left:.0f} minutes left",
                file=sys.stderr,
            )


class _Speed(ProgressColumn):
    def __init__(self, unit: str):
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.0f} {self._unit}/s")
