"""How far a unit has moved."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from neurograft.core.card import method
from neurograft.core.context import Context
from neurograft.core.errors import RequestError, one_of
from neurograft.core.grafts.graft import Graft
from neurograft.core.selection import Scores
from neurograft.core.units import Parameters
from neurograft.locators._common import scored
from neurograft.locators._parts import numbers, owners, view

NORMS = ("mean_abs", "l2", "relative")


@method(paper="layernorm-key", needs={"against"}, takes={"against"}, claims={"finite", "length", "permutes"})
def change(context: Context, *, norm: str = "mean_abs") -> Scores:
    """Score each unit by how far its weights are from those of another model or under a graft: d = theta' - theta.

    The normalisation decides the answer: norms' weights move most per entry and little relative to their size,
    which is near 1.

    Args:
        context: model, sites; `against` the other model, its parameters by name, or a graft of this one.
        norm: "mean_abs" mean |d| per entry, "l2" ||d||, "relative" ||d|| / ||theta||.

    Raises:
        RequestError: `against` is neither, a parameter has another shape there, or units own no weights.
    """
    one_of(norm, NORMS, what="norm")
    found, here = owners(context.sites, context.model), Parameters.of(context.model).by_name
    moved = {n: torch.zeros(s.n, dtype=torch.float64) for n, s in context.sites.items()}
    sizes = {n: torch.zeros(s.n, dtype=torch.float64) for n, s in context.sites.items()}
    # A graft is written over the numbers it is compared with.
    base = {n: here[n].detach().clone() if isinstance(context.against, Graft) else here[n].detach() for n in found}
    with ExitStack() as stack:
        other = _other(context, stack)
        for name, pairs in found.items():
            if name not in other or other[name].shape != base[name].shape:
                raise RequestError(
                    f"another model without a {name} of shape {tuple(base[name].shape)}",
                    expected="a tuned version of this model",
                    do="compare models of one architecture",
                )
            d = other[name].detach().to(base[name].device).double() - base[name].double()
            for site, part in pairs:
                mine = view(part, d)
                moved[site] += (mine.abs() if norm == "mean_abs" else mine.square()).sum((1, 2)).cpu()
                if norm == "relative":
                    sizes[site] += view(part, base[name].double()).square().sum((1, 2)).cpu()
    if norm == "mean_abs":
        return scored(context, {n: v / numbers(context.sites[n]) for n, v in moved.items()})
    if norm == "l2":
        return scored(context, {n: v.sqrt() for n, v in moved.items()})
    return scored(context, {n: v.sqrt() / sizes[n].sqrt().clamp(min=1e-30) for n, v in moved.items()})


def _other(context: Context, stack: ExitStack) -> dict[str, Tensor]:
    if isinstance(context.against, Graft):
        stack.enter_context(context.against.on(context.model))
        return dict(Parameters.of(context.model).by_name)
    if isinstance(context.against, nn.Module):
        return dict(Parameters.of(context.against).by_name)
    if isinstance(context.against, Mapping):
        return dict(context.against)
    raise RequestError(
        f"against={type(context.against).__name__}", expected="a model or a graft", do="pass against=tuned model"
    )
