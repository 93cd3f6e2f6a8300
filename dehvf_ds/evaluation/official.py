"""The layouts that ScienceQA and COCO are published in, made into shards beside an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dehvf_ds.config import EvalConfig, UserError
from dehvf_ds.data.building.sources import (
    BadRows,
    SourceRow,
    describe_file,
    read_coco,
    read_karpathy,
    read_scienceqa,
)
from dehvf_ds.data.building.writer import BuildSettings, build_shards
from dehvf_ds.evals.coco_files import is_karpathy
from dehvf_ds.evaluation.place import shards_directory


def is_official(data: str) -> bool:
    """Whether ``data`` is a ScienceQA directory or a JSON file of captions, and not a directory of shards."""
    path = Path(data)
    return path.is_file() or (path / "problems.json").is_file()


def build_official(config: EvalConfig) -> Path:
    """Builds the shards of an official layout, or finds them built by the same files. Rank 0 alone.

    Args:
        config: ``data`` is a directory with ``problems.json`` and ``pid_splits.json``, COCO's
            ``captions_*.json`` or Karpathy's ``dataset_*.json``; ``images`` the pictures of the latter two.

    Returns:
        The directory of the shards, below that of the results.

    Raises:
        UserError: a flag is missing, a file is of another kind, or the disk is full.
    """
    data = Path(config.data)
    names = ("problems.json", "pid_splits.json")
    shards = shards_directory(config, *([data / name for name in names] if data.is_dir() else [data]))
    # No row is left out: scores would be of other rows than the published ones.
    bad = BadRows(skip=False, remedy="correct it")
    rows, facts = _read(config, bad)
    build_shards(
        rows,
        shards,
        name=config.task,
        settings=BuildSettings(),
        facts=facts,
        num_workers=1,
        bad=bad,
        progress=False,
    )
    return shards


def _read(config: EvalConfig, bad: BadRows) -> tuple[list[SourceRow], dict[str, Any]]:
    data = Path(config.data)
    if data.is_dir():
        files = {name: describe_file(data / f"{name}.json") for name in ("problems", "pid_splits")}
        rows = read_scienceqa(data, _split(config), allow_missing_images=True, bad=bad)
        named = [row for row in rows if row.image is not None or row.record.get("image_missing")]
        if named and all(row.image is None for row in named):
            raise UserError(
                f"{data}: none of the {len(named)} pictures of {_split(config)} is there, as "
                f"images/SPLIT/PID/NAME; unpack them, or build shards without them: tools/build_shards.py "
                f"scienceqa --root {data} --split {config.split} --allow-missing-images --output DIR"
            )
        return rows, {"source": "scienceqa", "split": config.split, "allow_missing_images": True, **files}
    if data.suffix.lower() != ".json":
        raise UserError(
            f"--data {data}: a file that is no .json; name the directory of the shards, that of ScienceQA, "
            "or a file of COCO's captions or Karpathy's splits"
        )
    # A picture without a caption cannot be scored.
    unscored = BadRows(skip=True)
    images = data.parent if config.images is None else Path(config.images)
    if is_karpathy(data):
        facts = {"source": "karpathy", "split": config.split, "dataset": describe_file(data)}
        return _scored(read_karpathy(data, images, _split(config), bad=unscored), unscored), facts
    facts = {"source": "coco", "annotations": describe_file(data)}
    return _scored(read_coco(data, images, bad=unscored), unscored), facts


def _scored(rows: list[SourceRow], unscored: BadRows) -> list[SourceRow]:
    unscored.tell(len(rows) + sum(unscored.counts.values()))
    return rows


def _split(config: EvalConfig) -> str:
    if config.split is None:
        raise UserError(f"{config.data} holds several splits; name one with --split")
    return config.split
