"""Geometry of the report's charts, in the units of their viewBox; the template draws them."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT = 380, 220
LEFT, RIGHT, TOP, BOTTOM = 62, 372, 12, 184
"""Edges of the plotting area."""

LEVELS = 12
"""Shades of an image."""


class Tick(NamedTuple):
    """A position on an axis and its label."""

    at: float
    label: str


class Dot(NamedTuple):
    """A data point and what its tooltip says."""

    x: float
    y: float
    text: str
    bad: bool


class Line(NamedTuple):
    """A line chart over outer steps."""

    points: str
    dots: list[Dot]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


class Bar(NamedTuple):
    """A bar of a histogram, standing on the axis."""

    x: float
    y: float
    width: float
    height: float
    text: str
    marked: bool


class Histogram(NamedTuple):
    """Bars over an interval."""

    bars: list[Bar]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    mark: float | None


class Image(NamedTuple):
    """Pixels as one SVG path for each shade: (opacity, path)."""

    width: int
    height: int
    shades: list[tuple[float, str]]


def line(values: Sequence[float | None], texts: list[str], bad: list[bool], *, log: bool) -> Line:
    """Values against the steps 1, 2, ...; missing ones, and with `log` those not positive, are left out."""
    shown = [
        (step, float(value))
        for step, value in enumerate(values, 1)
        if value is not None and math.isfinite(value) and (value > 0 or not log)
    ]
    low, high = min(v for _, v in shown), max(v for _, v in shown)
    ticks = log_ticks(low, high) if log else linear_ticks(low, high)
    warp = math.log10 if log else float
    bottom, top = min(warp(low), warp(ticks[0])), max(warp(high), warp(ticks[-1]))
    last = max(len(values), 2)
    dots = [
        Dot(
            _scale(step, 1, last, LEFT + 8, RIGHT - 8),
            _scale(warp(value), bottom, top, BOTTOM, TOP),
            texts[step - 1],
            bad[step - 1],
        )
        for step, value in shown
    ]
    steps = range(1, last + 1, max(round(last / 5), 1))
    return Line(
        " ".join(f"{dot.x},{dot.y}" for dot in dots),
        dots,
        [Tick(_scale(step, 1, last, LEFT + 8, RIGHT - 8), str(step)) for step in steps],
        [
            Tick(_scale(warp(v), bottom, top, BOTTOM, TOP), label)
            for v, label in zip(ticks, labels(ticks, log=log), strict=True)
        ],
    )


def histogram(values: np.ndarray, mark: float | None, bins: int = 20) -> Histogram:
    """Counts of values between 0 and 1; bars below the mark are suspects."""
    counts, edges = np.histogram(np.clip(values, 0, 1), bins=bins, range=(0, 1))
    ticks = linear_ticks(0, max(int(counts.max()), 1))
    top = max(ticks[-1], counts.max())
    bars = []
    for count, low, high in zip(counts.tolist(), edges[:-1], edges[1:], strict=True):
        x, end = _scale(low, 0, 1, LEFT, RIGHT), _scale(high, 0, 1, LEFT, RIGHT)
        y = _scale(count, 0, top, BOTTOM, TOP)
        text = f"{count} examples with a weight from {low:.2f} to {high:.2f}"
        marked = mark is not None and high <= mark + 1e-9
        bars.append(Bar(x + 1, y, round(end - x - 2, 1), round(BOTTOM - y, 1), text, marked))
    return Histogram(
        bars,
        [Tick(_scale(v, 0, 1, LEFT, RIGHT), short(v)) for v in (0, 0.25, 0.5, 0.75, 1)],
        [Tick(_scale(v, 0, top, BOTTOM, TOP), short(v)) for v in ticks],
        None if mark is None else _scale(mark, 0, 1, LEFT, RIGHT),
    )


def image(values: np.ndarray, low: float, high: float) -> Image:
    """A two-dimensional array as shades; `low` is blank, `high` is full ink."""
    span = high - low if high > low else 1.0
    level = np.rint(LEVELS * np.clip((values - low) / span, 0, 1)).astype(int)
    shades = []
    for shade in range(1, LEVELS + 1):
        path = "".join(f"M{x} {y}h1v1h-1z" for y, x in np.argwhere(level == shade))
        if path:
            shades.append((round(shade / LEVELS, 3), path))
    return Image(values.shape[1], values.shape[0], shades)


def pixel_shape(features: list[str]) -> tuple[int, int] | None:
    """(rows, columns) where the features are `pixel_i_j`, row by row; None for anything else."""
    found = [re.fullmatch(r"pixel_(\d{1,4})_(\d{1,4})", name) for name in features]
    places = [(int(m[1]), int(m[2])) for m in found if m is not None]
    if not places or len(places) != len(features):
        return None
    rows, columns = (max(place[i] for place in places) + 1 for i in (0, 1))
    return (rows, columns) if places == list(np.ndindex(rows, columns)) else None


def linear_ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose the interval."""
    span = high - low
    if not span > 1e-12 * max(abs(low), abs(high)):
        span = abs(high) or 1.0
        low, high = low - span / 10, high + span / 10
        span = high - low
    unit = 10.0 ** math.floor(math.log10(span / 4))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= span / 4 * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 15) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """At most six powers of ten that enclose the interval, or 1, 2 and 5 times them where it is short."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if high < 8 * low:
        marks = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
        above = sum(mark <= low for mark in marks)
        below = sum(mark < high for mark in marks)
        return marks[above - 1 : max(below, above) + 1]
    last = max(last, first + 1)
    stride = -(-(last - first) // 5)
    return [10.0**i for i in range(first, last + stride, stride)]


def labels(ticks: list[float], *, log: bool) -> list[str]:
    """The fewest digits, from four, that tell the ticks apart; equally many decimals on a linear axis."""
    found = []
    for digits in range(4, 17):
        found = [short(tick, digits) for tick in ticks]
        if len(set(found)) == len(found):
            break
    if log or any("e" in text for text in found):
        return found
    decimals = max(len(text.partition(".")[2]) for text in found)
    return [f"{tick:.{decimals}f}" for tick in ticks]


def short(value: float, digits: int = 4) -> str:
    """A number in few digits, in plain notation where that is short."""
    return f"{value:.{digits}g}".replace("e-0", "e-").replace("e+0", "e")


def _scale(value: float, low: float, high: float, start: float, end: float) -> float:
    return round(float(start + (value - low) / (high - low) * (end - start)), 1)
