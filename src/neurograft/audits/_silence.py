"""Silencing a selection for the length of a block, and the selections it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.context import Batch
from neurograft.core.errors import RequestError
from neurograft.core.intervene import Intervention
from neurograft.core.seeds import generator
from neurograft.core.selection import Selection
from neurograft.core.taps.reducers import Exemplars, Extremes, Reducer, Sums
from neurograft.core.taps.stream import observe
from neurograft.core.units import Parameters, Site

SINK = 50.0


@contextmanager
def silenced(model: nn.Module, where: Selection, *, means: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Put the chosen units' activations at zero, or at their means; units without a tap lose their weights.

    The weights a unit writes with are zeroed, or all of its own where it has no such part; they come back bit for
    bit.
    """
    undo: list[Any] = []
    try:
        for name, ids in where.ids.items():
            site = where.sites[name]
            if not len(ids):
                continue
            if site.tap is not None:
                value = None if means is None else means[name][ids]
                undo.append(Intervention(site, ids, "zero" if value is None else "replace", value).mount(model).remove)
            else:
                undo.append(_zeroed(model, site, ids))
        yield
    finally:
        for back in reversed(undo):
            back()


def _zeroed(model: nn.Module, site: Site, ids: Tensor) -> Any:
    found = Parameters.of(model)
    parts = [site.parts[i] for i in site.writes] or list(site.parts)
    if not parts:
        raise RequestError(
            f"the units of {site.name}, which have neither activations nor weights",
            expected="units that can be silenced",
            do="choose another kind of unit",
        )
    held = []
    for part in parts:
        weight = found.by_name[found.alias[part.param]].data
        flat = weight.view(-1)
        entries = part.flat(ids).reshape(-1).to(weight.device)
        held.append((flat, entries, flat[entries]))
        flat[entries] = 0

    def back() -> None:
        for flat, entries, numbers in reversed(held):
            flat[entries] = numbers

    return back


def chosen_sites(where: Selection) -> dict[str, Site]:
    """Return the sites that have a chosen unit."""
    return {n: where.sites[n] for n, ids in where.ids.items() if len(ids)}


def sizes(
    model: nn.Module, where: Selection, batches: Sequence[Batch]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return each unit's size for matching, and the massive units.

    The size is the mean absolute activation on these batches, or the norm of the weights of units without a tap. A
    unit is massive if its largest activation is more than `SINK` times the median unit's of its site; at position 0
    it is what the literature calls an attention sink.

    Returns:
        site name -> float [n]; plain data of massive units, largest first.
    """
    sites = chosen_sites(where)
    tapped = {n: s for n, s in sites.items() if s.tap is not None}
    found = {n: _norms(model, s) for n, s in sites.items() if s.tap is None}
    massive: list[dict[str, Any]] = []
    if tapped:

        def make(n: int) -> dict[str, Reducer]:
            return {"sums": Sums(n), "ends": Extremes(n), "top": Exemplars(n, k=1)}

        for name, seen in observe(model, tapped, batches, make).items():
            sums, ends, top = seen["sums"], seen["ends"], seen["top"]
            assert isinstance(sums, Sums)
            assert isinstance(ends, Extremes)
            assert isinstance(top, Exemplars)
            found[name] = sums.absolute / max(1, sums.count)
            massive += _massive(name, ends.absolute, top.places[0, :, 1], where.ids[name])
    return found, sorted(massive, key=lambda m: -m["times_median"])


def _massive(name: str, largest: Tensor, position: Tensor, chosen: Tensor) -> list[dict[str, Any]]:
    middle = largest.median()
    if middle <= 0:
        return []
    return [
        {
            "site": name,
            "unit": unit,
            "largest": float(largest[unit]),
            "times_median": float(largest[unit] / middle),
            "position": int(position[unit]),
            "sink": int(position[unit]) == 0,
            "chosen": bool((chosen == unit).any()),
        }
        for unit in (largest > SINK * middle).nonzero()[:, 0].tolist()
    ]


def _norms(model: nn.Module, site: Site) -> Tensor:
    found, total = Parameters.of(model), torch.zeros(site.n, dtype=torch.float64)
    for part in site.parts:
        weight = found.by_name[found.alias[part.param]].detach()
        for ids in torch.arange(site.n).split(max(1, (1 << 20) // part.size)):
            total[ids] += part.read(weight, ids).double().square().sum(1).cpu()
    return total.sqrt()


def matched(where: Selection, size: Mapping[str, Tensor], seed: int) -> Selection:
    """Return as many other units of each site, each near a chosen one in size.

    Units are ranked by size; each chosen unit is replaced by a random one among its free neighbours in rank, within
    a fiftieth of the site and at least 5 places to either side, further if none is free.
    """
    ids = {}
    for name, chosen in where.ids.items():
        n = where.sites[name].n
        if not len(chosen):
            continue
        rng = generator(seed, "matched", name)
        order = size[name].argsort()
        rank = torch.empty(n, dtype=torch.int64)
        rank[order] = torch.arange(n)
        free = torch.ones(n, dtype=torch.bool)
        if 2 * len(chosen) <= n:
            free[rank[chosen]] = False
        found, reach = [], max(5, n // 50)
        for place in rank[chosen[torch.randperm(len(chosen), generator=rng)]].tolist():
            low = max(0, place - reach)
            candidates = low + free[low : place + reach + 1].nonzero()[:, 0]
            if not len(candidates):
                far = free.nonzero()[:, 0]
                candidates = far[(far - place).abs().argsort()[:1]]
            pick = int(candidates[torch.randint(len(candidates), (1,), generator=rng)])
            free[pick] = False
            found.append(int(order[pick]))
        ids[name] = torch.tensor(found)
    return Selection.of(where.sites, ids, {"rule": "matched", "of": [where.digest], "seed": seed})


def drawn(where: Selection, seed: int, avoid: Mapping[str, Sequence[int]] | None = None) -> Selection:
    """Return as many random units of each site, others than the chosen ones where there are enough, and none of
    `avoid` where there are enough."""
    ids = {}
    for name, chosen in where.ids.items():
        if not len(chosen):
            continue
        order = torch.randperm(where.sites[name].n, generator=generator(seed, "random_like", name))
        for excluded in (chosen, torch.tensor(list((avoid or {}).get(name, ())), dtype=torch.int64)):
            rest = order[~torch.isin(order, excluded)]
            order = rest if len(rest) >= len(chosen) else order
        ids[name] = order[: len(chosen)]
    return Selection.of(where.sites, ids, {"rule": "random_like", "of": [where.digest], "seed": seed})
