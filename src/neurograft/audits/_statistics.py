"""Intervals for paired changes: a seeded bootstrap over items, Student's t, Holm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from neurograft.core.seeds import generator

NORMAL = NormalDist()
GRID = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, *(i / 10 for i in range(1, 10)))
PROBABILITIES = (*GRID, 0.95, 0.975, 0.99, 0.995, 0.9975, 0.999, 0.9995)
CHUNK = 1 << 22
MANY = 1000


def t_cdf(t: float, df: int) -> float:
    """Return P(T <= t) for Student's t with `df` degrees of freedom; a finite sum, exact for whole numbers.

    Example:
        >>> round(t_cdf(2.0, 1), 6), round(t_cdf(0.0, 7), 6)
        (0.852416, 0.5)
    """
    if df > MANY:
        return NORMAL.cdf(t * (1 - 1 / (4 * df)) / math.sqrt(1 + t * t / (2 * df)))
    theta = math.atan(t / math.sqrt(df))
    sine, square = math.sin(theta), math.cos(theta) ** 2
    term, total = (math.cos(theta), 0.0) if df % 2 else (1.0, 0.0)
    for k in range(2 + df % 2, df + 1, 2):
        total += term
        term *= square * (k - 1) / k
    inside = (theta + sine * total) * 2 / math.pi if df % 2 else sine * total
    return (1 + inside) / 2


def t_quantile(p: float, df: int) -> float:
    """Return the t with P(T <= t) = p, by bisection.

    Example:
        >>> round(t_quantile(0.975, 7), 4)
        2.3646
    """
    if p < 0.5:
        return -t_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p and high < 1e12:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def resampled(
    columns: Tensor, statistic: Callable[[Tensor], Tensor], *, draws: int, seed: int, name: str = ""
) -> Tensor:
    """Return a statistic of summed columns over items drawn with replacement.

    Args:
        columns: one row of sums per item, float64 [n, m].
        statistic: summed columns [b, m] -> [b].
        draws: number of draws.
        seed: with `name`, names the draws.
        name: tells two resamplings with one seed apart.

    Returns:
        float64 [draws].
    """
    n = len(columns)
    rng, found = generator(seed, "bootstrap", name), []
    step = max(1, CHUNK // n)
    for start in range(0, draws, step):
        b = min(step, draws - start)
        drawn = torch.randint(n, (b, n), generator=rng)
        counts = torch.zeros(b, n, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        found.append(statistic(counts @ columns))
    return torch.cat(found)


def ratio(sums: Tensor) -> Tensor:
    """Return the first summed column divided by the second."""
    return sums[:, 0] / sums[:, 1]


def estimate(
    columns: Tensor,
    statistic: Callable[[Tensor], Tensor] = ratio,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    name: str = "",
) -> dict[str, Any]:
    """Return a statistic of all items with its bootstrap interval.

    The interval is the percentile one, widened so that its normal-theory length is that of Student's t with
    n - 1 degrees of freedom (the "expanded" percentile interval of Hesterberg): plain percentiles are too short
    for few items. A single item has no interval.

    Returns:
        `value`, `low`, `high` (None where there is none), `level`, `n` items, and `quantiles` of the draws at
        `PROBABILITIES`, from which `interval` and `p_above` answer for other levels and limits.

    Example:
        >>> x = torch.tensor([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]], dtype=torch.float64)
        >>> estimate(x)["value"]
        2.0
    """
    n, value = len(columns), float(statistic(columns.sum(0, keepdim=True))[0])
    found: dict[str, Any] = {"value": value, "low": None, "high": None, "level": level, "n": n, "quantiles": None}
    if n < 2:
        return found
    drawn = resampled(columns, statistic, draws=draws, seed=seed, name=name).sort().values
    tail = expanded((1 - level) / 2, n)
    found["low"], found["high"] = (float(drawn.quantile(q)) for q in (tail, 1 - tail))
    found["quantiles"] = drawn.quantile(torch.tensor(PROBABILITIES, dtype=torch.float64)).tolist()
    return found


def expanded(tail: float, n: int) -> float:
    """Return the tail of the bootstrap distribution of n items that stands for a tail of the estimate."""
    return NORMAL.cdf(-math.sqrt(n / (n - 1)) * t_quantile(1 - tail, n - 1))


def p_above(found: Mapping[str, Any], limit: float) -> float:
    """Return how surprising the estimate would be if the true value were `limit` or less (one-sided).

    It is at most a exactly where the lower end of the interval with tail a lies above `limit`.
    """
    if found["quantiles"] is None:
        return 1.0
    return _shrunk(_below(found["quantiles"], limit), found["n"])


def _below(quantiles: Sequence[float], limit: float) -> float:
    """Return the share of the draws at or below a limit, between the known quantiles on the normal scale."""
    if limit < quantiles[0]:
        return PROBABILITIES[0] / 2
    if limit >= quantiles[-1]:
        return 1 - PROBABILITIES[0] / 2
    above = next(i for i, q in enumerate(quantiles) if q > limit)
    left, right = quantiles[above - 1], quantiles[above]
    z = [NORMAL.inv_cdf(p) for p in (PROBABILITIES[above - 1], PROBABILITIES[above])]
    return NORMAL.cdf(z[0] + (z[1] - z[0]) * (limit - left) / (right - left))


def _shrunk(raw: float, n: int) -> float:
    return t_cdf(NORMAL.inv_cdf(raw) * math.sqrt((n - 1) / n), n - 1)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Return p-values adjusted for looking at several at once (Holm's step-down).

    Example:
        >>> {k: round(v, 3) for k, v in holm({"a": 0.01, "b": 0.04, "c": 0.03}).items()}
        {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    found, worst = {}, 0.0
    for i, name in enumerate(sorted(p, key=lambda k: (p[k], k))):
        worst = max(worst, min(1.0, (len(p) - i) * p[name]))
        found[name] = worst
    return {name: found[name] for name in p}


def predicted(values: Sequence[float], *, tail: float) -> tuple[float, float]:
    """Return the mean of some draws, and how far above it one more draw stays but for a chance of `tail`.

    t(1 - tail, k - 1) * sd * sqrt(1 + 1/k), the one-sided prediction limit for a normal population.

    Example:
        >>> [round(x, 4) for x in predicted([1.0, 2.0, 3.0], tail=0.05)]
        [2.0, 3.3717]
    """
    k = len(values)
    mean = sum(values) / k if k else 0.0
    if k < 2:
        return mean, 0.0
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (k - 1))
    return mean, t_quantile(1 - tail, k - 1) * spread * math.sqrt(1 + 1 / k)
