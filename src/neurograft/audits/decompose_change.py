"""Which neurons a change along a direction goes through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.anatomy.sites import sites
from neurograft.audits._changes import as_change, evaluating
from neurograft.core.card import method
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError
from neurograft.core.kinds import LOWERING
from neurograft.core.prompts.passing import Positions
from neurograft.core.taps.projection import Projection, projected


@method(
    paper="dpo-neurons",
    needs={"batches"},
    departs="Shares are of the sum of all positive drops, as we read the paper's 31.8 %; the net drop is beside it. "
    "What a neuron writes is read in the model whose activation it meets, so the parts sum to the whole change of the "
    "projected FFN outputs even where the down projection was tuned.",
)
def decompose_change(
    model: nn.Module,
    change: object,
    batches: Sequence[Batch],
    *,
    direction: Tensor | None = None,
    positions: Positions = "all",
    top: int = 20,
) -> dict[str, Any]:
    """Split the change of the FFNs' writing along a direction over neurons and the paper's groups, exactly.

    P_i = mean over tokens of a_i * (v_i . w / ||w||), v_i the down projection's vector; dP_i = P_i before - after.

    Args:
        model: the base; left as found.
        change: a graft, grafts, or a tuned model.
        batches: tokens to measure on, such as prompts with the base's continuations.
        direction: w, [d] in the residual stream, such as a probe's weights.
        positions: which tokens count.
        top: how many neurons to list.

    Returns:
        `net` (sum of dP), `positive` (sum of the positive dP), `groups`: name -> `units`, `drop`, `share` of
        `positive`; `neurons`: the largest drops as site, unit, drop; `curve`: how many neurons, largest drops first,
        make 50, 80, 90 and 100 % of `positive`.

    Raises:
        RequestError: no direction, one of another width, or no batches.
    """
    return table(along(model, change, batches, direction=direction, positions=positions), top=top)


def along(
    model: nn.Module,
    change: object,
    batches: Sequence[Batch],
    *,
    direction: Tensor | None,
    positions: Positions = "all",
) -> Projection:
    """Return the measurement itself, from which patches take their groups and values."""
    if direction is None or not batches:
        raise RequestError(
            "no direction" if direction is None else "no batches",
            expected="a direction in the residual stream, and data",
            do="pass direction=, such as the weights of locators.probe at units='channel', at='residual'",
        )
    made, where = as_change(model, change), sites(model, "neuron")
    with evaluating(model, made.tuned):
        return projected(model, made.on(), where, batches, direction, positions=positions)


def table(found: Projection, *, top: int = 20) -> dict[str, Any]:
    """Return a measurement as plain data; see `decompose_change`."""
    drops = found.drop()
    flat = torch.cat([drops[name] for name in found.sites])
    positive = float(flat.clamp(min=0).sum())
    groups = {}
    for name, chosen in found.groups().items():
        drop = float(sum(float(drops[s][ids].sum()) for s, ids in chosen.ids.items()))
        groups[name] = {
            "units": len(chosen),
            "drop": drop,
            "share": drop / positive if positive else 0.0,
            "lowers": name in LOWERING,
        }
    order = flat.sort(descending=True, stable=True)
    reached = order.values.clamp(min=0).cumsum(0)
    enough = {share: share / 100 * positive * (1 - 1e-12) for share in (50, 80, 90, 100)}
    curve = {share: int((reached < least).sum()) + 1 if positive else 0 for share, least in enough.items()}
    places = [(name, i) for name, site in found.sites.items() for i in range(site.n)]
    best = [(*places[int(i)], float(flat[i])) for i in order.indices[:top]]
    return {
        "net": float(flat.sum()),
        "positive": positive,
        "groups": groups,
        "neurons": [{"site": s, "unit": i, "drop": d} for s, i, d in best],
        "curve": curve,
    }
