"""Numbers on their way to a chart: smoothing, thinning, ticks. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from dehvf_ds.report.runs import Points

Segment = list[tuple[float, float]]


def smooth(points: Points, span: int) -> Points:
    """Exponential mean over about ``span`` steps, free of the bias towards the first value.

    Args:
        points: a None value stays None and counts for nothing.
        span: weights fall by 1 - 2 / (span + 1) a step; 1 changes nothing.

    Returns:
        As many points.
    """
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    found: Points = []
    for step, value in points:
        if value is not None:
            total, weight = keep * total + value, keep * weight + 1
        found.append((step, None if value is None else total / weight))
    return found


def segments(points: Points) -> list[Segment]:
    """Runs of neighbouring points that have a value: a line must not bridge a loss that is not finite."""
    found: list[Segment] = [[]]
    for step, value in points:
        if value is not None:
            found[-1].append((step, value))
        elif found[-1]:
            found.append([])
    return [segment for segment in found if segment]


def thin(segment: Segment, limit: int = 800) -> Segment:
    """At most about ``limit`` points: the lowest and the highest of each stretch, so no spike is lost."""
    if len(segment) <= limit:
        return segment
    size = math.ceil(2 * len(segment) / limit)
    # The ends tell how long a run is.
    kept = {segment[0], segment[-1]}
    for start in range(0, len(segment), size):
        part = segment[start : start + size]
        kept |= {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
    return sorted(kept)


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """About ``count`` round numbers that enclose [low, high], by 1, 2 or 5 times a power of ten.

    Args:
        low: least value to show.
        high: greatest value to show.
        count: how many are wanted.
        whole: whole numbers alone, as for steps.
    """
    if high <= low:
        pad = abs(low) * 0.1
        # What is zero throughout stands on the axis, not in the middle.
        low, high = (low - pad, high + pad) if pad else (0.0, 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    size = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    if whole:
        size = max(1.0, size)
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [i * size for i in range(first, last + 1)]


def has_spikes(values: Sequence[float], times: float = 30.0) -> bool:
    """Whether all are positive and the greatest is so far above the median that it would hide the rest."""
    return bool(values) and min(values) > 0 and max(values) > times * median(values)


def powers(low: float, high: float) -> list[float]:
    """Exponents of the powers of ten that enclose 10 ** low and 10 ** high, about six at most."""
    first, last = math.floor(low + 1e-9), math.ceil(high - 1e-9)
    every = max(1, math.ceil((last - first) / 6))
    return [float(power) for power in range(first, max(last, first + 1) + every, every)]


def number(value: float, digits: int = 4) -> str:
    """A number for a label: few digits, no trailing zeros, e-notation for the very small."""
    if value and abs(value) < 1e-4:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if abs(value) >= 10**digits:
        return f"{value:.0f}" if abs(value) < 1e6 else f"{value:.{digits}g}"
    return f"{value:.{digits}g}"


def spread(total: int, count: int) -> Sequence[int]:
    """``count`` of the indices below ``total``, evenly spaced; all where there are fewer."""
    count = min(count, total)
    return [i * total // count for i in range(count)]
