"""The level-weight map: how much each vision level counted, as training went on."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from dehvf_ds.report.markup import tag
from dehvf_ds.report.series import number, spread

# Cividis, which reads the same with any colour vision (Nuñez, Anderton and Renslow 2018).
CIVIDIS = ("#00224e", "#35456c", "#666970", "#948e77", "#c8b866", "#fee838")

WIDTH = 560
LEFT, RIGHT, TOP, ROW, BOTTOM = 72, 28, 26, 26, 44
MAX_COLUMNS = 120
# Narrower cells hold no number.
MIN_NUMBER_WIDTH = 36
# Differences below this are noise and must not fill the whole scale.
MIN_RANGE = 0.02

Recorded = list[tuple[int, dict[int, float]]]


def shared_range(maps: Sequence[Recorded]) -> tuple[float, float]:
    """Least and greatest weight of all maps, that their colours mean the same."""
    every = [value for recorded in maps for _, values in recorded for value in values.values()]
    low, high = min(every), max(every)
    pad = max(0.0, MIN_RANGE - (high - low)) / 2
    return low - pad, high + pad


def level_map(title: str, recorded: Recorded, low: float, high: float) -> Element:
    """A figure: rows are vision levels, the deepest on top; columns are the steps that recorded them.

    Args:
        title: heading of the figure.
        recorded: (step, mean weight by block of the vision tower), at least one.
        low: weight at the dark end of the scale.
        high: weight at the bright end.
    """
    columns = [recorded[i] for i in spread(len(recorded), MAX_COLUMNS)]
    # The last recorded step is the one that a reader looks for.
    columns[-1] = recorded[-1]
    blocks = sorted({block for _, values in columns for block in values}, reverse=True)
    cell_width = (WIDTH - LEFT - RIGHT) / len(columns)
    bottom = TOP + ROW * len(blocks)
    shapes: list[Element] = []
    for i, (step, values) in enumerate(columns):
        for j, block in enumerate(blocks):
            if block in values:
                place = (LEFT + i * cell_width, TOP + float(j * ROW), cell_width)
                shapes += _cell(place, values[block], f"step {step}, level {block}", low, high)
    for j, block in enumerate(blocks):
        y = TOP + (j + 0.5) * ROW + 4
        shapes.append(tag("text", block, x=LEFT - 8, y=y, class_="tick", text_anchor="end"))
    for i in _labelled(len(columns), cell_width):
        x = LEFT + (i + 0.5) * cell_width
        shapes.append(tag("text", columns[i][0], x=x, y=bottom + 19, class_="tick", text_anchor="middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    shapes.append(tag("text", "step", x=middle, y=bottom + 39, class_="label", text_anchor="middle"))
    shapes.append(tag("text", "level (block)", x=0, y=15, class_="label"))
    height = bottom + BOTTOM
    svg = tag(
        "svg",
        *shapes,
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
        aria_label=f"{title}: mean weight of each vision level over the steps",
    )
    return tag("figure", tag("h3", title), svg)


def color_bar(low: float, high: float) -> Element:
    """The scale of the maps: colours with the weights at both ends and in the middle."""
    swatches = [
        tag("i", style=f"background:{color_of(i / 23, 0.0, 1.0)}", aria_hidden="true") for i in range(24)
    ]
    labels = [tag("span", f"{value:.3f}") for value in (low, (low + high) / 2, high)]
    return tag(
        "div",
        tag("span", "mean weight over the LLM layers"),
        tag("div", tag("div", *swatches, class_="bar"), tag("div", *labels, class_="ends")),
        class_="scale",
    )


def color_of(value: float, low: float, high: float) -> str:
    """The colour of a weight, between dark blue and yellow."""
    place = min(1.0, max(0.0, (value - low) / (high - low))) * (len(CIVIDIS) - 1)
    index = min(int(place), len(CIVIDIS) - 2)
    pair = zip(_rgb(CIVIDIS[index]), _rgb(CIVIDIS[index + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - index)):02x}" for a, b in pair)


def _cell(
    place: tuple[float, float, float], value: float, where: str, low: float, high: float
) -> list[Element]:
    x, y, width = place
    color = color_of(value, low, high)
    # A hair wider than its share: no seams show between cells.
    cell = tag(
        "rect",
        tag("title", f"{where}: {number(value)}"),
        x=x,
        y=y,
        width=width + 0.2,
        height=ROW,
        fill=color,
    )
    if width < MIN_NUMBER_WIDTH:
        return [cell]
    red, green, blue = _rgb(color)
    ink = "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else "#fff"
    text = tag("text", f"{value:.3f}", x=x + width / 2, y=y + ROW / 2 + 4, fill=ink, class_="value")
    return [cell, text]


def _labelled(count: int, cell_width: float) -> list[int]:
    """Columns whose step is written: as many as have room, always with the last."""
    every = max(1, -int(-48 // cell_width))
    return list(range(count - 1, -1, -every))


def _rgb(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)
