"""Reads run directories, also those of runs that were killed or never evaluated."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from dehvf_ds.config import UserError
from dehvf_ds.data.images import decode_image
from dehvf_ds.data.index import ShardIndex

MAX_SHOWN = 1e100
"""Larger numbers count as not finite: no axis can show them."""

Json = dict[str, object]
Curve = tuple[np.ndarray, np.ndarray]
"""Steps or layers, and values, NaN where they are not finite."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A finished evaluation, read from ``eval/TASK-LABEL``."""

    directory: Path
    metrics: Json
    predictions: dict[int, Json]
    """by line number, which is the row's number in the shards"""

    @property
    def task(self) -> str:
        """``caption``, which was ``coco`` before 0.2, or ``scienceqa``."""
        return self.directory.name.partition("-")[0].replace("coco", "caption")

    @property
    def label(self) -> str:
        """The split, mostly; unique among the run's evaluations of a task."""
        name, _, label = self.directory.name.partition("-")
        is_old = name == "coco" and self.directory.with_name(f"caption-{label}").is_dir()
        return self.directory.name if is_old else label

    @property
    def data(self) -> str:
        """Hash of the evaluated shards, or the directory's name if an old evaluation lacks it."""
        return str(self.part("data").get("sha256") or self.directory.name)

    def part(self, name: str) -> Json:
        """The object of that name in the metrics; {} if there is none."""
        return _mapping(self.metrics.get(name))

    def score(self, name: str) -> float:
        """A metric, a column of ScienceQA, ``parse failures (%)`` or ``loss``; NaN if there is none."""
        others = {"parse failures (%)": self.metrics.get("parse_failure_rate")}
        return finite((self.metrics | self.part("accuracy") | others).get(name))

    def terms(self) -> dict[str, str]:
        """What must be equal for two evaluations' scores to compare, by dotted name."""
        # The dtype changes rounding, not the protocol.
        decoding = {name: value for name, value in self.part("decoding").items() if name != "dtype"}
        # The protocol of an old evaluation has the task's old name.
        protocol = self.part("protocol") | {"task": self.task}
        named = {"split": self.label, **protocol, "data": self.data, "decoding": decoding}
        return flatten(named | {name: self.metrics.get(name) for name in ("num_samples", "tokenizer")})

    def find_shards(self) -> ShardIndex | None:
        """The shards that were evaluated; None if they are gone or have changed."""
        path = self.part("data").get("path")
        # Shards built from published files are beside the evaluations.
        for place in (path, *self.directory.parent.glob("shards/*")):
            try:
                index = ShardIndex(str(place))
            except (UserError, OSError):
                continue
            if index.digest == self.data:
                return index
        return None

    def load_sheet(self) -> Image.Image | None:
        """The contact sheet of some rows."""
        return _load_picture(self.directory / "examples.png")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is read from a run directory."""

    name: str
    """with as much of its path as distinguishes it from the other runs"""
    settings: dict[str, str]
    """by dotted name"""
    rows: dict[int, Json]
    """lines of ``metrics.jsonl`` by rising step"""
    evaluations: list[Evaluation]
    sample: tuple[str, Image.Image] | None
    """file name and content of the last contact sheet of the in-training evaluations"""
    notes: list[str]
    """what could not be read"""

    def curve(self, name: str) -> Curve:
        """The steps that recorded ``name``, and their values."""
        found = [(float(step), finite(row[name])) for step, row in self.rows.items() if name in row]
        steps, values = np.array(found).reshape(-1, 2).T
        return steps, values

    def family(self, name: str) -> tuple[list[int], list[int], np.ndarray]:
        """Numbers and steps of what is recorded as ``NAME/NUMBER``, and the values [numbers, steps]."""
        prefix = f"{name}/"
        recorded: dict[int, dict[int, float]] = {}
        for step, row in self.rows.items():
            named = {key.removeprefix(prefix): row[key] for key in row if key.startswith(prefix)}
            found = {int(number): finite(value) for number, value in named.items() if number.isdecimal()}
            if any(map(math.isfinite, found.values())):
                recorded[step] = found
        numbers = sorted({number for values in recorded.values() for number in values})
        grid = [[values.get(number, math.nan) for values in recorded.values()] for number in numbers]
        return numbers, list(recorded), np.array(grid).reshape(len(numbers), len(recorded))


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads each directory once, in their order."""
    unique: dict[Path, Path] = {}
    for path in paths:
        unique.setdefault(path.resolve(), path)
    found = []
    for resolved, path in unique.items():
        alike = [other.parent for other in unique if other.name == resolved.name]
        name = resolved.relative_to(os.path.commonpath(alike)).as_posix()
        try:
            found.append(_load_run(path, name))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{path}: {error}") from None
    return found


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Nested settings by dotted name, each value as text."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = shown(value)
    return found


def shown(value: object) -> str:
    """A value as text: texts as they are, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def finite(value: object) -> float:
    """The value as a float; NaN if it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    # An integer may be larger than any float.
    return float(value) if abs(value) <= MAX_SHOWN else math.nan


def _load_run(path: Path, name: str) -> Run:
    files = config, metrics = path / "config.yaml", path / "metrics.jsonl"
    notes = [f"no {file.name}" for file in files if not file.is_file()]
    if len(notes) == len(files):
        raise UserError(f"{path}: no run directory: it has neither config.yaml nor metrics.jsonl")
    settings: Json = {}
    if config.is_file():
        with config.open(encoding="utf-8") as file:
            settings = _mapping(yaml.safe_load(file))
    # The last line of a step counts: the run was resumed from an earlier one.
    rows = {
        step: row
        for row in _load_lines(metrics, "step", notes).values()
        if isinstance(step := row["step"], int) and math.isfinite(finite(step))
    }
    directories = sorted(path for path in (path / "eval").glob("*") if path.is_dir())
    # By step, which the names hold with leading zeros.
    sheets = sorted((path / "samples").glob("step_*.png"), reverse=True)
    pictures = ((sheet.name, _load_picture(sheet)) for sheet in sheets)
    return Run(
        name=name,
        settings=flatten({key: settings[key] for key in settings if key not in ("run_dir", "overwrite")}),
        rows=dict(sorted(rows.items())),
        evaluations=[found for directory in directories if (found := _load_evaluation(directory, notes))],
        sample=next(((name, picture) for name, picture in pictures if picture), None),
        notes=notes,
    )


def _load_evaluation(directory: Path, notes: list[str]) -> Evaluation | None:
    """None if it is not finished: its metrics are written last."""
    path, predictions = directory / "metrics.json", directory / "predictions.jsonl"
    if not path.is_file():
        # The directory ``shards`` is no evaluation.
        if any(directory.glob(".answers-*")) or predictions.is_file():
            notes.append(f"eval/{directory.name}: not finished")
        return None
    metrics = _parse(path.read_text(encoding="utf-8", errors="replace"))
    if not metrics:
        notes.append(f"eval/{directory.name}: metrics.json is unreadable")
        return None
    lines = _load_lines(predictions, "key", notes)
    return Evaluation(directory=directory, metrics=metrics, predictions=lines)


def _load_lines(path: Path, needs: str, notes: list[str]) -> dict[int, Json]:
    """JSON objects with the key ``needs``, by line number; ``notes`` counts the unreadable lines."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    # By "\n" alone: a caption may hold U+2028, at which splitlines() would cut.
    lines = [_parse(line) for line in text.split("\n") if line.strip()]
    rows = {number: row for number, row in enumerate(lines) if needs in row}
    if broken := len(lines) - len(rows):
        notes.append(f"{path.name}: {broken} unreadable line{'s' if broken > 1 else ''} left out")
    return rows


def _load_picture(path: Path) -> Image.Image | None:
    """None if there is none, or half of one, as a killed run may leave it."""
    try:
        return decode_image(path.read_bytes()) if path.is_file() else None
    except ValueError:
        return None


def _parse(text: str) -> Json:
    """A JSON object; {} for any other text."""
    try:
        return _mapping(json.loads(text))
    except ValueError:
        return {}


def _mapping(value: object) -> Json:
    return value if isinstance(value, dict) else {}
