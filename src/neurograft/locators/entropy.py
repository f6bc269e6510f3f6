"""Which units few groups of data use."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neurograft.core.card import method
from neurograft.core.context import Context
from neurograft.core.errors import RequestError, one_of
from neurograft.core.selection import Scores
from neurograft.core.taps.rates import rates
from neurograft.locators._common import scored


@method(
    paper="lape-subnetwork",
    kinds={"neuron", "channel", "row"},
    needs={"batches", "groups", "taps"},
    takes={"positions"},
    claims={"finite", "length", "permutes"},
    departs="The entropy is turned into a score in [0, 1], 1 - H / log K; what is dropped is put below it by 2, not "
    "at infinity. Ties at the edge of the selected share go to the lower unit number.",
)
def entropy(
    context: Context, *, group: str | None = None, bar: float = 0.95, fraction: float = 0.02, above: float = 0.0
) -> Scores:
    """Score each unit by how few groups it fires in: 1 - H / log K, H the entropy of its firing rates over K groups.

    Units that no group fires more often than the bar, a percentile of all rates of all units in all groups, get their
    score minus 2. With `group`, so does every unit but that group's own: among the `fraction` of all units with the
    lowest entropy, and above the bar in this group; several groups may own one unit. The groups a unit is compared
    over decide its entropy, so scores hold for one set of groups only, which their card names.

    Args:
        context: model, sites with taps, groups (or batches and contrast, as two), positions.
        group: whose units; None for those of any group.
        bar: the percentile, as a share.
        fraction: of all units, for `group`.
        above: a unit fires where its activation is above this.

    Raises:
        RequestError: fewer than two groups, an unknown one, a share out of range, units without a tap.
    """
    groups = context.by_group()
    if group is not None:
        one_of(group, tuple(groups), what="group")
    for name, value in (("bar", bar), ("fraction", fraction)):
        if not 0 < value <= 1:
            raise RequestError(f"{name}={value}", expected="more than 0, at most 1", do=f"give {name}=0.95 or less")
    found = rates(context.model, context.sites, groups, above=above, positions=context.positions)
    p = torch.cat([found.rate[name] for name in context.sites], 1)
    floor = p.flatten().kthvalue(max(1, round(bar * p.numel()))).values
    score = special(p)
    score = torch.where((p > floor).any(0), score, score - 2)
    if group is not None:
        best = score.sort(descending=True, stable=True).indices[: max(1, round(fraction * p.shape[1]))]
        owned = torch.zeros(p.shape[1], dtype=torch.bool)
        owned[best] = True
        owned &= p[list(groups).index(group)] > floor
        score = torch.where(owned | (score < 0), score, score - 2)
    card = {"pool": dict(zip(found.groups, found.tokens)), "group": group, "bar": float(floor)}
    parts = score.split([context.sites[name].n for name in context.sites])
    return scored(context, dict(zip(context.sites, parts)), card)


def special(p: Tensor) -> Tensor:
    """Return 1 - H / log K of rates [K, n], over p / sum p; 1 for a unit that never fires.

    Example:
        >>> special(torch.tensor([[0.5, 0.2, 0.0], [0.5, 0.0, 0.0]], dtype=torch.float64)).tolist()
        [0.0, 1.0, 1.0]
    """
    q = p / p.sum(0).clamp(min=1e-300)
    return (1 + torch.xlogy(q, q).sum(0) / math.log(len(p))).clamp(min=0.0)
