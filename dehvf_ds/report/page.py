"""The page of a report: one HTML file that loads nothing else (``page.html.j2``); its charts are SVG."""

from __future__ import annotations

import io
import math
import re
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Literal

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib import rc_context, style
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image

from dehvf_ds.data.examples import read_sample
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.shards import DamagedSample
from dehvf_ds.evaluation.coco import CAPTION_METRICS
from dehvf_ds.evaluation.scienceqa import COLUMNS
from dehvf_ds.report.runs import Curve, Evaluation, Json, Run, finite, shown

NONE = "—"
NUM_EXAMPLES = 8
PICTURE_SIDE = 160
MIN_RANGE = 0.02
"""Smaller differences of layer weights are noise, and must not fill the whole scale."""

HEADINGS = {"caption": "Captions", "scienceqa": "ScienceQA"}
SCORES = (*CAPTION_METRICS, *COLUMNS, "parse failures (%)", "loss")

# Counts in metrics.json of rows that weaken a score, and what they count.
WEAK_ROWS = {
    "num_empty": "empty captions, which are scored",
    "num_image_missing": "pictures missing",
    "num_unreadable": "pictures that could not be read, which count as empty answers",
}

Axis = Literal["fitted", "from zero", "spiky"]
"""``spiky`` starts at zero, or is logarithmic if all values are positive and one is far above the median."""

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
"""Likewise, what is recorded for each layer of the language model; axes start at zero."""

# From matplotlib's defaults on: no file of the user's changes how a report looks.
STYLE = ["default", str(Path(__file__).with_name("plots.mplstyle"))]

# Colours that become variables of the page's style sheet, which a dark page sets otherwise.
VARIABLES = {
    **{"#0072b2": "c0", "#d55e00": "c1", "#00855f": "c2", "#b4588f": "c3", "#9a7400": "c4"},
    **{"#1b1d22": "ink", "#565c66": "soft", "#d5d8de": "rule"},
}
COLORS = list(VARIABLES)[:5]
LINE_STYLES = ("solid", "dashed", "dotted")
"""For more runs than colours, by the names that CSS and matplotlib share."""

MARK_UP_TO = 40
"""Curves of at most so many points, as of validations, have them marked."""
SPIKE = 30
"""Times the median: a greater value would hide the rest."""
MAX_NUMBERED = 10
"""Columns of a map that have room for numbers."""


def build_page(runs: Sequence[Run]) -> str:
    """The whole page as HTML text, in the order of the runs."""
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
        maps={run: layer_map(f"Feature layers of {run}", *w, low, high) for run, w in weights.items()},
        uniform={len(blocks): math.log(len(blocks)) for blocks, _, _ in weights.values()},
        layers={title: chart for title, chart in layers.items() if chart},
        outdated=[run.name for run in runs if run.family("levels/mean")[1]],
        examples=_examples(runs),
    )


def _overview(run: Run) -> dict[str, str]:
    """The run's row of the first table, by column."""
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
    """Rows of what differs, with each column's value, and rows of what is the same."""
    differing, same = [], []
    for name in dict.fromkeys(name for column in columns for name in column):
        values = [column.get(name, NONE) for column in columns]
        if len(set(values)) == 1:
            same.append([name, values[0]])
        else:
            # A hash is cut short.
            differing.append([name, *(v[:12] + "…" if len(v) == 64 and " " not in v else v for v in values)])
    return differing, same


def _scores(runs: Sequence[Run], task: str) -> dict[str, object]:
    """A row for each evaluation of ``task``, and what keeps the rows from being compared."""
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
        "title": f"{HEADINGS.get(task, task)} (x100, higher is better)",
        "columns": columns,
        "rows": rows,
        "notes": notes,
        "labels": [f"{name}, {e.label}" for name, e in found],
        "differing": _compare([e.terms() for _, e in found])[0],
    }


def _examples(runs: Sequence[Run]) -> list[dict[str, object]]:
    """A group for each data set, since equal keys of different data are different rows."""
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
                "title": f"{HEADINGS.get(task, task)}, {label}",
                "truth": "references" if task == "caption" else "right",
                "rows": _example_rows(named, shards),
                "has_pictures": shards is not None,
                "sheets": [] if shards else [(name, sheet) for name, e in named if (sheet := e.load_sheet())],
            }
        )
    return found


def _example_rows(
    evaluations: Sequence[tuple[str, Evaluation]], shards: ShardIndex | None
) -> list[tuple[str, Image.Image | None, list[tuple[str, Json]]]]:
    """Evenly spread rows of the first evaluation: key, picture, and each evaluation's line."""
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
    """A row's picture, small; None if the row has none, or it cannot be read."""
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
    """An answer as text, or the letter of a choice."""
    if isinstance(value, int) and 0 <= value < len(ascii_uppercase):
        return ascii_uppercase[value]
    return NONE if value in (None, "") else shown(value)


def _rounded(value: object, decimals: int) -> str:
    number = finite(value)
    return f"{number:.{decimals}f}" if math.isfinite(number) else NONE


# --- charts ---


def line_chart(
    title: str, curves: Sequence[Curve], x_label: str, y_label: str, axis: Axis, smooth_over: int = 1
) -> Markup | None:
    """Draws a curve for each run, coloured by their order; None if no curve has a value.

    The title is unique on the page. ``smooth_over`` is the span in steps of an exponential mean, which is
    drawn over the pale curve.
    """
    every = np.concatenate([values for _, values in curves])
    every = every[np.isfinite(every)]
    if not every.size:
        return None
    with style.context(STYLE):
        figure = Figure(figsize=(6.8, 3.5))
        axes = figure.add_subplot(xlabel=x_label, title=y_label)
        for place, (x, values) in enumerate(curves):
            color = COLORS[place % len(COLORS)]
            if smooth_over > 1:
                axes.plot(x, values, color=color, linewidth=0.8, alpha=0.35, zorder=1)
            y = smooth(values, smooth_over)
            gap = np.r_[True, ~np.isfinite(y), True]
            # A point between two gaps would not show.
            marked = np.full(len(x), True) if len(x) <= MARK_UP_TO else gap[:-2] & gap[2:]
            line_style = LINE_STYLES[place // len(COLORS) % len(LINE_STYLES)]
            axes.plot(x, y, color=color, linestyle=line_style, marker="o", markersize=4, markevery=marked)
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        if axis == "spiky" and every.min() > 0 and every.max() > SPIKE * np.median(every):
            axes.set_title(f"{y_label}, log scale")
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(numticks=6))
            axes.yaxis.set_minor_locator(NullLocator())
        elif axis != "fitted":
            axes.set_ylim(bottom=min(0, every.min()))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_major_formatter("{x:.5g}")
        return _svg(figure, title)


def layer_map(
    title: str, blocks: Sequence[int], steps: Sequence[int], weights: np.ndarray, low: float, high: float
) -> Markup:
    """A heat map: rows are feature layers, the deepest on top; columns are the steps that recorded them.

    ``weights`` is [blocks, steps], NaN where there is none.
    """
    with style.context(STYLE):
        figure = Figure(figsize=(6.8, 0.8 + 0.32 * len(blocks)))
        axes = figure.add_subplot(xlabel="step", title="feature layer (block of the vision tower)")
        axes.imshow(weights, vmin=low, vmax=high)
        # As many as there is room for, always with the last.
        labelled = range(len(steps) - 1, -1, -math.ceil(len(steps) / 8))
        axes.set_xticks(labelled, [str(steps[i]) for i in labelled])
        axes.set_yticks(range(len(blocks)), [str(block) for block in blocks])
        for (row, column), weight in np.ndenumerate(weights):
            if len(steps) <= MAX_NUMBERED and np.isfinite(weight):
                ink = "black" if weight > (low + high) / 2 else "white"
                axes.text(column, row, f"{weight:.3f}", color=ink, ha="center", va="center")
        return _svg(figure, title)


def smooth(values: np.ndarray, span: int) -> np.ndarray:
    """Exponential mean over about ``span`` steps, unbiased at the start; NaN stays NaN and has no weight."""
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    found = np.full_like(values, np.nan)
    for i in np.flatnonzero(np.isfinite(values)):
        total, weight = keep * total + values[i], keep * weight + 1
        found[i] = total / weight
    return found


def _svg(figure: Figure, title: str) -> Markup:
    """An element for an HTML page; equal figures are equal bytes."""
    content = io.BytesIO()
    # Salted with the title, no id of one chart is also another's.
    with rc_context({"svg.hashsalt": title}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(content, format="svg", transparent=True, metadata=metadata)
    head, _, drawn = content.getvalue().decode().partition("<svg ")[2].partition(">")
    view = re.search(r'viewBox="[^"]*"', head)
    assert view is not None
    # HTML needs no namespaces, and only those ids that something refers to.
    drawn = re.sub(r'<g id="[^"]*"', "<g", drawn.replace("xlink:", ""))
    # Tenths of a point: more digits only make the page longer.
    drawn = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), drawn)
    for color, name in VARIABLES.items():
        drawn = drawn.replace(color, f"var(--{name})")
    return Markup(f'<svg {view[0]} role="img" aria-label="{escape(title)}">{drawn}')
