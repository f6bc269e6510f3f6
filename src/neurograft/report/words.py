"""Numbers and lists in words."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

FEW = 8
HEX = re.compile(r"[0-9a-f]{16,}")
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


def counted(count: int, name: str) -> str:
    """Return how many there are of something.

    Example:
        >>> counted(1, "item"), counted(1200, "item")
        ('1 item', '1,200 items')
    """
    return f"{count:,} {name}{'' if count == 1 else 's'}"


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
    """Return a value with its unit and interval.

    Example:
        >>> signed_interval({"value": 0.5, "low": None}, "nats per token", "95 %")
        '+0.5 nats per token (no interval)'
    """
    ends = "no interval" if found.get("low") is None else f"{level} interval {interval(found, sign=sign)}"
    return f"{' '.join(filter(None, (number(found['value'], sign=sign), unit)))} ({ends})"


def told(value: Any) -> str:
    """Return plain data in words: digests cut, paths by their last part, long lists as their length, no empty values.

    Example:
        >>> told({"rule": "top", "count": None, "scores": "0123456789abcdef01", "of": {"n": 3, "ids": [1] * 9}})
        'rule top, scores 0123456789ab, of (n 3, ids 9)'
        >>> told("/home/me/base"), told([1, 2])
        ('base', '1, 2')
    """
    if isinstance(value, Mapping):
        parts = ((k, f"({told(v)})" if isinstance(v, Mapping) else told(v)) for k, v in value.items())
        return ", ".join(f"{k} {v}" for k, v in parts if v not in ("", "()"))
    if isinstance(value, (list, tuple)):
        return ", ".join(told(v) for v in value) if len(value) <= FEW else str(len(value))
    text = "" if value is None else str(value)
    if HEX.fullmatch(text):
        return text[:12]
    return PurePath(text).name if PurePath(text).is_absolute() else text


def listed(names: Sequence[str]) -> str:
    """Return names as a list in a sentence.

    Example:
        >>> listed(["a", "b", "c"])
        'a, b and c'
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
