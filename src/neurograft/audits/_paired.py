"""The paired forward: a base and its changes on the same batches, place by place, in bounded memory.

Of the base only the log-probabilities of a group of batches are held at a time; of everything a few numbers
for each labelled place are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from neurograft.audits._changes import Change, Null, Rerun, as_change, evaluating
from neurograft.audits._compare import Paired, compared, joined
from neurograft.audits._scoring import Scored, scored, scored_in_halves
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError

BUDGET = 1 << 26
Metric = Callable[[nn.Module, Batch], Any]


class Switch(Protocol):
    """What can be put on: a `Change`, a `Null`, a `Rerun`."""

    split: bool

    def on(self) -> Any:
        """Return a context manager that gives the model to run."""


Runs = dict[str, Paired]


def runs(
    model: nn.Module, change: object, batches: Sequence[Batch], *, nulls: int = 8, seed: int = 0, budget: int = BUDGET
) -> Runs:
    """Run base, change, the base again, and random changes of the same size.

    Args:
        model: the base, left as found.
        change: a graft, grafts, or a tuned model.
        batches: model inputs with labels, on the model's device.
        nulls: how many random changes.
        seed: names their draws.
        budget: numbers of the base's log-probabilities held at a time.

    Returns:
        "change", "rerun" and "null/0", "null/1", ... -> what was measured.

    Raises:
        RequestError: no batches, no labels, NaN, or labels that are no classes.
    """
    return paired(model, switches_of(model, change, nulls=nulls, seed=seed), batches, budget=budget)


def switches_of(model: nn.Module, change: object, *, nulls: int, seed: int) -> dict[str, Switch]:
    """Return what is run beside the base: the change, the base again, random changes of the same size."""
    made = as_change(model, change)
    found: dict[str, Switch] = {"change": made, "rerun": Rerun(model)}
    if made.weights and not made.empty:
        found |= {f"null/{i}": Null(made, seed * 1000 + i) for i in range(nulls)}
    return found


def paired(model: nn.Module, switches: Mapping[str, Switch], batches: Sequence[Batch], *, budget: int = BUDGET) -> Runs:
    """Run the base and several changes on the same batches; see `Paired` for what is kept."""
    pieces: dict[str, list[Paired]] = {name: [] for name in switches}
    items = 0
    tuned = [s.tuned for s in switches.values() if isinstance(s, Change)]
    with evaluating(model, *tuned):
        for group, bases in _groups(model, batches, budget):
            for name, switch in switches.items():
                start = items
                with switch.on() as changed:
                    for batch, base in zip(group, bases):
                        found = scored_in_halves(changed, batch) if switch.split else scored(changed, batch)
                        pieces[name].append(compared(base, found, start))
                        del found  # the whole output of a batch, which the next one would have to stand beside
                        start += base.size
            items += sum(b.size for b in bases)
    if not items:
        raise RequestError("no batches", expected="at least one", do="give data with at least one row")
    return {name: joined(found, items) for name, found in pieces.items()}


def metric_runs(
    model: nn.Module, switches: Mapping[str, Switch], batches: Sequence[Batch], metric: Metric
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return a callable's value for every item under the base and under each change, float64 [n] twice.

    Raises:
        RequestError: the callable returns numbers that are not finite, or another count under a change.
    """
    tuned = [s.tuned for s in switches.values() if isinstance(s, Change)]
    with evaluating(model, *tuned):
        base = _valued(model, batches, metric)
        found = {}
        for name, switch in switches.items():
            with switch.on() as changed:
                found[name] = (base, _valued(changed, batches, metric))
            if len(found[name][1]) != len(base):
                raise RequestError(
                    f"a metric with {len(base)} values for the base and {len(found[name][1])} for the change",
                    expected="one number for each item",
                    do="let the metric return one value for each row of the batch",
                )
    return found


def _valued(model: nn.Module, batches: Sequence[Batch], metric: Metric) -> Tensor:
    values = [torch.as_tensor(metric(model, batch), dtype=torch.float64).reshape(-1).cpu() for batch in batches]
    found = torch.cat(values) if values else torch.zeros(0, dtype=torch.float64)
    if not len(found) or not bool(found.isfinite().all()):
        raise RequestError(
            "a metric without values or with values that are not finite",
            expected="a finite number for each item",
            do="check the metric on one batch of the data",
        )
    return found


def _groups(model: nn.Module, batches: Sequence[Batch], budget: int) -> Iterator[tuple[list[Batch], list[Scored]]]:
    """Yield batches with the base's log-probabilities, as many at a time as the budget holds, at least one."""
    group: list[Batch] = []
    bases: list[Scored] = []
    held = 0
    for batch in batches:
        found = scored(model, batch)
        logp = _log_probs(found)
        group.append(batch)
        bases.append(Scored([(logp, None)], found.labels, found.rows, found.size))
        held += logp.numel()
        del found, logp
        if held >= budget:
            yield group, bases
            group, bases, held = [], [], 0
    if group:
        yield group, bases


def _log_probs(found: Scored) -> Tensor:
    """Return the log-probabilities of all classes, float32 [N, V], filled in a few places at a time."""
    made = torch.empty(len(found.labels), found.classes, device=found.blocks[0][0].device)
    for at, logits in found.pieces():
        made[at] = logits.float().log_softmax(-1)
        if bool(made[at].isnan().any()):
            raise RequestError(
                "a base whose output is NaN on this data", expected="finite logits", do="check the data and the dtype"
            )
    return made
