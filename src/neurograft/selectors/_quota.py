"""Taking exact counts of units within groups, ties by unit number."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from neurograft.core.errors import RequestError, one_of
from neurograft.core.selection import Scores, Selection

PER = ("global", "layer", "site", "row")


class Group(NamedTuple):
    """Where a group's units stand in the joined scores; with `rows` above 1, so many groups of one size, in turn."""

    spans: list[slice]
    rows: int

    def read(self, joined: Tensor) -> Tensor:
        """Return the group's numbers, [rows, units]; a view where they stand together."""
        parts = [joined[span] for span in self.spans]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(self.rows, -1)

    def write_(self, joined: Tensor, values: Tensor) -> None:
        """Put numbers [rows, units] back where `read` found them."""
        flat, at = values.reshape(-1), 0
        for span in self.spans:
            joined[span] = flat[at : at + span.stop - span.start]
            at += span.stop - span.start


def groups(scores: Scores, per: str) -> list[Group]:
    """Return the groups in the order of their first units; a site's rows, all of one length, are one entry."""
    one_of(per, PER, what="quota per")
    found: dict[Any, Group] = {}
    first = 0
    for name, site in scores.sites.items():
        rows = 1
        if per == "row":
            if site.kind != "weight" or not site.parts or len(site.parts[0].units) != 2:
                raise RequestError(
                    f"per='row' at {name!r}, of kind {site.kind}",
                    expected="units of kind weight",
                    do="use units='weight', or per='site'",
                )
            rows = site.n // site.parts[0].units[1][0]
        key = {"global": 0, "layer": site.layer}.get(per, name)
        found.setdefault(key, Group([], rows)).spans.append(slice(first, first + site.n))
        first += site.n
    return list(found.values())


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
    chosen = torch.zeros(len(key), dtype=torch.bool)
    for group in groups(scores, per):
        mine = group.read(key)
        if mine.numel():
            group.write_(chosen, highest(mine, quota(mine.shape[1], fraction, count)))
    return split(scores, chosen.nonzero()[:, 0], {**rule, "per": per, "fraction": fraction, "count": count})


def highest(key: Tensor, count: int) -> Tensor:
    """Return a mask of the `count` highest numbers of each row, ties to the lower place, bool [rows, n].

    By the bar they pass, not by sorting: a model's weights are hundreds of millions of numbers, and an order of them
    would be int64.

    Args:
        key: float [rows, n] on the CPU, no NaN.
        count: 0 to n.

    Example:
        >>> highest(torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]]), 1).int().tolist()
        [[0, 1, 0], [1, 0, 0]]
    """
    if not count:
        return torch.zeros_like(key, dtype=torch.bool)
    bar = ranked(key, key.shape[1] - count)
    found = key > bar
    lacking = count - torch.from_numpy(found.numpy().sum(1))  # torch would widen every flag to int64
    ties = (key == bar).nonzero()  # row by row, in order
    row = ties[:, 0]
    before = torch.searchsorted(row, torch.arange(len(key)))  # ties of the rows above
    kept = ties[torch.arange(len(ties)) - before[row] < lacking[row]]
    found[kept[:, 0], kept[:, 1]] = True
    return found


def ranked(key: Tensor, place: int) -> Tensor:
    """Return the number that stands at `place`, from 0 for the lowest, in each row; [rows, 1]."""
    return torch.from_numpy(np.partition(key.numpy(), place, axis=1)[:, place : place + 1].copy())


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
