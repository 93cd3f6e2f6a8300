"""Shards of other tools, indexed where they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dehvf_ds import __version__
from dehvf_ds.config import UserError
from dehvf_ds.data.building.directory import (
    MAX_NAMED,
    PLAN_NAME,
    Progress,
    alone_in,
    left_out_fields,
    remove_parts,
    write_error,
)
from dehvf_ds.data.building.sources import Note
from dehvf_ds.data.building.tasks import Advance, run_tasks
from dehvf_ds.data.manifest import MANIFEST_NAME, PLAIN_FILE_NAME, write_index
from dehvf_ds.data.shards import ShardTable, scan_shard


def adopt_shards(
    directory: Path, *, skip_bad: bool, overwrite: bool, num_workers: int, progress: Progress, note: Note
) -> dict[str, Any]:
    """Indexes all ``*.tar`` of a directory, in the order of their names; other files are left alone.

    Args:
        directory: holds the shards, as img2dataset and other tools of WebDataset write them.
        skip_bad: leave unusable samples out of the index.
        overwrite: index anew what has a manifest.
        num_workers: processes.
        progress: counts shards.
        note: told what was left out.

    Returns:
        The manifest.

    Raises:
        UserError: there is no shard, one is no whole tar, or a sample is unusable and not skipped.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    with alone_in(directory):
        paths = _find_shards(directory, overwrite=overwrite)
        progress.start(len(paths))
        tasks = [(path, skip_bad) for path in paths]
        tables = run_tasks(_adopt_shard, tasks, num_workers=num_workers, advance=progress.advance)
        bad = [line for table in tables for line in table.bad]
        for line in bad[:MAX_NAMED]:
            note(f"left out {line}")
        if bad:
            note(f"left out {len(bad)} of {len(bad) + sum(len(table.rows) for table in tables)} samples")
        here = [line.removeprefix(f"{directory}/") for line in bad]
        builder = {
            "source": "index",
            "skip_bad": skip_bad,
            "version": __version__,
            **left_out_fields(here),
        }
        try:
            return write_index(directory, [path.name for path in paths], tables, builder)
        except OSError as error:
            raise write_error(error, directory) from error
        finally:
            remove_parts(directory)


def _find_shards(directory: Path, *, overwrite: bool) -> list[Path]:
    if (directory / PLAN_NAME).is_file() and not (directory / MANIFEST_NAME).is_file():
        raise UserError(
            f"{directory}: holds a build that is not finished; finish it by the call that began it"
        )
    if (directory / MANIFEST_NAME).is_file() and not overwrite:
        raise UserError(f"{directory}: {MANIFEST_NAME} is there already; --overwrite indexes anew")
    paths = sorted(path for path in directory.glob("*.tar") if not path.name.startswith("."))
    if not paths:
        packed = sorted(directory.glob("*.tar.*"))
        hint = f"; {packed[0].name} is compressed: unpack such files to .tar" if packed else ""
        raise UserError(f"{directory}: holds no *.tar{hint}")
    if odd := [path for path in paths if not PLAIN_FILE_NAME.fullmatch(path.name)]:
        raise UserError(f"{odd[0]}: a shard's name has letters, digits and ._=- only; rename it")
    return paths


def _adopt_shard(task: tuple[Path, bool], advance: Advance) -> ShardTable:
    path, skip_bad = task
    table = scan_shard(path, skip_bad=skip_bad)
    advance(1)
    return table
