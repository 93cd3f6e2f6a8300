"""Reads run directories, also of runs that were killed, were never validated or never evaluated."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dehvf_ds.config import UserError

PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"

MAX_SHOWN = 1e100
"""Largest number that is one; a range of numbers beyond has no ticks."""

Points = list[tuple[float, float | None]]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What lies in one ``eval/TASK-SPLIT``.

    Attributes:
        task: ``coco`` or ``scienceqa``.
        split: as the evaluation named it.
        label: the split; of one that shares it with another of its run, the directory's name.
        data: hash of what was evaluated; the directory's name where nothing says so.
        metrics: content of ``metrics.json``.
        predictions: lines of ``predictions.jsonl``, in their order.
        sheet: bytes of ``examples.png``; None where there is none.
    """

    task: str
    split: str
    label: str
    data: str
    metrics: dict[str, Any]
    predictions: list[dict[str, Any]]
    sheet: bytes | None

    def terms(self) -> dict[str, str]:
        """What must be equal in two evaluations for their scores to compare, by dotted name."""
        protocol = self.metrics.get("protocol")
        found = flatten(protocol) if isinstance(protocol, dict) else {}
        # Old evaluations say it in the protocol.
        if isinstance(decoding := self.metrics.get("decoding"), dict):
            found |= flatten(decoding, "decoding.")
        # Old evaluations name no split in the protocol.
        found |= {"task": self.task, "split": self.split}
        data = self.metrics.get("data")
        if isinstance(data, dict):
            found["data.sha256"] = shown(data.get("sha256"))
        found |= {k: shown(self.metrics[k]) for k in ("num_samples", "tokenizer") if k in self.metrics}
        # It changes rounding, not the protocol.
        found.pop("decoding.dtype", None)
        return found


@dataclass(frozen=True, kw_only=True)
class Run:
    """What lies in one run directory.

    Attributes:
        name: short, and no other run's on the page.
        path: as the user gave it.
        settings: of ``config.yaml``, by dotted name.
        rows: of ``metrics.jsonl``, one a step, by rising step.
        evaluations: in the order of their directories' names.
        sample: step and PNG of the last contact sheet that an evaluation inside the run drew.
        notes: what could not be read, a line each.
    """

    name: str
    path: Path
    settings: dict[str, str]
    rows: list[dict[str, Any]]
    evaluations: list[Evaluation]
    sample: tuple[int, bytes] | None
    notes: list[str]

    def curve(self, name: str) -> Points:
        """(step, value) of each step that holds ``name``; the value is None where it is no finite number."""
        return [(row["step"], finite(row[name])) for row in self.rows if name in row]

    def family(self, prefix: str) -> list[tuple[int, dict[int, float]]]:
        """(step, values by number) of each step that recorded ``prefix/NUMBER``, numbers rising."""
        found = []
        for row in self.rows:
            named = {k.removeprefix(prefix + "/"): v for k, v in row.items() if k.startswith(prefix + "/")}
            values = {int(k): finite(v) for k, v in named.items() if k.isdecimal()}
            if kept := {k: v for k, v in sorted(values.items()) if v is not None}:
                found.append((row["step"], kept))
        return found


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads each directory once, in the order given.

    Raises:
        UserError: one of them is no run, or a file in it cannot be read.
    """
    unique: dict[Path, Path] = {}
    for path in paths:
        unique.setdefault(path.resolve(), path)
    found = []
    for resolved, path in unique.items():
        try:
            found.append(load_run(path, _short_name(resolved, list(unique))))
        except OSError as error:
            raise UserError(f"{path}: {error}") from None
    return found


def load_run(path: Path, name: str) -> Run:
    """Reads one run directory.

    Raises:
        UserError: it is no run, or its configuration cannot be read.
    """
    config, metrics = path / "config.yaml", path / "metrics.jsonl"
    if not config.is_file() and not metrics.is_file():
        raise UserError(f"{path}: no run directory: neither config.yaml nor metrics.jsonl lies there")
    notes: list[str] = []
    settings: dict[str, str] = {}
    rows: dict[int, dict[str, Any]] = {}
    if config.is_file():
        settings = _load_settings(config)
    else:
        notes.append("no config.yaml")
    if metrics.is_file():
        for row in _load_lines(metrics, "step", notes):
            # A later line of the same step is the one that counts: the run had gone back.
            if isinstance(row["step"], int) and finite(row["step"]) is not None:
                rows[row["step"]] = row
    else:
        notes.append("no metrics.jsonl: no step was taken")
    evaluations = [
        found
        for directory in sorted((path / "eval").glob("*"))
        if directory.is_dir() and (found := _load_evaluation(directory, notes))
    ]
    counts = Counter((found.task, found.split) for found in evaluations)
    evaluations = [
        replace(found, label=found.split) if counts[found.task, found.split] == 1 else found
        for found in evaluations
    ]
    return Run(
        name=name,
        path=path,
        settings=settings,
        rows=[rows[step] for step in sorted(rows)],
        evaluations=evaluations,
        sample=_load_sample(path / "samples"),
        notes=notes,
    )


def _short_name(path: Path, others: Sequence[Path]) -> str:
    """The directory's name; where others have the same, as much of the path as tells them apart."""
    alike = [other.parent for other in others if other.name == path.name]
    return path.relative_to(os.path.commonpath(alike)).as_posix()


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings by dotted name, each value as text."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = shown(value)
    return found


def differing(columns: Sequence[dict[str, str]]) -> list[str]:
    """Names whose values are not the same in all ``columns``, in their first order."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [name for name in names if len({column.get(name) for column in columns}) > 1]


def shown(value: Any) -> str:
    """A setting as text: texts as they are, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def finite(value: Any) -> float | None:
    """The value as a float; None where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # A whole number may be larger than any float; the rest cannot be drawn.
    return float(value) if abs(value) <= MAX_SHOWN else None


def _load_settings(path: Path) -> dict[str, str]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no settings")
    return flatten(content)


def _load_lines(path: Path, needs: str, notes: list[str]) -> Iterable[dict[str, Any]]:
    """JSON objects that have the key ``needs``; how many lines are none goes into ``notes``."""
    rows, broken = [], 0
    # By "\n" alone: a caption may hold U+2028, at which splitlines() would cut.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and needs in row:
            rows.append(row)
        else:
            broken += 1
    if broken:
        notes.append(f"{path.name}: {broken} unreadable line{'s' if broken > 1 else ''} left out")
    return rows


def _load_evaluation(directory: Path, notes: list[str]) -> Evaluation | None:
    """None where it is not finished: its metrics are written last but for the pictures."""
    path = directory / "metrics.json"
    if not path.is_file():
        # Shards made of a published file lie there, too.
        if any(directory.glob(".answers-*")) or (directory / "predictions.jsonl").is_file():
            notes.append(f"eval/{directory.name}: not finished")
        return None
    try:
        metrics = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError:
        metrics = None
    if not isinstance(metrics, dict):
        notes.append(f"eval/{directory.name}: metrics.json is unreadable")
        return None
    protocol = metrics.get("protocol")
    protocol = protocol if isinstance(protocol, dict) else {}
    task, _, split = directory.name.partition("-")
    data = metrics.get("data")
    digest = data.get("sha256") if isinstance(data, dict) else None
    predictions, sheet = directory / "predictions.jsonl", directory / "examples.png"
    return Evaluation(
        task=str(protocol.get("task", task)),
        split=str(protocol.get("split", split)),
        label=split,
        data=str(digest or directory.name),
        metrics=metrics,
        predictions=list(_load_lines(predictions, "key", notes)) if predictions.is_file() else [],
        sheet=_load_picture(sheet),
    )


def _load_sample(directory: Path) -> tuple[int, bytes] | None:
    steps = {
        int(number): path
        for path in directory.glob("step_*.png")
        if (number := path.stem.removeprefix("step_")).isdecimal()
    }
    # A run that was killed may leave the last one half written.
    for step in sorted(steps, reverse=True):
        if picture := _load_picture(steps[step]):
            return step, picture
    return None


def _load_picture(path: Path) -> bytes | None:
    """A whole PNG, or None."""
    content = path.read_bytes() if path.is_file() else b""
    return content if content.startswith(PNG_START) and content.endswith(PNG_END) else None
