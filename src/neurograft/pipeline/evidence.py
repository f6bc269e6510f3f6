"""`evidence`: is a selection better than matched chance?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from neurograft.audits.evidence import evidence as measure
from neurograft.core.choose import Choice, choose
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError, one_of
from neurograft.core.grafts.origin import describe
from neurograft.core.prompts.examples import row_digests, singles
from neurograft.core.selection import Selection
from neurograft.pipeline.attach import Where, selection_of
from neurograft.pipeline.inputs import as_batches, data_digest
from neurograft.pipeline.locate import bound, locate
from neurograft.pipeline.models import Model, load_model
from neurograft.pipeline.select import select
from neurograft.pipeline.state import as_found

Progress = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class Evidence:
    """What silencing a selection shows, as plain data.

    Args:
        data: see `neurograft.audits.evidence`, with provenance.
    """

    data: Mapping[str, Any]

    @property
    def verdict(self) -> str:
        """A few words: "no better than random", ..., "better than its controls"."""
        return str(self.data["verdict"])

    @property
    def sentence(self) -> str:
        """The verdict with its numbers."""
        return str(self.data["sentence"])

    @property
    def better(self) -> bool:
        """Whether the selection beat random units of the same layers."""
        return bool(self.data["families"]["random"]["difference"]["low"] > 0)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return dict(self.data)

    def __str__(self) -> str:
        return self.sentence


def evidence(
    model: Model,
    where: Where,
    data: Any,
    *,
    objective: Choice = "auto",
    controls: int = 20,
    limit: int | None = 64,
    draws: int = 1000,
    level: float = 0.95,
    silence: str = "zero",
    protected: Mapping[str, Where] | None = None,
    stability: bool = False,
    relocate: Callable[[Sequence[Batch]], Selection] | None = None,
    overlap: str = "refuse",
    processing_class: Any = None,
    batch_size: int = 8,
    max_length: int = 1024,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> Evidence:
    """Silence a selection and matched control selections, and say whether it matters more than they do.

    Costs 1 + 1 + 2 * controls forward passes over the examples.

    Args:
        model: a module, a folder, a Hub id or a shipped model; left as found.
        where: the selection, or the path of a saved one.
        data: labelled examples that the selection was not located on; what was is known from its card.
        objective: "auto" scores the labels of classifiers and language models; any other objective, and models
            without class labels, are run example by example.
        controls: random, and magnitude-matched, selections each.
        limit: use at most so many examples.
        draws: of the bootstrap.
        level: of the intervals.
        silence: activations go to "zero" or to their "mean".
        protected: name -> selection whose overlap is reported.
        stability: locate again on each half of the examples, as the selection's card says, and compare.
        relocate: batches -> a selection, where the card does not say it.
        overlap: "refuse" data the selection was located on, or "drop" those examples.
        processing_class: tokenizer or processor for raw data.
        batch_size: examples in a batch.
        max_length: longer texts are cut.
        revision: of a Hub id.
        dtype: load the weights so.
        device_map: as for `from_pretrained`.
        progress: (items, what) -> items, to show a bar.
        seed: root of every random number.

    Returns:
        The evidence: `verdict`, `sentence`, `better`, `as_dict()`.

    Raises:
        RequestError: an empty selection, data it was located on, too few examples.
    """
    one_of(overlap, ("refuse", "drop"), what="overlap")
    chosen = selection_of(where)
    if chosen is None:
        raise RequestError("no selection", expected="a selection", do="scores.top(fraction=0.01)")
    net = load_model(model, revision=revision, dtype=dtype, device_map=device_map)
    encode: dict[str, Any] = {"processing_class": processing_class, "max_length": max_length, "seed": seed}
    batches = as_batches(data, net, batch_size=batch_size, **encode)
    fresh, dropped, known = _fresh(batches, chosen, overlap, limit)
    loss = None if objective == "auto" and _classes(fresh) else bound(objective)
    again = relocate or (relocated(net, chosen) if stability else None)
    others = {n: s for n, w in (protected or {}).items() if (s := selection_of(w)) is not None}
    with as_found(net):
        found = measure(
            net,
            chosen,
            fresh,
            loss=loss,
            controls=controls,
            draws=draws,
            level=level,
            silence=silence,
            protected=others,
            relocate=again,
            progress=progress,
            seed=seed,
        )
    provenance = {
        "selection": chosen.digest,
        "located": dict(chosen.card),
        "data": data_digest(fresh),
        "dropped": dropped,
        "disjoint": known,
        "objective": choose("objectives", objective).as_dict(),
        "model": describe(net),
        "draws": draws,
        "seed": seed,
    }
    return Evidence({**found, "provenance": provenance})


def _fresh(
    batches: list[Batch], where: Selection, overlap: str, limit: int | None
) -> tuple[list[Batch], int, bool | None]:
    """Return at most `limit` examples that the selection was not located on, how many were dropped, and whether
    they are known to be others (None if the selection's card does not tell)."""
    used = located_on(where)
    kept: list[Batch] = []
    count, dropped = 0, 0
    for batch in batches:
        rows, digests = list(singles(batch)), row_digests([batch])
        seen = [d in used for d in digests]
        dropped += sum(seen)
        left = len(rows) if limit is None else limit - count
        if not any(seen) and len(rows) <= left:
            kept.append(batch)
            count += len(rows)
            continue
        for row, known in zip(rows, seen):
            if not known and (limit is None or count < limit):
                kept.append(row)
                count += 1
    if dropped and overlap == "refuse":
        raise RequestError(
            f"{dropped} examples on which this selection was located",
            expected="other examples",
            do="hold some data out for evidence, or pass overlap='drop' to leave these out",
        )
    return kept, dropped, True if used else None


def located_on(where: Selection) -> frozenset[str]:
    """Return the digests of the examples a selection was located on, as far as its card tells."""
    found: list[str] = []
    pending: list[Any] = [where.card]
    while pending:
        card = pending.pop()
        if isinstance(card, Mapping):
            found += [d for d in card.get("examples") or () if isinstance(d, str)]
            pending += [v for k, v in card.items() if k != "examples"]
        elif isinstance(card, (list, tuple)):
            pending += card
    return frozenset(found)


def relocated(model: nn.Module, where: Selection) -> Callable[[Sequence[Batch]], Selection]:
    """Return the way a selection was made, by its card, for other batches.

    Raises:
        RequestError: the card does not tell, or the rule needs more than scores.
    """
    card: Mapping[str, Any] = where.card
    located: Mapping[str, Any] = card.get("located") or {}
    known = {"units", "at", "objective", "positions", "seed"} & located.keys()
    if card.get("rule") not in ("top", "bottom") or "by" not in located or located.get("contrast"):
        raise RequestError(
            f"stability of a selection made by {card.get('rule') or 'hand'}",
            expected="one that ng.locate and the selectors top or bottom made, on one set of data",
            do="pass relocate=callable (batches) -> selection",
        )
    how = {k: located[k] for k in known if located[k] is not None}
    rule = {k: card[k] for k in ("fraction", "count", "per") if card.get(k) is not None}

    def again(batches: Sequence[Batch]) -> Selection:
        scores = locate(model, list(batches), by=located["by"], **how)
        return select(scores, card["rule"], **rule)

    return again


def _classes(batches: Sequence[Batch]) -> bool:
    """Say whether the labels are classes, or there are none and the model predicts its own input."""
    labels = [b["labels"] for b in batches if b.get("labels") is not None]
    return all(not label.is_floating_point() for label in labels)
