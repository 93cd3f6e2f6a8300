"""Puts the page together: one HTML file that asks nobody for anything."""

from __future__ import annotations

import math
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from dehvf_ds.report import heatmap, tables
from dehvf_ds.report.charts import Line, line_chart
from dehvf_ds.report.markup import Child, document, tag
from dehvf_ds.report.runs import Evaluation, Points, Run
from dehvf_ds.report.series import smooth

STYLE = Path(__file__).with_name("page.css")

# The browser itself refuses whatever is not in the file.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

TASKS = {"coco": "Captions", "scienceqa": "ScienceQA"}

# Name in metrics.jsonl, title, axis label, and whether the axis begins at zero.
# A gradient norm alone may have spikes of a thousand times its median.
PLAIN_CURVES = (
    ("val/loss", "Validation loss", "loss (nats a token)", False),
    ("eval/CIDEr", "CIDEr inside the run", "CIDEr (x100)", False),
    ("eval/accuracy", "Accuracy inside the run", "accuracy (%)", False),
    ("lr", "Learning rate", "learning rate", True),
    ("samples_per_s", "Speed", "samples / s", True),
    ("train/grad_norm", "Gradient norm before clipping", "global L2 norm", True),
)


def build_page(runs: Sequence[Run]) -> str:
    """The whole page as HTML text.

    Args:
        runs: at least one, in the order of the tables and of the colours.
    """
    title = "Runs: " + ", ".join(run.name for run in runs)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", STYLE.read_text(encoding="utf-8")),
    )
    main = tag(
        "main",
        tag("h1", "Report of 1 run" if len(runs) == 1 else f"Report of {len(runs)} runs"),
        _section("Runs", tables.overview(runs)),
        _section("Settings that differ" if len(runs) > 1 else "Settings", tables.settings_that_differ(runs)),
        _section("Scores", *_scores(runs)),
        _section("Curves", *_curves(runs)),
        _section("Vision levels", *_levels(runs)),
        _section("Examples", *_examples(runs)),
    )
    return document(tag("html", head, tag("body", main), lang="en"))


def _section(title: str, *content: Child) -> Element:
    return tag("section", tag("h2", title), *content)


def _grid(figures: Sequence[Element | None], otherwise: str) -> Element:
    present = [figure for figure in figures if figure is not None]
    return tag("div", *present, class_="grid") if present else tag("p", otherwise)


def _scores(runs: Sequence[Run]) -> list[Child]:
    tasks = dict.fromkeys(e.task for run in runs for e in run.evaluations)
    if not tasks:
        return [tag("p", "No run was evaluated.")]
    found: list[Child] = []
    for task in tasks:
        found += [tag("h3", f"{TASKS.get(task, task)} (x100, higher is better)"), tables.scores(runs, task)]
    return found


def _curves(runs: Sequence[Run]) -> list[Child]:
    figures = [_train_loss(runs)]
    for name, title, label, from_zero in PLAIN_CURVES:
        lines = _lines(runs, lambda run, name=name: run.curve(name))
        spikes = name == "train/grad_norm"
        chart = line_chart(title, lines, x_label="step", y_label=label, from_zero=from_zero, spikes=spikes)
        figures.append(chart)
    without = [run.name for run in runs if not run.curve("val/loss")]
    note = f"Without validation: {', '.join(without)}." if without else None
    return [_grid(figures, "No step was recorded."), tag("p", note, class_="note") if note else None]


def _train_loss(runs: Sequence[Run]) -> Element | None:
    span = max(5, max(len(run.rows) for run in runs) // 25)
    raw = _lines(runs, lambda run: run.curve("train/loss"), faint=True)
    smoothed = _lines(runs, lambda run: smooth(run.curve("train/loss"), span))
    return line_chart(
        "Training loss",
        raw + smoothed,
        x_label="step",
        y_label="loss (nats a token)",
        note=f"Pale: each step. Full: exponential mean over about {span} steps.",
    )


def _lines(runs: Sequence[Run], points: Callable[[Run], Points], faint: bool = False) -> list[Line]:
    return [Line(label=run.name, points=points(run), place=i, faint=faint) for i, run in enumerate(runs)]


def _levels(runs: Sequence[Run]) -> list[Child]:
    recorded = {run.name: run.family("levels/mean") for run in runs}
    maps = {name: found for name, found in recorded.items() if found}
    found: list[Child] = []
    if maps:
        low, high = heatmap.shared_range(list(maps.values()))
        found.append(heatmap.color_bar(low, high))
        found.append(_grid([heatmap.level_map(name, m, low, high) for name, m in maps.items()], ""))
    else:
        found.append(tag("p", "No run recorded its level weights."))
    counts = sorted({len(m[-1][1]) for m in maps.values()})
    uniform = [(math.log(count), f"uniform over {count} levels: {math.log(count):.2f}") for count in counts]
    charts = (
        ("levels/entropy", "Entropy of the level weights", "entropy (nats)", uniform),
        ("visual/gain", "Gain of the visual branch", "Frobenius norm", []),
    )
    figures = []
    for prefix, title, label, levels in charts:
        last = {run.name: run.family(prefix)[-1:] for run in runs}
        lines = _lines(runs, lambda run, last=last: [p for _, row in last[run.name] for p in row.items()])
        steps = ", ".join(f"{name}: step {row[0][0]}" for name, row in last.items() if row)
        figures.append(
            line_chart(
                title,
                lines,
                x_label="LLM layer",
                y_label=label,
                note=f"As last recorded. {steps}.",
                levels=levels,
                from_zero=True,
            )
        )
    if any(figure is not None for figure in figures):
        found.append(_grid(figures, ""))
    return found


def _examples(runs: Sequence[Run]) -> list[Child]:
    found: list[Child] = []
    groups: dict[tuple[str, str, str], list[tuple[Run, Evaluation]]] = {}
    for run in runs:
        for evaluation in run.evaluations:
            groups.setdefault((evaluation.task, evaluation.split, evaluation.data), []).append(
                (run, evaluation)
            )
    titles = Counter((task, split) for task, split, _ in groups)
    for (task, split, _), evaluations in groups.items():
        parts: list[Child] = [tables.examples(evaluations, task), *_sheets(evaluations)]
        if any(part is not None for part in parts):
            # Data of one name are told apart by the evaluation's directory.
            name = split if titles[task, split] == 1 else evaluations[0][1].label
            found += [tag("h3", f"{TASKS.get(task, task)}, {name}"), *parts]
    if inside := [sheet for run in runs if (sheet := _sheet_inside(run)) is not None]:
        found += [tag("h3", "Inside the runs"), *inside]
    return found or [tag("p", "No run has examples.")]


def _sheets(evaluations: Sequence[tuple[Run, Evaluation]]) -> list[Element]:
    """The contact sheets, folded after the first: they show the same pictures."""
    found = []
    for run, evaluation in evaluations:
        if evaluation.sheet:
            title = f"Pictures with the captions of {run.name}; references in grey"
            found.append(_folded(title, evaluation.sheet, is_open=not found))
    return found


def _sheet_inside(run: Run) -> Element | None:
    if run.sample is None:
        return None
    step, sheet = run.sample
    return _folded(f"What {run.name} said at step {step}", sheet)


def _folded(title: str, png: bytes, is_open: bool = False) -> Element:
    source = "data:image/png;base64," + b64encode(png).decode("ascii")
    picture = tag("img", src=source, alt=title)
    return tag("details", tag("summary", title), picture, open="open" if is_open else None)
