"""Chance: how much two random sets share, and how many of several trials succeed.

Shape letters: n units, of which one set holds k and another m.
"""

from __future__ import annotations

import math

import torch


def hypergeometric(n: int, k: int, m: int) -> list[float]:
    """Return the chances that two random sets of k and of m out of n units share 0, 1, ..., min(k, m) of them.

    P(b) = C(k, b) C(n - k, m - b) / C(n, m), by logarithms of factorials.

    Example:
        >>> [round(p, 4) for p in hypergeometric(4, 2, 2)]
        [0.1667, 0.6667, 0.1667]
    """
    low = max(0, k + m - n)
    head = [0.0] * low
    whole = _log_choose(n, m)
    return head + [math.exp(_log_choose(k, b) + _log_choose(n - k, m - b) - whole) for b in range(low, min(k, m) + 1)]


def at_least(chances: list[float], b: int) -> float:
    """Return the chance of b or more, given those of 0, 1, 2, ...: the upper tail.

    Example:
        >>> round(at_least(hypergeometric(4, 2, 2), 1), 4)
        0.8333
    """
    return min(1.0, math.fsum(chances[max(0, b) :]))


def binomial(n: int, p: float) -> list[float]:
    """Return the chances that 0, 1, ..., n of n trials succeed, each with chance p.

    Example:
        >>> binomial(2, 0.5)
        [0.25, 0.5, 0.25]
    """
    return [math.comb(n, b) * p**b * (1 - p) ** (n - b) for b in range(n + 1)]


def convolved(a: list[float], b: list[float]) -> list[float]:
    """Return the chances of a sum of two independent counts, given those of 0, 1, 2, ... of each.

    Example:
        >>> convolved([0.5, 0.5], [1.0])
        [0.5, 0.5]
    """
    if min(len(a), len(b)) == 1:
        return [x * y for x in a for y in b]
    x, y = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    size = len(a) + len(b) - 1
    found: list[float] = torch.fft.irfft(torch.fft.rfft(x, size) * torch.fft.rfft(y, size), size).clamp(min=0).tolist()
    return found


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
