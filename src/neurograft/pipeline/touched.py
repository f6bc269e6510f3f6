"""Which neurons a change touches most, and their pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.anatomy.sites import sites
from neurograft.audits._changes import Change
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError
from neurograft.core.progress import Progress, quiet
from neurograft.core.units import Parameters, Part, Site
from neurograft.pipeline.neuron import neuron

KINDS = ("neuron", "channel")
EXAMPLES, CONTROLS, TOP = 64, 5, 3
BRIEF = 16  # examples of a page without silence


def touched(model: nn.Module, change: Change, *, count: int) -> list[tuple[str, float]]:
    """Return the units a change touches most, SITE:ID and the norm of the change of their numbers, largest first.

    Units that an operation of a graft changes come first, with the norm of what is changed in their weights (often 0).
    Neurons, or channels of a model that has none; a unit that is not touched is not listed.

    Args:
        model: the base, the change off.
        change: what is audited.
        count: at most so many.
    """
    known = _units(model)
    squares = {name: torch.zeros(site.n, dtype=torch.float64) for name, site in known.items()}
    alias, weights = Parameters.of(model).alias, {}
    for param, found in change.weights.items():
        weights[alias.get(param, param)] = found
    owned: dict[str, list[tuple[str, Part]]] = {}
    for name, site in known.items():
        for part in site.parts:
            owned.setdefault(alias.get(part.param, part.param), []).append((name, part))
    for param, mine in weights.items():
        if param in owned:
            whole = torch.zeros(mine.region.shape)  # once for all experts of a bank
            mine.region.write_(whole, mine.delta.float())
            for name, part in owned[param]:
                squares[name] += part.read(whole).double().square().sum(1)
    first = _operated(change, known)
    norms = [(name, i, float(v)) for name, sums in squares.items() for i, v in enumerate(sums.sqrt().tolist())]
    moved = [(n, i, v) for n, i, v in norms if v > 0 or (n, i) in first]
    moved.sort(key=lambda unit: ((unit[0], unit[1]) not in first, -unit[2]))
    return [(f"{name}:{i}", norm) for name, i, norm in moved[:count]]


def _units(model: nn.Module) -> dict[str, Site]:
    for kind in KINDS:
        try:
            return {name: site for name, site in sites(model, kind).items() if site.tap is not None}
        except RequestError:
            continue
    return {}


def _operated(change: Change, known: dict[str, Site]) -> set[tuple[str, int]]:
    """Return the units that operations of grafts say they change."""
    found = set()
    for graft in change.grafts:
        for operation in graft.operations:
            site, ids = getattr(operation, "site", None), getattr(operation, "ids", None)
            if isinstance(site, Site) and site.name in known and isinstance(ids, Tensor):
                found |= {(site.name, int(i)) for i in ids.tolist()}
    return found


def pages(
    model: nn.Module,
    change: Change,
    batches: Sequence[Batch],
    *,
    count: int,
    brief: bool = False,
    processing_class: Any = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Return the pages of the units a change touches most, as `ng.neuron` gives them, each with the change's norm.

    Args:
        model: the base, the change off.
        change: what is audited.
        batches: examples; the first 64 are used, which bounds the time.
        count: pages.
        brief: take 16 examples, show two of them, and leave out what silence costs.
        processing_class: tokenizer or processor.
        seed: root of every random number.
        progress: (items, what) -> items, to show a bar.
    """
    made = []
    for unit, norm in (progress or quiet)(touched(model, change, count=count), "neurons"):
        options: dict[str, Any] = {"top": TOP, "controls": CONTROLS, "limit": EXAMPLES, "seed": seed}
        options |= {"top": TOP - 1, "controls": 0, "limit": BRIEF} if brief else {}
        page = neuron(model, unit, batches, processing_class=processing_class, **options)
        made.append({**page, "changed_by": norm})
    return made
