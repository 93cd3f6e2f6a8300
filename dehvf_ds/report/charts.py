"""Line charts as inline SVG. Colours and fonts come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from xml.etree.ElementTree import Element

from dehvf_ds.report.markup import tag
from dehvf_ds.report.runs import Points
from dehvf_ds.report.series import has_spikes, number, powers, segments, thin, ticks

NUM_COLORS = 5
# After the colours are used up, the dashes tell runs apart.
DASHES = (None, "7 3", "2 3")

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 72, 28, 34, 44
# A curve of few points, as of validations, has its points marked.
MARK_UP_TO = 40


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve.

    Attributes:
        label: told in the legend; lines of one label are one run's.
        points: (x, value); a line is broken where the value is None.
        place: of the run among the runs: gives colour and dashes.
        faint: drawn thin and pale, without an entry in the legend.
    """

    label: str
    points: Points
    place: int
    faint: bool = False


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    note: str | None = None,
    levels: Sequence[tuple[float, str]] = (),
    from_zero: bool = False,
    spikes: bool = False,
) -> Element | None:
    """A figure with title, legend and chart; None where no line has a value.

    Args:
        title: heading of the figure.
        lines: drawn in their order.
        x_label: with its unit.
        y_label: with its unit.
        note: a line below the legend.
        levels: (value, label) of horizontal lines to compare with.
        from_zero: the value axis begins at zero.
        spikes: the value axis is logarithmic where single values would hide the others; not with ``levels``.
    """
    every = [value for line in lines for _, value in line.points if value is not None]
    logarithmic = spikes and has_spikes(every)
    if logarithmic:
        y_label += ", log scale"
        lines = [replace(line, points=_logarithms(line.points)) for line in lines]
    drawn = [(line, segments(line.points)) for line in lines]
    drawn = [(line, parts) for line, parts in drawn if parts]
    if not drawn:
        return None
    shown = [point for _, parts in drawn for part in parts for point in part]
    xs = [x for x, _ in shown]
    ys = [y for _, y in shown] + [value for value, _ in levels]
    if from_zero and not logarithmic:
        ys.append(0.0)
    enclosing = powers if logarithmic else ticks
    plot = _Plot(min(xs), max(xs), enclosing(min(ys), max(ys)), logarithmic)
    svg = tag(
        "svg",
        *plot.axes(x_label, y_label),
        *(part for value, label in levels for part in plot.level(value, label)),
        *(shape for line, parts in drawn for part in parts for shape in plot.curve(line, part)),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{title}: {y_label} over {x_label}",
    )
    legend = {line.label: line.place for line, _ in drawn}
    return tag(
        "figure",
        tag("h3", title),
        tag("ul", *(_legend_entry(label, place) for label, place in legend.items()), class_="legend"),
        tag("p", note, class_="note") if note else None,
        svg,
    )


@dataclass(frozen=True)
class _Plot:
    """Where values lie in the chart: the x range is the data's, the y range that of its ticks.

    On a logarithmic axis values and ticks are exponents of ten.
    """

    x_low: float
    x_high: float
    y_ticks: list[float]
    logarithmic: bool

    def x(self, value: float) -> float:
        if self.x_high == self.x_low:
            return (LEFT + WIDTH - RIGHT) / 2
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    def axes(self, x_label: str, y_label: str) -> list[Element]:
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        parts = []
        for value in self.y_ticks:
            y = self.y(value)
            parts.append(tag("line", x1=LEFT, x2=right, y1=y, y2=y, class_="rule"))
            text = number(10**value if self.logarithmic else value)
            parts.append(tag("text", text, x=LEFT - 8, y=y + 4, class_="tick", text_anchor="end"))
        inside = [v for v in ticks(self.x_low, self.x_high, 6, True) if self.x_low <= v <= self.x_high]
        # A run of one step has no round number but its own.
        for value in inside or [self.x_low]:
            x = self.x(value)
            parts.append(tag("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"))
            text = number(value, 6)
            parts.append(tag("text", text, x=x, y=bottom + 19, class_="tick", text_anchor="middle"))
        middle = (LEFT + right) / 2
        return [
            *parts,
            tag("line", x1=LEFT, x2=right, y1=bottom, y2=bottom, class_="axis"),
            tag("text", x_label, x=middle, y=HEIGHT - 5, class_="label", text_anchor="middle"),
            # Above the axis, not along it: there it would meet the numbers on a narrow screen.
            tag("text", y_label, x=0, y=15, class_="label"),
        ]

    def level(self, value: float, label: str) -> list[Element]:
        y = self.y(value)
        # Below the line where it lies at the top.
        text_y = y + 13 if y < TOP + 16 else y - 5
        return [
            tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="level"),
            tag("text", label, x=WIDTH - RIGHT - 4, y=text_y, class_="tick", text_anchor="end"),
        ]

    def curve(self, line: Line, part: list[tuple[float, float]]) -> list[Element]:
        style = f"stroke{line.place % NUM_COLORS}" + (" faint" if line.faint else "")
        shown = thin(part)
        places = [(self.x(x), self.y(y)) for x, y in shown]
        found = []
        if len(places) > 1:
            found.append(
                tag(
                    "polyline",
                    points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places),
                    class_=f"curve {style}",
                    stroke_dasharray=_dash(line.place),
                )
            )
        if len(places) == 1 or (len(line.points) <= MARK_UP_TO and not line.faint):
            color = f"fill{line.place % NUM_COLORS}"
            found += [tag("circle", cx=x, cy=y, r=2.6, class_=color) for x, y in places]
        return found


def _logarithms(points: Points) -> Points:
    return [(x, None if value is None else math.log10(value)) for x, value in points]


def _legend_entry(label: str, place: int) -> Element:
    swatch = tag(
        "svg",
        tag(
            "line",
            x1=0,
            x2=28,
            y1=6,
            y2=6,
            class_=f"curve stroke{place % NUM_COLORS}",
            stroke_dasharray=_dash(place),
        ),
        viewBox="0 0 28 12",
        class_="swatch",
        aria_hidden="true",
    )
    return tag("li", swatch, tag("span", label))


def _dash(place: int) -> str | None:
    return DASHES[place // NUM_COLORS % len(DASHES)]
