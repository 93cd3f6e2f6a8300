"""Shards of other tools, indexed where they lie."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dehvf_ds import __version__
from dehvf_ds.config import UserError
from dehvf_ds.data.building.directory import PLAN_NAME, Progress, alone_in, remove_parts, write_error
from dehvf_ds.data.building.left_out import BadRows, Note
from dehvf_ds.data.building.tasks import Advance, run_tasks
from dehvf_ds.data.manifest import MANIFEST_NAME, PLAIN_FILE_NAME, write_index
from dehvf_ds.data.shards import ShardTable, scan_shard

_PACKED = re.compile(
    r"(.+?)(?:\.tar\.(?:gz|bz2|xz|zst|zstd|lz4|lzma|lzo|z|br)|\.tgz|\.tbz2?|\.txz|\.tzst)", re.IGNORECASE
)


def adopt_shards(
    directory: Path,
    *,
    skip_bad: bool,
    overwrite: bool,
    num_workers: int,
    progress: Progress,
    note: Note,
    decode: bool = True,
) -> dict[str, Any]:
    """Indexes all ``*.tar`` of a directory, in the order of their names; other files are left alone.

    Where shards number their keys anew, a sample's key becomes SHARD/KEY.

    Args:
        directory: holds the shards, as img2dataset and other tools of WebDataset write them.
        skip_bad: leave unusable samples out of the index.
        overwrite: index anew what has a manifest.
        num_workers: processes.
        progress: counts shards.
        note: told what was left out.
        decode: decode every picture.

    Returns:
        The manifest.

    Raises:
        UserError: there is no shard, one is no whole tar, or a sample is unusable and not skipped.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    with alone_in(directory):
        paths = _find_shards(directory, overwrite=overwrite, note=note)
        progress.start(len(paths))
        tasks = [(path, skip_bad, decode) for path in paths]
        tables = run_tasks(_adopt_shard, tasks, num_workers=num_workers, advance=progress.advance)
        bad = BadRows(skip=True)
        for table in tables:
            bad.notes.update(table.notes)
            for reason, line in table.bad:
                bad.add(line.removeprefix(f"{directory}/"), line, reason)
        bad.tell(note, sum(len(table.rows) + len(table.bad) for table in tables))
        builder = {"source": "index", "skip_bad": skip_bad, "version": __version__, **bad.fields()}
        try:
            manifest = write_index(directory, [path.name for path in paths], tables, builder)
        except OSError as error:
            raise write_error(error, directory) from error
        finally:
            remove_parts(directory)
    if manifest["key_prefix"]:
        note("the shards number their keys anew; a sample's key is SHARD/KEY")
    return manifest


def _find_shards(directory: Path, *, overwrite: bool, note: Note) -> list[Path]:
    if (directory / PLAN_NAME).is_file() and not (directory / MANIFEST_NAME).is_file():
        raise UserError(
            f"{directory}: holds a build that is not finished; finish it by the call that began it"
        )
    if (directory / MANIFEST_NAME).is_file() and not overwrite:
        raise UserError(f"{directory}: {MANIFEST_NAME} is there already; --overwrite indexes anew")
    files = sorted(path for path in directory.iterdir() if path.is_file() and not path.name.startswith("."))
    paths = [path for path in files if path.suffix.lower() == ".tar"]
    unpacked = {path.stem for path in paths}
    packed = [f for f in files if (found := _PACKED.fullmatch(f.name)) and found[1] not in unpacked]
    if packed:
        others = f" (and {len(packed) - 1} others)" if len(packed) > 1 else ""
        raise UserError(
            f"{directory}: {packed[0].name}{others} is compressed, and samples are read at random: "
            "unpack it to .tar (gunzip, zstd -d, ..)"
        )
    below = sorted(
        path
        for path in directory.glob("*/**/*")
        if not path.name.startswith(".") and (path.suffix.lower() == ".tar" or _PACKED.fullmatch(path.name))
    )
    if not paths:
        raise UserError(f"{directory}: holds no *.tar{_places(directory, below, files)}")
    if below:
        folders = sorted({str(path.parent.relative_to(directory)) for path in below})
        note(f"not indexed: {len(below)} tars in folders below ({', '.join(folders[:3])}); index each folder")
    if odd := [path for path in paths if not PLAIN_FILE_NAME.fullmatch(path.name)]:
        raise UserError(f"{odd[0]}: a shard's name has letters, digits and ._=- only; rename it")
    return paths


def _places(directory: Path, below: list[Path], files: list[Path]) -> str:
    """Where the shards may be instead."""
    if below:
        folders = sorted({path.parent for path in below})
        return (
            f", but {len(below)} lie in folders below it: index each folder by itself "
            f"(tools/build_shards.py index {folders[0]}), or move them up"
        )
    names = ", ".join(path.name for path in files[:3])
    return f" (it holds {names}, ..)" if names else " (it is empty)"


def _adopt_shard(task: tuple[Path, bool, bool], advance: Advance) -> ShardTable:
    path, skip_bad, decode = task
    table = scan_shard(path, skip_bad=skip_bad, decode=decode)
    advance(1)
    return table
