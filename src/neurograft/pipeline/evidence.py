"""`evidence`: is a selection better than matched chance?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from neurograft.audits.evidence import evidence as measure
from neurograft.core.choose import Choice, choose
from neurograft.core.compact.mount import check_here
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError, one_of
from neurograft.core.grafts.origin import describe
from neurograft.core.progress import Progress
from neurograft.core.selection import Selection
from neurograft.pipeline._located_on import relocated, unseen
from neurograft.pipeline.attach import Where, selection_of
from neurograft.pipeline.inputs import as_batches, data_digest
from neurograft.pipeline.locate import bound
from neurograft.pipeline.models import Model, load_model
from neurograft.pipeline.state import as_found


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
    if relocate is not None and not callable(relocate):
        raise RequestError(
            f"relocate={relocate!r}",
            expected="a callable (batches) -> Selection",
            do="give one, or stability=True alone",
        )
    net = load_model(model, revision=revision, dtype=dtype, device_map=device_map)
    check_here(net, chosen)
    encode: dict[str, Any] = {"processing_class": processing_class, "max_length": max_length, "seed": seed}
    batches = as_batches(data, net, batch_size=batch_size, **encode)
    fresh, dropped, known = unseen(batches, chosen, overlap, limit)
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


def _classes(batches: Sequence[Batch]) -> bool:
    """Say whether the labels are classes, or there are none and the model predicts its own input."""
    labels = [b["labels"] for b in batches if b.get("labels") is not None]
    return all(not label.is_floating_point() for label in labels)
