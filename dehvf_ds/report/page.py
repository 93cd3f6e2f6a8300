"""Puts the page together: one HTML file that asks nobody for anything. ``page.html.j2`` is its layout."""

from __future__ import annotations

import io
import math
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from dehvf_ds.data.examples import read_sample
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.shards import DamagedSample
from dehvf_ds.evaluation.coco import CAPTION_METRICS
from dehvf_ds.evaluation.scienceqa import COLUMNS
from dehvf_ds.report.plots import COLORS, LINE_STYLES, Axis, layer_map, line_chart
from dehvf_ds.report.runs import Evaluation, Json, Run, finite, shown

NONE = "—"
NUM_EXAMPLES = 8
PICTURE_SIDE = 160
MIN_RANGE = 0.02
"""Smaller differences of layer weights are noise and must not fill the whole scale."""

TASKS = {"coco": "Captions", "scienceqa": "ScienceQA"}
SCORES = (*CAPTION_METRICS, *COLUMNS, "parse failures (%)", "loss")

# Of rows that count but say little: number in metrics.json, and what it counts.
WEAK_ROWS = {
    "num_empty": "empty captions, which are scored",
    "num_image_missing": "pictures missing",
    "num_unreadable": "pictures that could not be read, which count as empty answers",
}

CURVES: tuple[tuple[str, str, str, Axis], ...] = (
    ("train/loss", "Training loss", "loss (nats a token)", "fitted"),
    ("val/loss", "Validation loss", "loss (nats a token)", "fitted"),
    ("eval/CIDEr", "CIDEr in training", "CIDEr (x100)", "fitted"),
    ("eval/accuracy", "Accuracy in training", "accuracy (%)", "fitted"),
    ("lr", "Learning rate", "learning rate", "from zero"),
    ("samples_per_s", "Speed", "samples / s", "from zero"),
    ("train/grad_norm", "Gradient norm before clipping", "global L2 norm", "spiky"),
)
"""Name in metrics.jsonl, title, and label and kind of the value axis."""

LAYERS: tuple[tuple[str, str, str], ...] = (
    ("router/entropy", "Entropy of the feature layers' weights", "entropy (nats)"),
    ("visual/scale", "Scale of the visual branch", "Frobenius norm"),
)
"""As ``CURVES``: what is recorded for each layer of the language model, from zero."""


def build_page(runs: Sequence[Run]) -> str:
    """The whole page as HTML text; tables and colours go by the order of the runs."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"answer": _answer, "rounded": _rounded, "data_uri": _data_uri}
    span = max(5, max(len(run.rows) for run in runs) // 25)
    curves, layers = {}, {}
    for name, title, label, axis in CURVES:
        smooth_over = span if name == "train/loss" else 1
        curves[title] = line_chart(title, [run.curve(name) for run in runs], "step", label, axis, smooth_over)
    for name, title, label in LAYERS:
        families = [run.family(name) for run in runs]
        last = [(np.array(numbers), grid[:, -1:].ravel()) for numbers, _, grid in families]
        layers[title] = line_chart(title, last, "LLM layer", label, "from zero")
    tasks = dict.fromkeys(e.task for run in runs for e in run.evaluations)
    weights = {run.name: found for run in runs if (found := run.family("router/mean"))[1]}
    every = np.concatenate([grid.ravel() for _, _, grid in weights.values()] or [np.zeros(1)])
    low, high = np.nanmin(every), max(np.nanmax(every), np.nanmin(every) + MIN_RANGE)
    overview = [_overview(run) for run in runs]
    return environment.get_template("page.html.j2").render(
        runs=runs,
        names=[run.name for run in runs],
        looks=[(i % len(COLORS), LINE_STYLES[i // len(COLORS) % len(LINE_STYLES)]) for i in range(len(runs))],
        columns=list(overview[0]),
        overview=[list(row.values()) for row in overview],
        settings=_compare([run.settings for run in runs]),
        scores=[_scores(runs, task) for task in tasks],
        span=span,
        curves={title: chart for title, chart in curves.items() if chart},
        scale=(low, high),
        maps={
            name: layer_map(f"Feature layers of {name}", *found, low, high) for name, found in weights.items()
        },
        uniform={len(blocks): math.log(len(blocks)) for blocks, _, _ in weights.values()},
        layers={title: chart for title, chart in layers.items() if chart},
        examples=_examples(runs),
    )


def _overview(run: Run) -> dict[str, str]:
    """The run's row of the first table: a name, numbers, and remarks."""
    losses, speeds = (run.curve(name)[1] for name in ("train/loss", "samples_per_s"))
    known = losses[np.isfinite(losses)]
    validated = [
        (value, step) for step, value in zip(*run.curve("val/loss"), strict=True) if math.isfinite(value)
    ]
    step, last = next(reversed(run.rows.items()), (0, {}))
    remarks = list(run.notes)
    if len(known) < len(losses):
        remarks.append(f"{len(losses) - len(known)} steps with a loss that is not finite")
    if finite(last.get("skipped")) > 0:
        remarks.append(f"{last['skipped']} steps skipped")
    return {
        "run": run.name,
        "steps": str(step),
        "samples": shown(last.get("samples", NONE)),
        "last train loss": _rounded(known[-1] if known.size else None, 4),
        "best val loss": "{:.4f} (step {:.0f})".format(*min(validated)) if validated else NONE,
        "median samples/s": f"{np.nanmedian(speeds):.3g}" if np.isfinite(speeds).any() else NONE,
        "remarks": "; ".join(remarks) or NONE,
    }


def _compare(columns: Sequence[dict[str, str]]) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of what differs, with each column's value, and of what is the same, with its value."""
    differing, same = [], []
    for name in dict.fromkeys(name for column in columns for name in column):
        values = [column.get(name, NONE) for column in columns]
        if len(set(values)) == 1:
            same.append([name, values[0]])
        else:
            # Of a hash the head is enough.
            differing.append([name, *(v[:12] + "…" if len(v) == 64 and " " not in v else v for v in values)])
    return differing, same


def _scores(runs: Sequence[Run], task: str) -> dict[str, object]:
    """A row an evaluation of ``task``, and what keeps the rows from being compared."""
    found = [(run.name, e) for run in runs for e in run.evaluations if e.task == task]
    columns = [name for name in SCORES if any(math.isfinite(e.score(name)) for _, e in found)]
    rows, notes = [], []
    for name, e in found:
        mark = "" if e.metrics.get("comparable", True) else " †"
        scores = [_rounded(e.score(column), 4 if column == "loss" else 2) for column in columns]
        rows.append([name + mark, e.label, *scores, shown(e.metrics.get("num_samples", NONE))])
        counts = {text: finite(e.metrics.get(key)) for key, text in WEAK_ROWS.items()}
        reasons = [f"{text}: {count:.0f}" for text, count in counts.items() if count > 0]
        reasons += [f"without {metric}: {reason}" for metric, reason in e.part("missing").items()]
        notes += [f"{name}, {e.label}: {reason}" for reason in reasons]
    return {
        "title": f"{TASKS.get(task, task)} (x100, higher is better)",
        "columns": columns,
        "rows": rows,
        "notes": notes,
        "labels": [f"{name}, {e.label}" for name, e in found],
        "differing": _compare([e.terms() for _, e in found])[0],
    }


def _examples(runs: Sequence[Run]) -> list[dict[str, object]]:
    """A group for each data set: keys of other data may be the same, and are other rows."""
    groups: dict[tuple[str, str], list[tuple[str, Evaluation]]] = {}
    for run in runs:
        for e in run.evaluations:
            if e.predictions:
                groups.setdefault((e.task, e.data), []).append((run.name, e))
    found = []
    for (task, _), evaluations in groups.items():
        label = evaluations[0][1].label
        named = [(name if e.label == label else f"{name}, {e.label}", e) for name, e in evaluations]
        shards = next(filter(None, (e.find_shards() for _, e in evaluations)), None)
        found.append(
            {
                "title": f"{TASKS.get(task, task)}, {label}",
                "truth": "references" if task == "coco" else "right",
                "rows": _example_rows(named, shards),
                "has_pictures": shards is not None,
                # They show the same rows.
                "sheets": [] if shards else [(name, sheet) for name, e in named if (sheet := e.load_sheet())],
            }
        )
    return found


def _example_rows(
    evaluations: Sequence[tuple[str, Evaluation]], shards: ShardIndex | None
) -> list[tuple[str, Image.Image | None, list[tuple[str, Json]]]]:
    """Rows spread evenly over the first evaluation's: key, picture, and each evaluation's line."""
    numbers = list(evaluations[0][1].predictions)
    count = min(NUM_EXAMPLES, len(numbers))
    found = []
    for number in (numbers[i * len(numbers) // count] for i in range(count)):
        lines = [(name, e.predictions[number]) for name, e in evaluations if number in e.predictions]
        key = shown(lines[0][1]["key"])
        same = [(name, line) for name, line in lines if shown(line["key"]) == key]
        found.append((key, _picture(shards, number, key) if shards else None, same))
    return found


def _picture(shards: ShardIndex, number: int, key: str) -> Image.Image | None:
    """A row's picture, small; None where the row has none that can be read."""
    try:
        sample = read_sample(shards, number, shorter_side=PICTURE_SIDE)
    except (DamagedSample, IndexError):
        return None
    if sample.image is None or sample.key != key:
        return None
    sample.image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return sample.image


def _data_uri(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=80)
    return "data:image/jpeg;base64," + b64encode(content.getvalue()).decode("ascii")


def _answer(value: object) -> str:
    """An answer as text; the letter of a choice, as the problem shows it, from its number."""
    if isinstance(value, int) and 0 <= value < len(ascii_uppercase):
        return ascii_uppercase[value]
    return NONE if value in (None, "") else shown(value)


def _rounded(value: object, decimals: int) -> str:
    number = finite(value)
    return f"{number:.{decimals}f}" if math.isfinite(number) else NONE
