"""The correlation of two tables of weights over scenarios, beside what tables that know nothing would reach."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neurograft.audits._statistics import estimate
from neurograft.core.seeds import generator


def standardised(x: Tensor) -> Tensor:
    """Return each row of [S, K] with mean 0 and deviation 1; a flat row says nothing and becomes zeros.

    Example:
        >>> standardised(torch.tensor([[1.0, 3.0], [2.0, 2.0]])).tolist()
        [[-1.0, 1.0], [0.0, 0.0]]
    """
    if not x.numel():
        return x
    centred = x - x.mean(1, keepdim=True)
    spread = centred.square().mean(1, keepdim=True).sqrt()
    return torch.where(spread > 1e-9, centred / spread.clamp(min=1e-9), torch.zeros_like(x))


def agreement(
    x: Tensor, y: Tensor, *, controls: int = 1000, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Return Pearson's r of all entries of two float64 tables [S, K], and its controls.

    Args:
        x: reported.
        y: measured.
        controls: how often the rows of `x` are handed out to other scenarios.
        level: of the intervals, from a bootstrap over scenarios.
        draws: of the bootstrap.
        seed: names shuffles and draws.

    Returns:
        `r`, `shuffled`, `profile_mean`, `above_mean` and `scenarios`; None for those where fewer than two scenarios
        are left.

    Example:
        >>> found = agreement(torch.eye(6).double(), torch.eye(6).double(), controls=100)
        >>> round(found["r"]["value"], 6), found["shuffled"]["mean"] < 0.1, abs(found["profile_mean"]["value"]) < 1e-6
        (1.0, True, True)
    """
    if len(x) < 2:
        return {"r": None, "shuffled": None, "profile_mean": None, "above_mean": None, "scenarios": len(x)}
    mean = x.mean(0, keepdim=True).expand_as(x)
    options: dict[str, Any] = {"level": level, "draws": draws, "seed": seed, "name": "self_report"}
    own, other = _sums(x, y), _sums(mean, y)
    r = float(_pearson(own.sum(0, keepdim=True))[0])
    rng = generator(seed, "self_report", "shuffled")
    orders = [torch.randperm(len(x), generator=rng) for _ in range(controls)]
    chance = torch.stack([_pearson(_sums(x[o], y).sum(0, keepdim=True))[0] for o in orders])
    return {
        "r": _estimate(own, _pearson, options),
        "shuffled": {
            "mean": float(chance.mean()),
            "limit": float(chance.quantile(level)),
            "p": float((1 + (chance >= r).sum()) / (1 + controls)),
        },
        "profile_mean": _estimate(other, _pearson, options),
        "above_mean": _estimate(torch.cat([own, other], 1), lambda s: _pearson(s[:, :6]) - _pearson(s[:, 6:]), options),
        "scenarios": len(x),
    }


def _estimate(columns: Tensor, statistic: Any, options: dict[str, Any]) -> dict[str, Any]:
    found = estimate(columns, statistic, **options)
    return {k: v for k, v in found.items() if k != "quantiles"}


def _sums(x: Tensor, y: Tensor) -> Tensor:
    """Return what r is made of, summed over each row, float64 [S, 6]."""
    terms = (torch.ones_like(x), x, y, x * y, x * x, y * y)
    return torch.stack([t.double().sum(1) for t in terms], 1)


def _pearson(sums: Tensor) -> Tensor:
    """Return r of summed terms [b, 6]; 0 where a side does not vary, since it then tells nothing."""
    n, x, y, xy, xx, yy = sums.unbind(1)
    spread = ((xx - x * x / n) * (yy - y * y / n)).clamp(min=0).sqrt()
    return torch.where(spread > 1e-9, (xy - x * y / n) / spread.clamp(min=1e-9), torch.zeros_like(xy))
