"""Taking exact counts of units within groups, ties by unit number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neurograft.core.errors import RequestError, one_of
from neurograft.core.selection import Scores, Selection

PER = ("global", "layer", "site", "row")


def groups(scores: Scores, per: str) -> Tensor:
    """Return the group number of every unit, sites one after another, int64 [total]."""
    one_of(per, PER, what="quota per")
    found, first = [], 0
    layers: dict[int | None, int] = {}
    for name, site in scores.sites.items():
        if per == "global":
            mine = torch.zeros(site.n, dtype=torch.int64)
        elif per == "layer":
            mine = torch.full((site.n,), layers.setdefault(site.layer, len(layers)))
        elif per == "site":
            mine = torch.full((site.n,), first)
        else:
            if site.kind != "weight" or not site.parts or len(site.parts[0].units) != 2:
                raise RequestError(
                    f"per='row' at {name!r}, of kind {site.kind}",
                    expected="units of kind weight",
                    do="use units='weight', or per='site'",
                )
            mine = first + torch.arange(site.n) // site.parts[0].units[1][0]
        found.append(mine)
        first = int(mine.max()) + 1 if per in ("site", "row") else first
    return torch.cat(found)


def quota(n: int, fraction: float | None, count: int | None) -> int:
    """Return how many of a group of n to take: `count`, or `fraction * n` rounded half up, at least one.

    Raises:
        RequestError: neither or both are given, or they are out of range.
    """
    if (fraction is None) == (count is None):
        raise RequestError(
            f"fraction={fraction} and count={count}",
            expected="exactly one of them",
            do="give fraction=0.01 or count=100",
        )
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise RequestError(f"fraction={fraction}", expected="more than 0, at most 1", do="give fraction=0.01")
        return min(n, max(1, int(fraction * n + 0.5)))
    assert count is not None
    if count < 1 or count > n:
        raise RequestError(f"count={count} of {n} units", expected=f"1 to {n}", do="take fewer, or widen the sites")
    return count


def take(
    scores: Scores, key: Tensor, *, fraction: float | None, count: int | None, per: str, rule: dict[str, Any]
) -> Selection:
    """Take in each group the units with the highest `key`, ties by unit number.

    Args:
        scores: give the sites.
        key: float [total], sites one after another.
        fraction: share of each group.
        count: number in each group.
        per: the group.
        rule: provenance.
    """
    if not len(key):
        raise RequestError("scores of no units", expected="at least one site", do="locate again, on wider sites")
    group = groups(scores, per)
    order = key.sort(descending=True, stable=True).indices
    order = order[group[order].sort(stable=True).indices]  # by group, then by key, then by unit number
    sizes = torch.bincount(group)
    chosen, at = [], 0
    for size in sizes.tolist():
        chosen.append(order[at : at + (quota(size, fraction, count) if size else 0)])
        at += size
    return split(scores, torch.cat(chosen).sort().values, {**rule, "per": per, "fraction": fraction, "count": count})


def split(scores: Scores, chosen: Tensor, rule: dict[str, Any]) -> Selection:
    """Return a selection from sorted unit numbers that count over all sites."""
    sizes = [site.n for site in scores.sites.values()]
    ends = torch.tensor([0, *sizes]).cumsum(0)
    at = torch.searchsorted(chosen, ends).tolist()
    ids = {name: chosen[at[i] : at[i + 1]] - ends[i] for i, name in enumerate(scores.sites)}
    return Selection(dict(scores.sites), ids, {**rule, "scores": scores.digest, "located": dict(scores.card)})


def joined(scores: Scores) -> Tensor:
    """Return all scores, sites one after another, float32 [total]."""
    found = [scores.values[name].float() for name in scores.sites]
    return torch.cat(found) if found else torch.empty(0)
