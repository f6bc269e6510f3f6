"""What is left when a unit alone is silenced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neurograft.core.card import method
from neurograft.core.context import Context, Step
from neurograft.core.errors import RequestError, one_of
from neurograft.core.intervene import Intervention
from neurograft.core.selection import Scores, Selection
from neurograft.locators._common import limited, need_batches, scored

METRICS = ("accuracy", "log_prob")


@method(
    paper="milan",
    kinds={"neuron", "channel", "head", "layer"},
    needs={"batches", "labels", "taps"},
    claims={"finite", "length"},
)
def spared(context: Context, *, among: Any = None, metric: str = "log_prob", limit: int | None = None) -> Scores:
    """Score each unit by how well the model still does while that unit alone is at zero; the highest costs least.

    One pass over the data for every unit.

    Args:
        context: model, sites with taps, labelled batches.
        among: a selection: only its units are tried, all others score one less than the worst of them, and at most -1.
        metric: "accuracy", the share of labelled places whose label is likeliest, or "log_prob", their mean
            log-probability, nats.
        limit: use at most so many examples.

    Raises:
        RequestError: no data, an unknown metric, a selection of no unit of these sites.

    Example:
        >>> from neurograft.anatomy.sites import sites
        >>> from neurograft.worlds.pico import pico, pico_batch
        >>> net = pico("resnet")
        >>> where = sites(net, "channel", match="*embedder*")
        >>> (value,) = spared(Context(net, where, [pico_batch(net)]), metric="accuracy").values.values()
        >>> bool((value >= 0).all()), len(value)
        (True, 8)
    """
    need_batches(context)
    one_of(metric, METRICS, what="metric")
    batches = limited(context.batches, limit)
    tried = _tried(context, among)

    @torch.no_grad()
    def left() -> float:
        sums, count = 0.0, 0
        for batch in batches:
            step = Step(context.model, batch)
            if metric == "log_prob":
                found = step.log_probs
            else:
                logits, labels = step.scored()
                found = logits.argmax(-1) == labels
            sums += float(found.double().sum())
            count += len(found)
        return sums / count

    values: dict[str, Tensor] = {}
    for name, site in context.sites.items():
        values[name] = torch.full((site.n,), float("nan"))
        for unit in tried[name]:
            mounted = Intervention(site, torch.tensor([unit]), "zero").mount(context.model)
            try:
                values[name][unit] = left()
            finally:
                mounted.remove()
    below = min(min(float(v.nan_to_num(0.0).min()) for v in values.values()), 0.0) - 1
    card = {"metric": metric, "tried": sum(map(len, tried.values()))}
    return scored(context, {n: v.nan_to_num(below) for n, v in values.items()}, card)


def _tried(context: Context, among: Any) -> dict[str, list[int]]:
    if among is None:
        return {name: list(range(site.n)) for name, site in context.sites.items()}
    where: Selection = among if isinstance(among, Selection) else Selection.load(among)
    found = {name: where.ids[name].tolist() if name in where.ids else [] for name in context.sites}
    if not any(found.values()):
        raise RequestError(
            "a selection of no unit of these sites", expected="units of the kind that is scored", do="check units="
        )
    return found
