"""`trim`: leave out those parts of a graft that cost more than they give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neurograft.audits._changes import Change, as_change, evaluating, written
from neurograft.audits._layers import blocks, layer_of
from neurograft.audits._scoring import Sums, label_sums, mean_fall
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError, one_of
from neurograft.core.grafts.coordinates import Piece, coordinates, everything
from neurograft.core.grafts.delta import LowRank, New
from neurograft.core.grafts.graft import Graft
from neurograft.core.progress import Progress, quiet
from neurograft.core.region import Region, as_matrix, union
from neurograft.core.units import Parameters
from neurograft.pipeline.inputs import as_batches
from neurograft.pipeline.models import Model, load_model
from neurograft.pipeline.state import as_found
from neurograft.report.rules import Rules, rules_of

PARTS = ("layer", "tensor")
Places = Mapping[str, list[Piece]]


@dataclass(frozen=True)
class Measured:
    """What a subset of a graft's parts does, in nats per labelled place.

    Args:
        gain: rise of the task's mean log-probability.
        losses: domain -> fall of the same there.
        excess: how far the losses exceed their tolerances, summed.
    """

    gain: float
    losses: Mapping[str, float]
    excess: float


def trim(
    model: Model,
    graft: Graft | str | Path,
    *,
    gain: Any = None,
    keep: Mapping[str, Any] | None = None,
    by: str = "layer",
    rules: Rules = None,
    processing_class: Any = None,
    batch_size: int = 8,
    max_length: int = 1024,
    limit: int | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    progress: Progress | None = None,
) -> Graft:
    """Take parts out of a graft until no kept domain loses more than its tolerance.

    Every part is left out by itself once, which says how much loss it takes along and how much gain. Parts are then
    left out one after another, those first that give back most loss for the gain they cost; one whose absence does
    not help, the others being gone, stays in. New parameters and operations stay.

    The tolerances alone decide here, without a noise floor and on means: choose on one half of the data and audit on
    the other.

    Args:
        model: the base; left as found.
        graft: a graft or its folder.
        gain: task data, labelled as for `audit`.
        keep: name of a domain -> data.
        by: what a part is: "layer" or "tensor".
        rules: `tolerance` and `tolerances` are read; see `audit`.
        processing_class: tokenizer or processor for raw data; the one saved with the model if None.
        batch_size: examples in a batch.
        max_length: longer texts are cut.
        limit: use at most so many examples of each data set.
        revision: of a Hub id.
        dtype: load the weights so.
        device_map: as for `from_pretrained`.
        progress: (items, what) -> items, to show a bar.

    Returns:
        The graft without these parts; `card["trim"]` holds the parts left out, whether every tolerance is kept, and
        gain and losses before and after. The same graft if nothing exceeds its tolerance.

    Raises:
        RequestError: no task or no kept data, or a graft with fewer than two parts.
    """
    one_of(by, PARTS, what="part")
    if gain is None or not keep:
        raise RequestError("no task data or no kept domain", expected="both", do="trim(..., gain=..., keep={...: ...})")
    chosen = rules_of(rules)
    net = load_model(model, revision=revision, dtype=dtype, device_map=device_map)
    whole = Graft.load(graft) if isinstance(graft, (str, Path)) else graft
    reading: dict[str, Any] = {"processing_class": processing_class, "batch_size": batch_size}
    reading |= {"max_length": max_length, "limit": limit}
    task = as_batches(gain, net, **reading)
    domains = {name: as_batches(data, net, **reading) for name, data in keep.items()}
    tolerance = {name: float(chosen["tolerances"].get(name, chosen["tolerance"])) for name in domains}
    with as_found(net), evaluating(net):
        places = _places(net, whole)
        parts = _parts(net, places, by)
        base = (label_sums(net, task), {name: label_sums(net, batches) for name, batches in domains.items()})

        change = as_change(net, whole)

        def measure(names: Iterable[str]) -> Measured:
            with _only(change, places, [t for n in names for t in parts[n]]) as changed:
                return _measured(changed, base, task, domains, tolerance)

        return _trimmed(whole, parts, measure, by, progress)


def _trimmed(
    whole: Graft,
    parts: Mapping[str, list[str]],
    measure: Callable[[Iterable[str]], Measured],
    by: str,
    progress: Progress | None,
) -> Graft:
    before = now = measure(parts)
    left = list(parts)
    if before.excess > 0:
        alone = {}
        for name in (progress or quiet)(left, "parts"):
            alone[name] = measure([n for n in parts if n != name])
        for name in sorted(parts, key=lambda n: (-_worth(before, alone[n]), n)):
            if now.excess == 0 or len(left) == 1 or alone[name].excess >= before.excess:
                break
            found = measure([n for n in left if n != name])
            if found.excess < now.excess:
                left, now = [n for n in left if n != name], found
    card = {
        "by": by,
        "of": whole.identity,
        "left_out": [n for n in parts if n not in left],
        "reached": now.excess == 0,
        "before": {"gain": before.gain, "losses": dict(before.losses)},
        "after": {"gain": now.gain, "losses": dict(now.losses)},
    }
    made = _subset(whole, [t for n in left for t in parts[n]])
    return replace(made, card={**whole.card, "trim": card})


def _worth(before: Measured, without: Measured) -> float:
    """Return the loss that leaving a part out gives back for each nat of gain it costs."""
    return (before.excess - without.excess) / max(before.gain - without.gain, 1e-6)


def _places(model: nn.Module, graft: Graft) -> Places:
    """Return checkpoint tensor -> where its change lies in the model; new parameters are no parts."""
    where, found = coordinates(model), {}
    for tensor, delta in graft.deltas.items():
        if not isinstance(delta, New):
            whole = everything(delta.shape, as_matrix(delta.shape))
            region = whole if isinstance(delta, LowRank) else delta.region
            found[tensor] = where.to_module(tensor, region)
    return found


def _parts(model: nn.Module, places: Places, by: str) -> dict[str, list[str]]:
    """Return part -> its checkpoint tensors."""
    layers = blocks(model)
    found: dict[str, list[str]] = {}
    for tensor, pieces in places.items():
        found.setdefault(layer_of(pieces[0].name, layers) if by == "layer" else tensor, []).append(tensor)
    if len(found) < 2:
        raise RequestError(
            f"a graft with {len(found)} {by}{'' if len(found) == 1 else 's'}",
            expected="at least two parts",
            do="by='tensor'" if by == "layer" else "a graft that touches more than one tensor",
        )
    return found


@contextmanager
def _only(change: Change, places: Places, tensors: Iterable[str]) -> Iterator[nn.Module]:
    """Switch on what a graft does to some tensors.

    The graft as a whole was verified; of weights the numbers of the other tensors are put back, where a graft of its
    own for every set of parts would have the base's tensors hashed for each.
    """
    keep = set(tensors)
    if change.new or change.operations:
        with as_change(change.model, _subset(change.grafts[0], keep)).on() as changed:
            yield changed
        return
    others: dict[str, list[Region]] = {}
    for piece in (p for tensor, pieces in places.items() if tensor not in keep for p in pieces):
        others.setdefault(piece.name, []).append(piece.region)
    weights = Parameters.of(change.model).by_name
    back = {name: (region := union(regions), region.read(weights[name])) for name, regions in others.items()}
    with change.on() as changed, written(changed, back):
        yield changed


def _subset(graft: Graft, tensors: Iterable[str]) -> Graft:
    keep = set(tensors) | {n for n, d in graft.deltas.items() if isinstance(d, New)}
    return replace(
        graft,
        deltas={n: d for n, d in graft.deltas.items() if n in keep},
        base={n: d for n, d in graft.base.items() if n in keep},
        originals={n: o for n, o in graft.originals.items() if n in keep},
    )


def _measured(
    changed: nn.Module,
    base: tuple[Sums, Mapping[str, Sums]],
    task: list[Batch],
    domains: Mapping[str, list[Batch]],
    tolerance: Mapping[str, float],
) -> Measured:
    gain = -mean_fall(base[0], label_sums(changed, task))
    losses = {n: mean_fall(base[1][n], label_sums(changed, batches)) for n, batches in domains.items()}
    return Measured(gain, losses, sum(max(0.0, losses[n] - tolerance[n]) for n in losses))
