"""Whether weights that were found on one model still tell two sets apart in another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from neurograft.audits._changes import evaluating
from neurograft.core.card import method
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError, one_of
from neurograft.core.seeds import generator
from neurograft.core.selection import Scores
from neurograft.core.taps.cett import shares
from neurograft.core.taps.table import auroc, table


@method(paper="h-neurons", needs={"batches", "contrast", "taps"})
def readout(
    model: nn.Module,
    weights: Scores,
    batches: Sequence[Batch],
    contrast: Sequence[Batch],
    *,
    pool: str = "answer",
    statistic: str = "cett",
    controls: int = 20,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure how well frozen probe weights tell two sets apart, beside as many random units at each site.

    The AUROC needs no threshold, which shifts between a model and its base. A control puts each site's weights on
    random units of that site.

    Args:
        model: the probe's own model, its base or a descendant; left as found.
        weights: what `locators.probe` with score="weight" returned.
        batches: examples of 1.
        contrast: examples of 0.
        pool: as the probe was fitted with.
        statistic: as the probe was fitted with: "cett" or "activation".
        controls: how many.
        seed: names them.

    Returns:
        `auroc`, `random` (of each control), `units` with a weight, `examples`.

    Raises:
        RequestError: no weight is set, or one set of examples.
    """
    one_of(statistic, ("activation", "cett"), what="statistic")
    units = sum(int((w != 0).sum()) for w in weights.values.values())
    if not units:
        raise RequestError(
            "probe weights that are all 0", expected="some", do="raise C= of the probe, or standardize=True"
        )
    if not batches or not contrast:
        raise RequestError("one set of examples", expected="two sets to tell apart", do="give both")
    each = shares(model, weights.sites) if statistic == "cett" else None
    with evaluating(model):
        sides = [table(model, weights.sites, side, pool=pool, each=each) for side in (batches, contrast)]
    x = {name: torch.cat([side[name] for side in sides]) for name in weights.sites}
    y = torch.cat([torch.ones(len(next(iter(sides[0].values())))), torch.zeros(len(next(iter(sides[1].values()))))])

    def told(order: int | None) -> float:
        total = torch.zeros(len(y))
        for name, w in weights.values.items():
            if order is not None:
                rng = generator(seed, "readout", order, name)
                w = w[torch.randperm(len(w), generator=rng)]
            total += x[name] @ w
        return auroc(total, y)

    return {
        "auroc": told(None),
        "random": [told(i) for i in range(controls)],
        "units": units,
        "examples": len(y),
    }
