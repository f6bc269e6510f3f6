"""How well single units tell concepts, before and after a change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.anatomy.sites import sites as sites_of
from neurograft.audits._changes import as_change
from neurograft.core.card import method
from neurograft.core.context import Batch, unlabelled
from neurograft.core.errors import RequestError
from neurograft.core.seeds import generator
from neurograft.core.taps.table import auroc, table
from neurograft.core.units import Site


@method(
    paper="lnet-anet",
    needs={"batches", "labels", "taps"},
    departs="The paper shows accuracies of single units as pictures; here it is the AUC, which needs no threshold. A "
    "unit that is low where a concept is there counts as much as one that is high.",
)
def unit_concepts(
    model: nn.Module,
    change: object,
    batches: Sequence[Batch],
    *,
    units: str | Mapping[str, Site] = "neuron",
    at: str | None = None,
    match: str | None = None,
    pool: str = "mean",
    best: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Rank units by how well each alone tells every concept, in a base and under a change.

    A unit's AUC a is the chance that it is higher on an example with the concept than on one without; max(a, 1 - a)
    counts, which random units exceed 0.5 by, too: `chance` is the best of all units against shuffled concepts.

    Args:
        model: the base; left as found.
        change: a graft, grafts, or a tuned model.
        batches: with labels, 0 or 1 [B, K] for K concepts, or int64 [B], of which each class is one.
        units: a kind of unit, or sites.
        at: which of its activations.
        match: only sites whose names match this pattern.
        pool: over an example's places, as in `core.taps.table.table`.
        best: how many units are named for each concept.
        seed: names the shuffle.

    Returns:
        `concepts`: for each one `before` and `after`, lists of (site, unit, auc) from the best; `before`, `after` and
        `chance`, each the mean over concepts of the best unit's AUC; `sharpened`, the share of concepts whose best
        unit is better after than before.

    Raises:
        RequestError: no labels, or a concept that all examples or none have.

    Example:
        >>> from neurograft.core.units import Tap
        >>> net, site = nn.Sequential(nn.Identity()), Site("a", "neuron", 2, tap=Tap("0"))
        >>> x = torch.tensor([[3.0, 0.0], [1.0, 2.0], [2.0, 2.0], [0.0, 3.0]])
        >>> batch = {"input": x, "labels": torch.tensor([[1], [0], [1], [0]])}
        >>> found = unit_concepts(net, net, [batch], units={"a": site})
        >>> found["concepts"][0]["before"]
        [('a', 0, 1.0), ('a', 1, 0.875)]
    """
    where = sites_of(model, units, at=at, match=match) if isinstance(units, str) else dict(units)
    concepts = _concepts(batches)
    inputs = [unlabelled(b) for b in batches]

    def pooled(net: nn.Module) -> Tensor:
        return torch.cat(list(table(net, where, inputs, pool=pool).values()), 1)

    x, changed = as_change(model, change).both(pooled)
    order = torch.randperm(len(concepts), generator=generator(seed, "unit_concepts"))
    before, after, chance = aucs(x, concepts), aucs(changed, concepts), aucs(x, concepts[order])
    names = [(name, i) for name, site in where.items() for i in range(site.n)]
    tops = [m.amax(0) for m in (before, after, chance)]
    return {
        "concepts": [
            {"before": _best(names, before[:, k], best), "after": _best(names, after[:, k], best)}
            for k in range(concepts.shape[1])
        ],
        **{name: float(top.mean()) for name, top in zip(("before", "after", "chance"), tops)},
        "sharpened": float((tops[1] > tops[0]).float().mean()),
    }


def aucs(x: Tensor, concepts: Tensor) -> Tensor:
    """Return max(a, 1 - a) of the AUC a of every unit for every concept.

    Args:
        x: [N, n].
        concepts: 0 or 1, [N, K].

    Returns:
        float32 [n, K].

    Example:
        >>> aucs(torch.tensor([[3.0, 0.0], [1.0, 2.0], [2.0, 2.0], [0.0, 3.0]]), torch.tensor([[1], [0], [1], [0]]))
        tensor([[1.0000],
                [0.8750]])
    """
    found = torch.tensor([[auroc(column, k) for k in concepts.float().t()] for column in x.t()])
    return torch.maximum(found, 1 - found)


def _concepts(batches: Sequence[Batch]) -> Tensor:
    labels = [b.get("labels") for b in batches]
    if not labels or not all(isinstance(v, Tensor) for v in labels):
        raise RequestError("data without labels", expected="labels of the concepts", do="give labelled rows")
    joined = torch.cat([v for v in labels if v is not None]).cpu()
    found = joined if joined.dim() == 2 else (joined[:, None] == joined.unique())
    share = found.float().mean(0)
    if joined.dim() > 2 or bool(((share == 0) | (share == 1)).any()):
        raise RequestError(
            f"labels {list(joined.shape)} with a concept that all or none of the examples have",
            expected="examples with and without every concept",
            do="give more examples, or leave the concept out",
        )
    return found


def _best(names: list[tuple[str, int]], values: Tensor, count: int) -> list[tuple[str, int, float]]:
    order = values.argsort(descending=True, stable=True)[:count]
    return [(*names[int(i)], float(values[i])) for i in order]
