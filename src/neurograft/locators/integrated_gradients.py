"""Attribution that adds up: gradients integrated along the path from silence to the activation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from neurograft.core.card import method
from neurograft.core.context import Context
from neurograft.core.errors import RequestError, one_of
from neurograft.core.selection import Scores
from neurograft.core.taps.stream import means
from neurograft.core.units import Site
from neurograft.locators._common import need_batches
from neurograft.locators._path import Path, of_token, quadrature

RULES, BASELINES = ("midpoint", "right", "trapezoid", "inclusive"), ("zero", "mean", "token")


@method(
    needs={"batches", "labels", "taps", "gradients"},
    takes={"objective", "positions", "target"},
    claims={"finite", "length", "permutes", "planted"},
)
def integrated_gradients(
    context: Context,
    *,
    steps: int = 20,
    rule: str = "midpoint",
    baseline: str = "zero",
    token: int = 0,
    everywhere: bool = False,
    joint: bool = False,
    signed: bool = False,
    over: str = "example",
    multiply: bool = True,
    per_example: bool = False,
) -> Scores:
    """Score each unit by (a - b) * integral over m from 0 to 1 of dF/da at b + m (a - b), summed over tokens.

    The scores of a site add up to F(a) - F(b); by how much they miss it is in the card as `completeness`.
    Memory does not grow with the steps. Scores are means over examples, as for `grad_x_act`.

    Args:
        context: model, sites with taps, batches, loss or target, positions (only these are moved and counted).
        steps: points on the path; each costs a forward and a backward pass.
        rule: of quadrature: "midpoint", "right" (1/k ... 1), "trapezoid", or "inclusive": the plain average over
            k points from 0 to 1, as some published code has it, with an error of its own.
        baseline: b: "zero", each unit's "mean" over the batches, or its activations where every input is `token`.
        token: of baseline="token".
        everywhere: move all positions but padding along the path, and count the ones of `positions` alone, which then
            do not add up.
        joint: all sites at once on one path of gates, `steps` passes in all, where the scores of all sites add
            up together; False takes one site at a time, as published, sites * steps passes.
        signed: keep the sign.
        over: where the absolute value is taken: at each "example", or of the mean over the "data".
        multiply: False leaves (a - b) out: mean gradients, which do not add up.
        per_example: keep the scores of each example, with their sign, beside the means.

    Raises:
        RequestError: no data, no scalar, units without a tap, or fewer steps than the rule needs.
    """
    one_of(rule, RULES, what="rule")
    one_of(baseline, BASELINES, what="baseline")
    one_of(over, ("example", "data"), what="over")
    least = 2 if rule in ("trapezoid", "inclusive") else 1
    if steps < least:
        raise RequestError(f"steps={steps} by the rule {rule}", expected=f"at least {least}", do="leave steps out")
    need_batches(context)
    base = means(context.model, context.sites, context.batches, mask=context.positions) if baseline == "mean" else {}
    way = _Way(quadrature(steps, rule), base, token if baseline == "token" else None, multiply, everywhere)
    sums = _Sums(signed or over == "data", per_example)
    groups = [dict(context.sites)] if joint else [{n: s} for n, s in context.sites.items()]
    with torch.no_grad():  # where every path ends: the model as it is
        ends = [float(context.scalar(batch)) for batch in context.batches]
    card = {
        "all sites" if joint else next(iter(group)): _integrate(context, group, way, sums, ends) for group in groups
    }
    totals = sums.totals
    if over == "data" and not signed:
        totals = {n: v.abs() for n, v in totals.items()}
    worst = max(c["relative_error"] for c in card.values())
    return Scores(
        dict(context.sites),
        {n: totals[n].float() for n in context.sites},
        {"completeness": card, "completeness_error": worst if multiply and not everywhere else None},
        {n: torch.cat(sums.rows[n]) for n in sums.rows},
    )


@dataclass(frozen=True)
class _Way:
    """How a path is gone: its points with their weights, where it begins, what moves and what is multiplied."""

    points: Sequence[tuple[float, float]]
    base: Mapping[str, Tensor]
    token: int | None
    multiply: bool
    everywhere: bool


@dataclass
class _Sums:
    """Scores by site: means over examples, float64 [n], of plain or absolute values; and rows, if they are kept."""

    plain: bool
    keep: bool
    totals: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, name: str, value: Tensor, examples: int) -> None:
        """Take in what examples of one batch got; the scalar is their mean, so each got its share of it."""
        total = examples * (value if self.plain else value.abs()).sum(0).double().cpu()
        self.totals[name] = self.totals[name] + total if name in self.totals else total
        if self.keep:
            self.rows.setdefault(name, []).append(examples * value)


def _integrate(
    context: Context, sites: Mapping[str, Site], way: _Way, sums: _Sums, ends: Sequence[float]
) -> dict[str, float]:
    """Add the scores of some sites on one path; returns how well they add up."""
    gap, due, total, examples = 0.0, 0.0, 0.0, 0
    for batch, end in zip(context.batches, ends):
        base = way.base if way.token is None else of_token(context, sites, batch, way.token)
        path = Path(context, sites, base, batch, way.multiply, way.everywhere)
        for m, weight in way.points:
            path.step(m, weight)
        start = path.value(0.0)
        found = sum(float(v.sum()) for v in path.found.values())
        gap, due, total = gap + abs(found - (end - start)), due + abs(end - start), total + found
        for name, value in path.found.items():
            sums.add(name, value, path.examples)
        examples += path.examples
    for name in sites:
        sums.totals[name] /= examples
    return {"sum": total, "difference": due, "relative_error": gap / due if due > 0 else float(gap > 1e-12)}
