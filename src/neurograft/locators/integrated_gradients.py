"""Attribution that adds up: gradients integrated along the path from silence to the activation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from neurograft.core.card import method
from neurograft.core.context import Batch, Context
from neurograft.core.errors import one_of
from neurograft.core.examples import size
from neurograft.core.selection import Scores
from neurograft.core.stream import means
from neurograft.core.tap import change, gradients
from neurograft.core.units import Site
from neurograft.locators._common import backward, need_batches, per_example, scored

RULES, BASELINES = ("midpoint", "right", "trapezoid", "inclusive"), ("zero", "mean")


@method(needs={"batches", "labels", "taps", "gradients"}, claims={"finite", "length", "permutes", "planted"})
def integrated_gradients(
    context: Context,
    *,
    steps: int = 20,
    rule: str = "midpoint",
    baseline: str = "zero",
    joint: bool = False,
    signed: bool = False,
    over: str = "example",
    multiply: bool = True,
) -> Scores:
    """Score each unit by (a - b) * integral over m from 0 to 1 of dF/da at b + m (a - b), summed over tokens.

    The scores of a site add up to F(a) - F(b); by how much they miss it is in the card as `completeness`.
    Memory does not grow with the steps. Scores are means over examples, as for `grad_x_act`.

    Args:
        context: model, sites with taps, batches, loss or target, positions (only these are moved and counted).
        steps: points on the path; each costs a forward and a backward pass.
        rule: of quadrature: "midpoint", "right" (1/k ... 1), "trapezoid", or "inclusive": the plain average over
            k points from 0 to 1, as some published code has it, with an error of its own.
        baseline: b: "zero", or each unit's "mean" over the batches.
        joint: all sites at once on one path of gates, `steps` passes in all, where the scores of all sites add
            up together; False takes one site at a time, as published, sites * steps passes.
        signed: keep the sign.
        over: where the absolute value is taken: at each "example", or of the mean over the "data".
        multiply: False leaves (a - b) out: mean gradients, which do not add up.

    Raises:
        RequestError: no data, no scalar, or units without a tap.
    """
    one_of(rule, RULES, what="rule")
    one_of(baseline, BASELINES, what="baseline")
    one_of(over, ("example", "data"), what="over")
    need_batches(context)
    points = quadrature(steps, rule)
    base = means(context.model, context.sites, context.batches, mask=context.positions) if baseline == "mean" else {}
    groups = [dict(context.sites)] if joint else [{n: s} for n, s in context.sites.items()]
    totals = {n: torch.zeros(s.n, dtype=torch.float64) for n, s in context.sites.items()}
    card: dict[str, Any] = {}
    for group in groups:
        missed = _integrate(context, group, points, base, totals, signed or over == "data", multiply)
        card["all sites" if joint else next(iter(group))] = missed
    if over == "data" and not signed:
        totals = {n: v.abs() for n, v in totals.items()}
    worst = max(c["relative_error"] for c in card.values())
    return scored(context, totals, {"completeness": card, "completeness_error": worst if multiply else None})


def quadrature(steps: int, rule: str) -> list[tuple[float, float]]:
    """Return (point, weight) pairs on [0, 1].

    Example:
        >>> quadrature(2, "midpoint"), quadrature(2, "right")
        ([(0.25, 0.5), (0.75, 0.5)], [(0.5, 0.5), (1.0, 0.5)])
    """
    if rule == "midpoint":
        return [((i + 0.5) / steps, 1 / steps) for i in range(steps)]
    if rule == "right":
        return [((i + 1) / steps, 1 / steps) for i in range(steps)]
    last = max(1, steps - 1)
    if rule == "inclusive":
        return [(i / last, 1 / steps) for i in range(steps)]
    return [(i / last, (0.5 if i in (0, last) else 1.0) / last) for i in range(steps)]


def _integrate(
    context: Context,
    sites: Mapping[str, Site],
    points: Iterable[tuple[float, float]],
    base: Mapping[str, Tensor],
    totals: dict[str, Tensor],
    plain: bool,
    multiply: bool,
) -> dict[str, float]:
    """Add the scores of some sites on one path to `totals`; returns how well they add up."""
    gap, due, sums, examples = 0.0, 0.0, 0.0, 0
    for batch in context.batches:
        path = _Path(context, sites, base, batch, multiply)
        for m, weight in points:
            path.step(m, weight)
        with torch.no_grad():
            end, start = float(context.scalar(batch)), path.value(0.0)
        found = sum(float(v.sum()) for v in path.found.values())
        gap, due, sums = gap + abs(found - (end - start)), due + abs(end - start), sums + found
        for name, value in path.found.items():
            totals[name] += path.examples * (value.sum(0) if plain else value.abs().sum(0)).double().cpu()
        examples += path.examples
    for name in sites:
        totals[name] /= examples
    return {"sum": sums, "difference": due, "relative_error": gap / due if due > 0 else float(gap > 1e-12)}


class _Path:
    """The way from baseline to activation for one batch; `found` holds [examples, n] for each site."""

    def __init__(
        self, context: Context, sites: Mapping[str, Site], base: Mapping[str, Tensor], batch: Batch, multiply: bool
    ) -> None:
        self.context, self.sites, self.base, self.batch = context, sites, base, batch
        self.multiply, self.examples = multiply, size(batch)
        self.found = {n: torch.zeros(self.examples, s.n) for n, s in sites.items()}
        # A module that several layers share is met several times in a pass, and in reverse on the way back.
        self.way: dict[str, list[Tensor]] = {n: [] for n in sites}

    @contextmanager
    def at(self, m: float, *, keep: bool) -> Iterator[None]:
        """Put activations at b + m (a - b), where they count, for a block."""

        def move(name: str, x: Tensor) -> Tensor:
            base = self.base[name].to(x).expand_as(x) if name in self.base else torch.zeros_like(x)
            if keep and self.multiply:
                self.way[name].append((x - base).detach())
            moved = base + m * (x - base)
            assert watch.seen is not None
            kept = watch.seen.mask(self.context.positions)
            if kept is None:
                return moved
            return torch.where(kept.reshape(*kept.shape, *[1] * (x.dim() - kept.dim())), moved, x)

        with change(self.context.model, self.sites, move) as watch:
            yield

    def step(self, m: float, weight: float) -> None:
        """Add one point of the path."""

        def read(name: str, x: Tensor, g: Tensor, rows: Tensor) -> None:
            effect = (g * self.way[name].pop().reshape(g.shape) if self.multiply else g).float()
            effect = effect.sum(-1) if effect.dim() == 3 else effect
            self.found[name] += weight * per_example(effect, rows, self.examples).cpu()

        with self.at(m, keep=True), gradients(self.context.model, self.sites, read, mask=self.context.positions):
            backward(self.context.scalar(self.batch))

    def value(self, m: float) -> float:
        """Return F at a point of the path."""
        with torch.no_grad(), self.at(m, keep=False):
            return float(self.context.scalar(self.batch))
