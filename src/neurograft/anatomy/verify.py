"""Is the anatomy true? Silencing a unit in its weights must equal silencing its activation at the tap.

Everything rests on this check: the laws run it over all families, the structural fallback accepts nothing that
fails it, and `neurograft anatomy MODEL --verify` runs it on a user's model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.anatomy._reading import Reading
from neurograft.anatomy._silence import (
    EFFECT,
    ROUNDING,
    both_ways,
    distance,
    outputs,
    quiet,
    silent_weights,
    some_units,
)
from neurograft.anatomy.sites import every_kind, of_kind, read
from neurograft.core.errors import RequestError, RunError
from neurograft.core.seeds import generator
from neurograft.core.taps.tap import watch
from neurograft.core.units import Site


@dataclass(frozen=True)
class Row:
    """What was found of one site.

    Args:
        kind: of its units.
        site: its name.
        n: how many units it has.
        error: largest difference of an output between silencing in the weights and at the tap, relative to the
            largest output; None where there is nothing to compare.
        moved: largest difference to the untouched output, in the same measure.
        status: "equal", "read" (a tap no weight silences: it fires and has the right width), "owned" (no tap:
            entries in range and disjoint), "unreached" (nothing to see on this batch), or "failed".
        reason: why it failed or was not reached.
    """

    kind: str
    site: str
    n: int
    error: float | None
    moved: float | None
    status: str
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def verify(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    kinds: Iterable[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Row]:
    """Check the sites of a model on one batch: promise 10.

    With a tap and `writes`: the output with a third of the units' writing numbers at zero equals the output with
    their activations at zero, and is not the untouched output; for neurons and heads, the numbers that make them
    move their own activations and no other unit's. For kind "layer" every sub-layer's contribution is silenced.
    Without: the numbers of the units are entries of their parameters, and no two units share one.

    Args:
        model: left as it was found; float64 makes the strictest check.
        batch: inputs that reach the units.
        kinds: kinds to check, all that the model has if None.
        limit: sites of a kind (and `at`) to check, evenly spread; None for all.
        seed: names the units that are silenced.

    Raises:
        RequestError: an unknown kind, or one that the model lacks.

    Example:
        >>> from neurograft.worlds.pico import pico, pico_batch
        >>> model = pico("llama", dtype=torch.float64)
        >>> {row.status for row in verify(model, pico_batch(model), kinds=["neuron", "head"])}
        {'equal'}
    """
    return check(read(model), batch, kinds=kinds, limit=limit, seed=seed)


def check(
    reading: Reading,
    batch: Mapping[str, Any],
    *,
    kinds: Iterable[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Row]:
    """Check the sites of a model that has been read; see `verify`."""
    rows = []
    model = reading.inventory.model
    with quiet(model):
        base = outputs(model, batch)
        for found in every_kind(reading, kinds):
            names = list(found)
            if limit is not None and len(names) > limit:
                names = [names[(2 * i + 1) * len(names) // (2 * limit)] for i in range(limit)]
            for name in names:
                taps = contributions(reading, found[name])
                row = _site(model, batch, found[name], taps, base, seed)
                if row.status == "equal" and found[name].at in ("act", "out") and not _mixed(reading, found[name]):
                    why = _together(model, batch, found[name], some_units(found[name], seed))
                    row = replace(row, status="failed", reason=why) if why else row
                rows.append(row)
    return rows


def _mixed(reading: Reading, site: Site) -> bool:
    module = site.name.rpartition("/")[0]
    return any(a.mixed for b in reading.anatomy.blocks for a in b.attentions if a.module == module)


def _together(model: nn.Module, batch: Mapping[str, Any], site: Site, ids: Tensor) -> str:
    """Say what is wrong if the numbers that make some units, at zero, do not move these units and no others."""
    made = replace(site, writes=tuple(i for i in range(len(site.parts)) if i not in site.writes))
    base = _first(model, batch, site)
    with silent_weights(model, made, ids):
        moved = _first(model, batch, site)
    if base is None or moved is None:
        return ""  # an expert to which no token came
    difference = (moved - base).abs().transpose(0, 1).flatten(1).amax(1) / base.abs().max().clamp(min=1e-12)
    mine = torch.zeros(site.n, dtype=torch.bool).index_fill(0, ids, True)
    if bool((difference[~mine] > ROUNDING.get(base.dtype, 1e-2)).any()):
        return "the weights that make these units move others too"
    if not bool((difference[mine] > 0).any()):
        return "the weights that make these units do not move them"
    return ""


def _first(model: nn.Module, batch: Mapping[str, Any], site: Site) -> Tensor | None:
    """Return what passes the tap for the first time: a shared block is run again on what it has changed itself."""
    seen: list[Tensor] = []
    with watch(model, {site.name: site}, lambda name, x: None if seen else seen.append(x.clone())):
        outputs(model, batch)
    return seen[0] if seen else None


def _site(
    model: nn.Module,
    batch: Mapping[str, Any],
    site: Site,
    taps: Mapping[str, Site],
    base: list[Tensor],
    seed: int,
) -> Row:
    reason = ownership(model, site, seed=seed)
    if reason:
        return Row(site.kind, site.name, site.n, None, None, "failed", reason)
    if not taps:
        return Row(site.kind, site.name, site.n, None, None, "owned")
    try:
        if not site.writes:
            with watch(model, taps, lambda name, x: None):  # raises if one does not fire
                outputs(model, batch)
            return Row(site.kind, site.name, site.n, None, None, "read")
        by_weight, by_tap = both_ways(model, batch, site, taps, some_units(site, seed))
    except (RunError, RequestError, RuntimeError, IndexError) as failure:
        return Row(site.kind, site.name, site.n, None, None, "failed", str(failure))
    error, moved = distance(by_weight, by_tap), distance(by_weight, base)
    return _judged(site, error, moved, next(model.parameters()).dtype)


def _judged(site: Site, error: float, moved: float, dtype: torch.dtype) -> Row:
    status, reason = "equal", ""
    if not error <= ROUNDING.get(dtype, 1e-2):
        status, reason = "failed", "silencing the weights differs from silencing the activation"
    elif not moved > EFFECT.get(dtype, 1e-2):
        status, reason = "unreached", "silencing changes nothing: the batch does not reach these units"
    return Row(site.kind, site.name, site.n, error, moved, status, reason)


def contributions(reading: Reading, site: Site) -> dict[str, Site]:
    """Return what must be silenced at taps: the site itself, or for a block each of its sub-layers."""
    if site.kind == "layer" and not site.at:
        block = site.name.rpartition("/")[0]
        roles = reading.anatomy.branches[reading.anatomy.layers.index(block)]
        found = (of_kind(reading, "layer", at=role)[f"{block}/layer@{role}"] for role in roles)
        return {s.name: s for s in found}
    return {site.name: site} if site.tap is not None else {}


def ownership(model: nn.Module, site: Site, *, most: int = 256, seed: int = 0) -> str:
    """Say what is wrong with the numbers a site's units own; empty if nothing is.

    Args:
        most: units to look at, the first, the last and random ones.
    """
    for part in site.parts:
        if part.n != site.n:
            return f"{part.param} is cut into {part.n} units, not {site.n}"
        numel = model.get_parameter(part.param).numel()
        ids = torch.arange(site.n)
        if site.n > most:
            drawn = torch.randperm(site.n, generator=generator(seed, "ownership", site.name))[: most - 2]
            ids = torch.cat([drawn, torch.tensor([0, site.n - 1])]).unique()
        flat = part.flat(ids).reshape(-1)
        if int(flat.min()) < 0 or int(flat.max()) >= numel:
            return f"{part.param} has {numel} entries, the units reach from {int(flat.min())} to {int(flat.max())}"
        if len(flat.unique()) != len(flat):
            return f"units share entries of {part.param}"
    return ""
