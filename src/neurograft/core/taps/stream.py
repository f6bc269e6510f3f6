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
    pool: str | Mapping[str, str] = "token",
) -> dict[str, Mapping[str, Reducer]]:
    """Run batches through a model and return what the reducers saw at each site.

    Units of several features are reduced to the norm of their features. Places are (example, position).

    Args:
        model: run as it is, without gradients.
        sites: what to read; each needs a tap.
        batches: model inputs.
        make: n -> fresh reducers by name.
        mask: which tokens count, as for `core.taps.tap.watch`.
        pool: what a reducer is given: every "token", or one "mean" or "max" of each example; or that by reducer.

    Raises:
        RequestError: no batches, or an unknown pool.
        RunError: a tap that never fired.
    """
    for word in (pool,) if isinstance(pool, str) else pool.values():
        one_of(word, POOLS, what="pool")
    found = {name: make(site.n) for name, site in sites.items()}
    each = {key: pool if isinstance(pool, str) else pool[key] for reducers in found.values() for key in reducers}
    places = any(isinstance(r, Exemplars) for reducers in found.values() for r in reducers.values())
    pools = set(each.values())
    first, seen = 0, 0

    def read(name: str, x: Tensor) -> None:
        x = per_unit(x)
        where = None
        if places or pools != {"token"}:
            rows, at = looking.place()
            where = torch.stack([rows + first, at], 1)
        made = {word: (x, where) if where is None or word == "token" else _pooled(x, where, word) for word in pools}
        for key, reducer in found[name].items():
            reducer.update(*made[each[key]])

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
    examples = places[:, 0]
    if bool((examples[1:] < examples[:-1]).any()):  # as experts may be given them
        order = examples.argsort(stable=True)
        x, places = x[order.to(x.device)], places[order]
    counts = places[:, 0].unique_consecutive(return_counts=True)[1]
    parts = x.split(counts.tolist())
    rows = [part.amax(0) if pool == "max" else part.float().mean(0) for part in parts]
    return torch.stack(rows), places[counts.cumsum(0) - counts]


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
