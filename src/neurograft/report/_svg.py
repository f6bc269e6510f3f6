"""Drawing: scales, ticks, axes and shapes as SVG text; colours are the page's CSS classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from neurograft.report._fit import wide
from neurograft.report.words import number

WIDTH = 360
Scale = Callable[[float], float]


def scale(low: float, high: float, start: float, end: float) -> Scale:
    """Return the straight line from [low, high] to [start, end].

    Example:
        >>> scale(0, 10, 100, 0)(2.5)
        75.0
    """
    span = high - low or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return round numbers between two ends.

    Example:
        >>> ticks(-0.013, 0.052)
        [0.0, 0.02, 0.04]
    """
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, last + 1)]


def fitted(at: Scale, low: float, high: float) -> list[float]:
    """Return round numbers between two ends, no more than find room side by side.

    Example:
        >>> fitted(scale(0, 1, 0, 300), 0, 1), fitted(scale(0, 1, 0, 100), 0, 1)
        ([0.0, 0.25, 0.5, 0.75, 1.0], [0.0, 0.5, 1.0])
    """
    for count in (4, 3, 2, 1):
        found = ticks(low, high, count)
        room = min((at(b) - at(a) for a, b in pairwise(found)), default=math.inf)
        if max((6.4 * wide(number(t)) for t in found), default=0.0) + 6 <= room:
            return found
    return found


def padded(values: Sequence[float]) -> tuple[float, float]:
    """Return ends that hold 0 and all values, with some room."""
    found = [0.0, *(v for v in values if v is not None and math.isfinite(v))]
    low, high = min(found), max(found)
    room = (high - low) * 0.08 or 1.0  # where all is 0 an axis of 1 says so; one of 1e-10 would not
    return (low - room if low < 0 else low), high + room


def f(value: float) -> str:
    """Return a coordinate in few characters."""
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """Draw a line."""
    return f'<line x1="{f(x1)}" y1="{f(y1)}" x2="{f(x2)}" y2="{f(y2)}" class="{kind}"/>'


def rect(x: float, y: float, width: float, height: float, kind: str) -> str:
    """Draw a rectangle; nothing if it has no size."""
    if width <= 0 or height <= 0:
        return ""
    return f'<rect x="{f(x)}" y="{f(y)}" width="{f(width)}" height="{f(height)}" class="{kind}"/>'


def dot(x: float, y: float, r: float, kind: str, *, title: str = "") -> str:
    """Draw a dot, with a title for pointers and screen readers."""
    inner = f"<title>{escape(title)}</title>" if title else ""
    return f'<circle cx="{f(x)}" cy="{f(y)}" r="{f(r)}" class="{kind}">{inner}</circle>'


def words(x: float, y: float, text: str, kind: str = "t", *, anchor: str = "start") -> str:
    """Write text."""
    return f'<text x="{f(x)}" y="{f(y)}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def path(points: Sequence[tuple[float, float]], kind: str) -> str:
    """Draw a line through points."""
    return f'<path d="M{"L".join(f"{f(x)} {f(y)}" for x, y in points)}" class="{kind}"/>' if points else ""


def drawing(body: Sequence[str], height: float, *, title: str, width: float = WIDTH) -> str:
    """Return a picture with its description."""
    return f'<svg viewBox="0 0 {f(width)} {f(height)}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg>'


def titled(shape: str, title: str) -> str:
    """Return a shape with a title for pointers."""
    return f"<g><title>{escape(title)}</title>{shape}</g>"


def x_axis(
    at: Scale, low: float, high: float, y: float, top: float, label: str, *, middle: float, gap: float = 14
) -> list[str]:
    """Draw gridlines, numbers and the name of a horizontal axis."""
    found = []
    for tick in fitted(at, low, high):
        found += [line(at(tick), top, at(tick), y, "zero" if tick == 0 else "grid")]
        found += [words(at(tick), y + gap, number(tick), "t s", anchor="middle")]
    return [*found, words(middle, y + gap + 15, label, "t s", anchor="middle")]


def y_room(low: float, high: float, least: float) -> float:
    """Return the room that the numbers of a vertical axis take on its left, at least so much.

    Example:
        >>> y_room(0, 1, 44), round(y_room(0, 0.0005, 44))
        (44, 51)
    """
    return max(least, 13 + 6.4 * max((wide(number(tick)) for tick in ticks(low, high)), default=0))


def y_axis(at: Scale, low: float, high: float, x: float, right: float) -> list[str]:
    """Draw gridlines and numbers of a vertical axis."""
    found = []
    for tick in ticks(low, high):
        found += [line(x, at(tick), right, at(tick), "zero" if tick == 0 else "grid")]
        found += [words(x - 5, at(tick) + 4, number(tick), "t s", anchor="end")]
    return found


def low_end(change: Mapping[str, Any]) -> float:
    """Return the lower end of an interval; the value where there is none."""
    return float(change["value"] if change.get("low") is None else change["low"])


def high_end(change: Mapping[str, Any]) -> float:
    """Return the upper end of an interval; the value where there is none."""
    return float(change["value"] if change.get("high") is None else change["high"])
