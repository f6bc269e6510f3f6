"""Numbers and lists in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


def number(value: float | None, *, digits: int = 3, sign: bool = False) -> str:
    """Return a number in few digits.

    Example:
        >>> number(0.012345), number(-0.5, sign=True), number(0.0), number(1234567.0), number(3e-7)
        ('0.0123', '−0.5', '0', '1,234,567', '3e−7')
    """
    if value is None or math.isnan(value):
        return DASH
    size = abs(value)
    if math.isinf(value):
        text = "∞"
    elif size == 0:
        return "0"
    elif size < 1e-4:
        mantissa, exponent = f"{size:.{digits - 1}e}".split("e")
        text = f"{float(mantissa):g}e{MINUS}{abs(int(exponent))}"
    elif size >= 1000:
        text = f"{round(size):,}"
    else:
        places = max(0, digits - 1 - math.floor(math.log10(size)))
        text = f"{size:.{places}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    return (MINUS if value < 0 else "+" if sign else "") + text


def interval(found: Mapping[str, Any], *, sign: bool = True) -> str:
    """Return the ends of an interval.

    Example:
        >>> interval({"low": -0.1, "high": 0.2})
        '−0.1 to +0.2'
    """
    if found.get("low") is None:
        return "no interval"
    return f"{number(found['low'], sign=sign)} to {number(found['high'], sign=sign)}"


def signed_interval(found: Mapping[str, Any], unit: str, level: str, *, sign: bool = True) -> str:
    """Return a value with its unit and interval."""
    return f"{number(found['value'], sign=sign)} {unit} ({level} interval {interval(found, sign=sign)})"


def listed(names: Sequence[str]) -> str:
    """Return names as a list in a sentence.

    Example:
        >>> listed(["a", "b", "c"])
        'a, b and c'
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
