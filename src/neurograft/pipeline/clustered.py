"""A step of recipes: the chosen units of each site fall into groups that act alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.context import Batch
from neurograft.core.errors import RequestError, extra
from neurograft.core.ranges import least
from neurograft.core.selection import Selection
from neurograft.core.taps.table import table
from neurograft.core.units import Site
from neurograft.pipeline.given import located_data
from neurograft.pipeline.state import as_found


def clustered(
    state: Mapping[str, Any],
    *,
    k: int = 8,
    pool: str = "mean",
    standardize: bool = True,
    data: Any = None,
    of: str = "where",
    name: str = "where",
) -> dict[str, Selection]:
    """Split each site of an earlier selection into up to k groups by k-means over activation profiles.

    Args:
        state: what the recipe has made so far, its model and data.
        k: groups a site; no more than it has units.
        pool: over an example's tokens, as in `core.taps.table.table`.
        standardize: bring each unit's profile over the examples to mean 0 and deviation 1, so that units group by
            when they fire, not by how strongly.
        data: examples the profiles are taken on, instead of the run's.
        of: name of the selection.
        name: of the grouped one.

    Raises:
        RequestError: no such selection, units without activations, no data, or no scikit-learn.
    """
    least(k=(k, 1))
    found, model = state.get(of), state["model"]
    if not isinstance(found, Selection) or not len(found):
        raise RequestError(f"no selection {of!r} to cluster", expected="an earlier step's", do="select some units")
    options: Mapping[str, Any] = state.get("common", {})
    batches, contrast = located_data(
        state["data"] if data is None else data, model, processing_class=options.get("processing_class")
    )
    with as_found(model):
        made = by_profile(
            model, found, [*batches, *contrast], k=k, pool=pool, standardize=standardize, seed=options.get("seed", 0)
        )
    return {name: made}


def by_profile(
    model: nn.Module,
    where: Selection,
    batches: list[Batch],
    *,
    k: int,
    pool: str = "mean",
    standardize: bool = True,
    seed: int = 0,
) -> Selection:
    """Return the selection with a site `<name>#<group>` for each group of a site's chosen units."""
    sites = {n: where.sites[n] for n, ids in where.ids.items() if len(ids)}
    profiles = table(model, sites, batches, pool=pool)
    grouped: dict[str, Site] = {}
    ids: dict[str, Tensor] = {}
    for name, site in sites.items():
        x = profiles[name][:, where.ids[name]].t().double()
        if standardize:
            x = (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True).clamp(min=1e-8)
        labels = kmeans(x, min(k, len(x)), seed)
        for group in labels.unique().tolist():
            key = f"{name}#{group}"
            grouped[key], ids[key] = replace(site, name=key), where.ids[name][labels == group]
    return Selection.of(grouped, ids, {**where.card, "clusters": {"k": k, "pool": pool, "of": where.digest}})


def kmeans(x: Tensor, k: int, seed: int) -> Tensor:
    """Return the group of each row of float64 [n, d], int64 [n], by scikit-learn's k-means of ten starts."""
    with extra("probes", what="clusters"):
        from sklearn.cluster import KMeans
    distinct = len(x.unique(dim=0))
    found = KMeans(min(k, distinct), n_init=10, random_state=seed).fit_predict(x.numpy())
    return torch.from_numpy(found).long()
