"""What the units of a model do on data, streamed into reducers or into means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from neurograft.core.batches import Batch
from neurograft.core.errors import RequestError, one_of
from neurograft.core.prompts.examples import size
from neurograft.core.prompts.passing import Positions
from neurograft.core.taps.look import look
from neurograft.core.taps.reducers import Exemplars, Reducer
from neurograft.core.taps.tap import per_unit, watch
from neurograft.core.taps.watching import Watch
from neurograft.core.units import Site

POOLS = ("token", "mean", "max")
Make = Callable[[int], Mapping[str, Reducer]]


def observe(
    model: nn.Module,
    sites: Mapping[str, Site],
    batches: Iterable[Batch],
    make: Make,
    *,
    mask: Positions | None = None,
    pool: str = "token",
) -> dict[str, Mapping[str, Reducer]]:
    """Run batches through a model and return what the reducers saw at each site.

    Units of several features are reduced to the norm of their features. Places are (example, position).

    Args:
        model: run as it is, without gradients.
        sites: what to read; each needs a tap.
        batches: model inputs.
        make: n -> fresh reducers by name.
        mask: which tokens count, as for `core.taps.tap.watch`.
        pool: what a reducer is given: every "token", or one "mean" or "max" of each example.

    Raises:
        RequestError: no batches, or an unknown pool.
        RunError: a tap that never fired.
    """
    one_of(pool, POOLS, what="pool")
    found = {name: make(site.n) for name, site in sites.items()}
    places = any(isinstance(r, Exemplars) for reducers in found.values() for r in reducers.values())
    first, seen = 0, 0

    def read(name: str, x: Tensor) -> None:
        x = per_unit(x)
        where = None
        if places or pool != "token":
            rows, at = looking.place()
            where = torch.stack([rows + first, at], 1)
            if pool != "token":
                x, where = _pooled(x, where, pool)
        for reducer in found[name].values():
            reducer.update(x, where)

    looking: Watch
    with watch(model, sites, read, mask=mask) as looking, torch.no_grad():
        for batch in batches:
            look(model, batch)
            first, seen = first + size(batch), seen + 1
        if not seen:
            raise RequestError("no batches", expected="data to observe", do="give at least one example")
    return found


def _pooled(x: Tensor, places: Tensor, pool: str) -> tuple[Tensor, Tensor]:
    """Reduce the tokens of each example to one row; the place is its first token's."""
    rows, starts = [], []
    for example in places[:, 0].unique().tolist():
        mine = (places[:, 0] == example).nonzero()[:, 0]
        part = x[mine.to(x.device)]
        rows.append(part.amax(0) if pool == "max" else part.float().mean(0))
        starts.append(places[mine[0]])
    return torch.stack(rows), torch.stack(starts)


def means(
    model: nn.Module, sites: Mapping[str, Site], batches: Iterable[Batch], *, mask: Positions | None = None
) -> dict[str, Tensor]:
    """Return the mean activation of every unit, float32 [n], or [n, w] for units of several features."""
    sums: dict[str, Tensor] = {}

    def read(name: str, x: Tensor) -> None:
        mine = x.sum(0, dtype=torch.float32).double().cpu()
        sums[name] = sums[name] + mine if name in sums else mine

    with watch(model, sites, read, mask=mask) as seen, torch.no_grad():
        for batch in batches:
            look(model, batch)
    found = {}
    for name, site in sites.items():
        width = site.tap.width if site.tap is not None else 1
        nothing = torch.zeros(site.n) if width == 1 else torch.zeros(site.n, width)
        found[name] = (sums[name] / seen.tokens[name]).float() if name in sums else nothing
    return found
