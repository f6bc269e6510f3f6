"""How large a unit's weights are."""

from __future__ import annotations

import torch

from neurograft.core.card import method
from neurograft.core.context import Context
from neurograft.core.errors import one_of
from neurograft.core.selection import Scores
from neurograft.core.units import Parameters
from neurograft.locators._common import scored
from neurograft.locators._parts import numbers, owners, view

NORMS = ("l2", "l1", "mean", "max")


@method(claims={"finite", "length", "permutes"})
def magnitude(context: Context, *, norm: str = "l2") -> Scores:
    """Score each unit by the size of the numbers it owns, over all its parts.

    Args:
        context: model and sites; no data is used.
        norm: "l2" the Euclidean norm, "l1" the sum of absolute values, "mean" their mean, "max" the largest.

    Raises:
        RequestError: units that own no weights.
    """
    one_of(norm, NORMS, what="norm")
    parameters = Parameters.of(context.model).by_name
    totals = {name: torch.zeros(site.n, dtype=torch.float64) for name, site in context.sites.items()}
    for param, found in owners(context.sites, context.model).items():
        weight = parameters[param].detach()
        for name, part in found:
            mine = view(part, weight)
            if norm == "max":
                totals[name] = torch.maximum(totals[name], mine.abs().amax((1, 2)).double().cpu())
            else:
                sized = mine.float().square() if norm == "l2" else mine.float().abs()
                totals[name] += sized.sum((1, 2)).double().cpu()
    if norm == "l2":
        totals = {n: v.sqrt() for n, v in totals.items()}
    elif norm == "mean":
        totals = {n: v / numbers(context.sites[n]) for n, v in totals.items()}
    return scored(context, totals)
