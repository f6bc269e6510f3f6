"""Making text fit: its width, cut in the middle, labels moved apart."""

from __future__ import annotations

from collections.abc import Sequence
from unicodedata import combining, east_asian_width


def wide(text: str) -> int:
    """Return how many columns a text takes: two for a Chinese, Japanese or Korean sign, none for a combining mark.

    Example:
        >>> wide("abc"), wide("日本語")
        (3, 6)
    """
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def shortened(text: str, limit: int) -> str:
    """Return a text cut in the middle, in at most so many columns.

    Example:
        >>> shortened("a long name of something", 11), shortened("日本語の質問です", 9)
        ('a lon…thing', '日本…です')
    """
    if wide(text) <= limit:
        return text
    half = (limit - 1) // 2
    first, last = limit - 1 - half, half
    start = next(i for i in range(len(text), -1, -1) if wide(text[:i]) <= first)
    end = next(i for i in range(len(text) + 1) if wide(text[i:]) <= last)
    return f"{text[:start]}…{text[end:]}"


def spread(places: Sequence[float], low: float, high: float, gap: float) -> list[float]:
    """Return places moved apart to at least a gap, between two ends, in their order; closer where they do not fit.

    Example:
        >>> spread([10, 2, 10], 0, 12, 4)
        [8, 2, 12]
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    gap = min(gap, (high - low) / max(1, len(places) - 1))
    found, last = [0.0] * len(places), low - gap
    for i in order:
        found[i] = last = max(min(places[i], high), last + gap)
    last = high + gap
    for i in reversed(order):
        found[i] = last = min(found[i], last - gap)
    return found
