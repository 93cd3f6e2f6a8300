"""Where an evaluation lies: one directory for each set of terms, found again by the same call."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dehvf_ds.config import EvalConfig, UserError
from dehvf_ds.evals.parts import PARTS, TERMS_NAME, digest_of

MAX_NAME_LENGTH = 80
METRICS_NAME = "metrics.json"

# What may stand in a directory's name on every file system; all letters and digits of all languages may.
_UNFIT = re.compile(r"[^\w.+=@%() -]")


def split_of(config: EvalConfig) -> str:
    """The split's name: the user's, or the last part of where the data really lie.

    Of ``val.2017/`` that is ``val.2017``; of a JSON file it is the name without ``.json``.
    """
    if config.split is not None:
        return config.split
    name = Path(config.data).resolve().name
    return name.removesuffix(".json") if Path(config.data).is_file() else name


def results_directory(config: EvalConfig) -> Path:
    """Where evaluations of the model are written."""
    return Path(config.output) if config.output is not None else Path(config.model) / "eval"


def evaluation_name(task: str, split: str) -> str:
    """``TASK-SPLIT``, fit for one directory's name."""
    fit = _UNFIT.sub("_", split)[:MAX_NAME_LENGTH].strip() or "data"
    return f"{task}-{fit}"


def terms_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """What two evaluations must share to be the same one: their scores then are the same, too.

    Not where model and data lie: a relative path, a link or a moved directory is no other evaluation.

    Args:
        report: what was or will be written as ``metrics.json``.
    """
    terms = {name: report.get(name) for name in ("protocol", "decoding", "num_samples")}
    for name in ("model", "data"):
        described = report.get(name)
        terms[name] = described.get("sha256") if isinstance(described, dict) else None
    return terms


def claim_directory(parent: Path, name: str, report: Mapping[str, Any]) -> tuple[Path, list[str]]:
    """The directory of an evaluation, created and marked as its own, and what the user should read.

    It is ``parent/name``, unless an evaluation of other data, another model or other settings lies there,
    finished or not: then a digest of the terms follows the name. What lies there stays, with one exception:
    where model or data were made anew at the same place, the results of the earlier ones give way.

    Args:
        parent: where the results are written.
        name: of the evaluation, fit for a directory.
        report: what will be written as ``metrics.json``.

    Raises:
        UserError: it cannot be created or read.
    """
    terms = terms_of(report)
    shared = digest_of({**terms, "model": None})[:8]
    names = (name, f"{name}-{shared}", f"{name}-{digest_of(terms)}")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(parent):
            held = {place: _held(parent / place) for place in names}
            place = next((p for p in names if any(terms_of(h) == terms for h in held[p].values())), None)
            # The last one is nobody else's.
            free = (p for p in names if all(_is_outdated(h, report) for h in held[p].values()))
            place = place or next(free, names[-1])
            outdated = [path for path, h in held[place].items() if _is_outdated(h, report)]
            for path in outdated:
                _remove(path)
            mark = parent / place / PARTS.format(digest_of(terms)) / TERMS_NAME
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.write_text(json.dumps(report), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename or parent}: {error.strerror or error}") from None
    notes = []
    if outdated:
        notes.append(f"{parent / place}: results of an earlier model or earlier data are replaced")
    if place != name:
        notes.append(f"{parent / name} is of other data or settings; this evaluation is written to {place}")
    return parent / place, notes


def shards_directory(config: EvalConfig, *sources: Path) -> Path:
    """Where the shards of a published layout are made: a directory for each content, split and pictures.

    Args:
        config: the evaluation.
        sources: the files of the layout.

    Raises:
        UserError: one of them cannot be read.
    """
    try:
        contents = [hashlib.sha256(source.read_bytes()).hexdigest() for source in sources]
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    pictures = str((Path(config.images) if config.images else sources[0].parent).resolve())
    digest = digest_of({"contents": contents, "split": config.split, "pictures": pictures})[:8]
    name = evaluation_name(config.task, split_of(config))
    return results_directory(config) / "shards" / f"{name}-{digest}"


@contextlib.contextmanager
def _one_at_a_time(parent: Path) -> Iterator[None]:
    """Two evaluations that start together must not both find the same place free."""
    with (parent / ".claims").open("w") as lock:
        # Some network file systems have no locks.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _held(directory: Path) -> dict[Path, dict[str, Any]]:
    """What tells of an evaluation here, finished or not, by its file; one that nobody can read says {}."""
    found = {}
    for path in (directory / METRICS_NAME, *directory.glob(PARTS.format("*") + f"/{TERMS_NAME}")):
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
            except ValueError:
                continue  # cut off by what ended its writer
            found[path] = content if isinstance(content, dict) else {}
    return found


def _is_outdated(held: Mapping[str, Any], report: Mapping[str, Any]) -> bool:
    """Whether it is the same evaluation of a model or data that are no more what they were at their place."""
    old, new = terms_of(held), terms_of(report)
    if old == new or any(old[name] != new[name] for name in old if name not in ("model", "data")):
        return False
    return all(
        old[name] == new[name] or _place(held.get(name)) == _place(report[name]) for name in ("model", "data")
    )


def _place(described: Any) -> list[Path] | None:
    """Where a model or data lie, pictures elsewhere included; None where nothing says so."""
    if not isinstance(described, dict) or not isinstance(described.get("path"), str):
        return None
    return [Path(described[name]).resolve() for name in ("path", "images") if described.get(name)]


def _remove(path: Path) -> None:
    """Removes results, or the answers of an evaluation that was not finished."""
    if path.name == METRICS_NAME:
        path.unlink()
    else:
        shutil.rmtree(path.parent)
