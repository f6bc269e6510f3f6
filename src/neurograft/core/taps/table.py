"""Tables of examples by units: one pooled activation for each, as probes, readouts and clusters take them.

Shape letters: N examples, n units of a site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from neurograft.core.batches import Batch
from neurograft.core.errors import RequestError, one_of
from neurograft.core.prompts.examples import size
from neurograft.core.prompts.passing import Positions
from neurograft.core.taps.look import look
from neurograft.core.taps.tap import change, per_unit, watch
from neurograft.core.taps.watching import Watch
from neurograft.core.units import Site

POOLS = ("max", "mean", "last", "answer")
Each = Callable[[str, Tensor], Tensor]


def table(
    model: nn.Module,
    sites: Mapping[str, Site],
    batches: Sequence[Batch],
    *,
    pool: str = "mean",
    positions: Positions = "all",
    padding: bool = False,
    each: Each | None = None,
) -> dict[str, Tensor]:
    """Return one activation of every unit for every example, float32 [N, n] for each site, on the CPU.

    Units of several features are read as the norm of their features. An expert that saw no token of an example has
    zeros there.

    Args:
        model: run as it is, without gradients.
        sites: what to read; each needs a tap.
        batches: model inputs.
        pool: over an example's counted tokens: "max", "mean", the "last" one alone, or the mean over the "answer".
        positions: which tokens count, for "max" and "mean".
        padding: count padding too, as published code does.
        each: (site name, activations [tokens, n]) -> what is pooled instead of them.

    Raises:
        RequestError: no batches, an unknown pool, or padding together with positions.
        RunError: a tap that never fired.

    Example:
        >>> from neurograft.core.units import Tap
        >>> net, site = nn.Sequential(nn.Identity()), Site("a", "neuron", 2, tap=Tap("0"))
        >>> table(net, {"a": site}, [{"input": torch.tensor([[1.0, 5.0], [3.0, 4.0]])}])["a"].tolist()
        [[1.0, 5.0], [3.0, 4.0]]
    """
    one_of(pool, POOLS, what="pool")
    if not batches:
        raise RequestError("no batches", expected="data to read units on", do="give at least one example")
    if padding and (positions != "all" or pool in ("last", "answer")):
        raise RequestError(
            f"padding=True with pool={pool!r}, positions={positions!r}",
            expected="'max' or 'mean' over all positions",
            do="leave padding out",
        )
    found: dict[str, list[Tensor]] = {name: [] for name in sites}
    for batch in batches:
        for name, rows in _pooled_batch(model, sites, batch, pool, positions, padding, each).items():
            found[name].append(rows)
    return {name: torch.cat(rows) for name, rows in found.items()}


def _pooled_batch(
    model: nn.Module,
    sites: Mapping[str, Site],
    batch: Batch,
    pool: str,
    positions: Positions,
    padding: bool,
    each: Each | None,
) -> dict[str, Tensor]:
    here = size(batch)
    made: dict[str, list[Tensor]] = {name: [] for name in sites}

    def take(name: str, x: Tensor, rows: Tensor) -> None:
        x = per_unit(x)
        x = x.float() if each is None else each(name, x).float()
        made[name].append(pooled(x, rows.to(x.device), here, "max" if pool == "max" else "mean").cpu())

    looking: Watch
    with torch.no_grad():
        if padding:

            def see(name: str, x: Tensor) -> None:
                assert looking.seen is not None
                wide = len(looking.seen.lead)
                take(name, x.detach().reshape(-1, *x.shape[wide:]), looking.place()[0])

            with change(model, sites, see) as looking:
                look(model, batch)
        else:
            mask = {"last": "last", "answer": "answer"}.get(pool, positions)
            with watch(model, sites, lambda name, x: take(name, x, looking.place()[0]), mask=mask) as looking:
                look(model, batch)
    # A module that several layers share fires once for each.
    return {name: torch.zeros(here, sites[name].n) if not seen else _joined(seen, pool) for name, seen in made.items()}


def _joined(seen: Sequence[Tensor], pool: str) -> Tensor:
    """Join what one module showed in several layers, [N, n] each."""
    every = torch.stack(list(seen))
    return every.amax(0) if pool == "max" else every.mean(0)


def pooled(x: Tensor, rows: Tensor, examples: int, pool: str) -> Tensor:
    """Reduce activations [tokens, n] to one row an example by "max" or "mean"; zeros for an example without tokens.

    Example:
        >>> x, rows = torch.tensor([[1.0], [5.0], [3.0]]), torch.tensor([0, 0, 2])
        >>> pooled(x, rows, 3, "max").tolist(), pooled(x, rows, 3, "mean").tolist()
        ([[5.0], [0.0], [3.0]], [[3.0], [0.0], [3.0]])
    """
    empty = x.new_zeros(examples, x.shape[1])
    if pool == "max":
        return empty.scatter_reduce_(0, rows[:, None].expand_as(x), x, "amax", include_self=False)
    return empty.index_add_(0, rows, x) / torch.bincount(rows, minlength=examples).clamp(min=1)[:, None]


def auroc(value: Tensor, y: Tensor) -> float:
    """Return the chance that a positive example's value is above a negative one's, ties counted half.

    Example:
        >>> auroc(torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([1.0, 0.0, 1.0, 0.0]))
        0.875
    """
    order = value.double()
    up, down = order[y > 0.5], order[y <= 0.5].sort().values
    below = torch.searchsorted(down, up, right=False) + torch.searchsorted(down, up, right=True)
    return float(below.double().mean() / (2 * len(down)))
