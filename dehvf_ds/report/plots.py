"""Charts as SVG inside a page: texts stay texts, and the page's style sheet owns the colours."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from markupsafe import Markup, escape
from matplotlib import rc_context, style
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from dehvf_ds.report.runs import Curve

# From matplotlib's defaults on: no file of the user's changes how a report looks.
STYLE = ["default", str(Path(__file__).with_name("plots.mplstyle"))]

# What is drawn in one of these gets the page's variable of that name, which may differ on a dark page.
VARIABLES = {
    **{"#0072b2": "c0", "#d55e00": "c1", "#00855f": "c2", "#b4588f": "c3", "#9a7400": "c4"},
    **{"#1b1d22": "ink", "#565c66": "soft", "#d5d8de": "rule"},
}
COLORS = list(VARIABLES)[:5]
LINE_STYLES = ("solid", "dashed", "dotted")
"""By the names that CSS and matplotlib share: they tell runs apart where the colours are used up."""

MARK_UP_TO = 40
"""A curve of at most so many points, as of validations, has them marked."""
SPIKE = 30
"""Times the median: a greater value would hide the rest."""
MAX_NUMBERED = 10
"""Columns of a map that have room for numbers."""

Axis = Literal["fitted", "from zero", "spiky"]
"""A ``spiky`` one is from zero, or logarithmic where a value is above ``SPIKE`` times the median and all are
positive."""


def line_chart(
    title: str, curves: Sequence[Curve], x_label: str, y_label: str, axis: Axis, smooth_over: int = 1
) -> Markup | None:
    """Draws a curve for each run, coloured by their order; None where no curve has a value.

    No other chart of the page has the same title. ``smooth_over`` is the steps of an exponential mean, which
    is drawn over the pale curve itself.
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
            # A point between two gaps has no line.
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

    ``weights`` [blocks, steps] holds NaN where there is none; the scale goes from dark at ``low`` to bright.
    """
    with style.context(STYLE):
        figure = Figure(figsize=(6.8, 0.8 + 0.32 * len(blocks)))
        axes = figure.add_subplot(xlabel="step", title="feature layer (block of the vision tower)")
        axes.imshow(weights, vmin=low, vmax=high)
        # As many steps as have room, always with the last.
        labelled = range(len(steps) - 1, -1, -math.ceil(len(steps) / 8))
        axes.set_xticks(labelled, [str(steps[i]) for i in labelled])
        axes.set_yticks(range(len(blocks)), [str(block) for block in blocks])
        for (row, column), weight in np.ndenumerate(weights):
            if len(steps) <= MAX_NUMBERED and np.isfinite(weight):
                ink = "black" if weight > (low + high) / 2 else "white"
                axes.text(column, row, f"{weight:.3f}", color=ink, ha="center", va="center")
        return _svg(figure, title)


def smooth(values: np.ndarray, span: int) -> np.ndarray:
    """Exponential mean over about ``span`` steps, free of the bias towards the first value.

    Weights fall by 1 - 2 / (span + 1) a step: a span of 1 changes nothing. A NaN stays NaN and counts for
    nothing.
    """
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
    # HTML needs no namespaces, and no ids but those that something refers to.
    drawn = re.sub(r'<g id="[^"]*"', "<g", drawn.replace("xlink:", ""))
    # Tenths of a point: more digits only make the page longer.
    drawn = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), drawn)
    for color, name in VARIABLES.items():
        drawn = drawn.replace(color, f"var(--{name})")
    return Markup(f'<svg {view[0]} role="img" aria-label="{escape(title)}">{drawn}')
