"""What the audits of circuits do in the same way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from neurograft.anatomy.sites import sites as sites_of
from neurograft.audits._changes import Change, evaluating
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError
from neurograft.core.taps.circuit import Bench, Circuit
from neurograft.core.taps.head_means import Means


def need_circuit(circuit: Circuit | None) -> Circuit:
    """Refuse to work without a circuit."""
    if not circuit:
        raise RequestError(
            "no circuit", expected="groups of heads by name", do="circuit={'fetchers': Group(heads, 'end')}"
        )
    return circuit


@contextmanager
def bench(
    made: Change,
    batches: Sequence[Batch],
    reference: Sequence[Batch] | None,
    *,
    query: str,
    elsewhere: str = "ablate",
    metric: str = "accuracy",
) -> Iterator[Bench]:
    """Give the changed model, evaluating, its heads and their means over the reference prompts."""
    if not reference:
        raise RequestError(
            "no reference prompts",
            expected="prompts of other scenes, whose queries nothing answers, to take the heads' means over",
            do="pass reference=batches",
        )
    with evaluating(made.model, made.tuned), made.on() as net:
        yield of_model(net, batches, reference, query=query, elsewhere=elsewhere, metric=metric)


def of_model(net: nn.Module, batches: Sequence[Batch], reference: Sequence[Batch], **how: str) -> Bench:
    """Return a bench on a model as it is."""
    where = sites_of(net, "head")
    return Bench(net, where, batches, Means.of(net, where, reference), **how)
