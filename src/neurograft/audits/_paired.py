"""The paired forward: a base and its changes on the same batches, place by place, in bounded memory.

Of the base only the log-probabilities of a group of batches are held at a time; of everything a few numbers
for each labelled place are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from neurograft.audits._changes import Change, Null, Rerun, as_change, evaluating
from neurograft.audits._scoring import Scored, scored, scored_in_halves
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError

BUDGET = 1 << 26
CHUNK = 1 << 23
Metric = Callable[[nn.Module, Batch], Any]


class Switch(Protocol):
    """What can be put on: a `Change`, a `Null`, a `Rerun`."""

    split: bool

    def on(self) -> Any:
        """Return a context manager that gives the model to run."""


@dataclass
class Paired:
    """What a base and a changed model say of the same N labelled places; floats are float32 on the CPU.

    Args:
        item: the item (row of the data) a place belongs to, int64 [N].
        base_logp: log-probability of the label.
        new_logp: the same under the change.
        kl: KL(base || changed) in nats.
        kl_reverse: KL(changed || base).
        base_entropy: of the predicted distribution, in nats.
        new_entropy: the same under the change.
        base_top: confidence, the largest probability.
        new_top: the same under the change.
        base_right: whether the most likely class is the label, bool.
        new_right: the same under the change.
        flip: whether the most likely class is another one under the change, bool.
        base_brier: sum over classes of (p - [class is the label])^2.
        new_brier: the same under the change.
        items: number of items, also those without a labelled place.
        classes: number of classes compared.
    """

    item: Tensor
    base_logp: Tensor
    new_logp: Tensor
    kl: Tensor
    kl_reverse: Tensor
    base_entropy: Tensor
    new_entropy: Tensor
    base_top: Tensor
    new_top: Tensor
    base_right: Tensor
    new_right: Tensor
    flip: Tensor
    base_brier: Tensor
    new_brier: Tensor
    items: int = 0
    classes: int = 0

    def __len__(self) -> int:
        return len(self.item)

    def per_item(self, *values: Tensor) -> Tensor:
        """Return sums by item and, in the last column, the number of places; items without any are left out.

        Returns:
            float64 [items, len(values) + 1], for `estimate`.
        """
        columns = torch.stack([*(v.double() for v in values), torch.ones(len(self.item), dtype=torch.float64)], 1)
        sums = torch.zeros(self.items, columns.shape[1], dtype=torch.float64).index_add_(0, self.item, columns)
        return sums[sums[:, -1] > 0]


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
                        pieces[name].append(_compared(base, found, start))
                        start += base.size
            items += sum(b.size for b in bases)
    if not items:
        raise RequestError("no batches", expected="at least one", do="give data with at least one row")
    return {name: _joined(found, items) for name, found in pieces.items()}


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
        base = Scored(found.logits.float().log_softmax(-1), found.labels, found.rows, found.size)
        if bool(base.logits.isnan().any()):
            raise RequestError(
                "a base whose output is NaN on this data", expected="finite logits", do="check the data and the dtype"
            )
        group.append(batch)
        bases.append(base)
        held += base.logits.numel()
        if held >= budget:
            yield group, bases
            group, bases, held = [], [], 0
    if group:
        yield group, bases


def _compared(base: Scored, new: Scored, start: int) -> Paired:
    """Compare log-probabilities [N, V] with logits [N, V'], V' >= V: classes the base lacks are left out."""
    classes = base.logits.shape[-1]
    if len(base.labels) != len(new.labels) or new.logits.shape[-1] < classes:
        raise RequestError(
            f"{tuple(new.logits.shape)} logits under the change and {tuple(base.logits.shape)} of the base",
            expected="the same places and at least the base's classes",
            do="give a change of this base, and data the base can read",
        )
    known = base.labels < classes
    labels, rows = base.labels[known], base.rows[known]
    if not bool(known.all()):
        base = Scored(base.logits[known.to(base.logits.device)], labels, rows, base.size)
        new = Scored(new.logits[known.to(new.logits.device)], labels, rows, new.size)
    step = max(1, CHUNK // classes)
    chunks = [
        _rows(base.logits[i : i + step], new.logits[i : i + step, :classes], labels[i : i + step])
        for i in range(0, max(1, len(labels)), step)
    ]
    joined = {f: torch.cat([c[f] for c in chunks]) for f in chunks[0]}
    return Paired(rows.cpu() + start, **joined, items=0, classes=classes)


def _rows(base: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    new = logits.to(base.device).float().log_softmax(-1)
    where = labels.to(base.device)[:, None]
    p, q, d = base.exp(), new.exp(), base - new
    found = {"base_logp": base.gather(1, where)[:, 0], "new_logp": new.gather(1, where)[:, 0]}
    found |= {"kl": _kl(p, q, d), "kl_reverse": _kl(q, p, -d)}
    tops = []
    for name, log, prob, own in (("base", base, p, found["base_logp"]), ("new", new, q, found["new_logp"])):
        top, index = prob.max(-1)
        tops.append(index)
        found |= {f"{name}_entropy": -(prob * log.clamp(min=-1e4)).sum(-1), f"{name}_top": top}
        found |= {f"{name}_right": index == where[:, 0]}
        found |= {f"{name}_brier": prob.square().sum(-1) - 2 * own.exp() + 1}
    found["flip"] = tops[0] != tops[1]
    return {k: v.cpu() for k, v in found.items()}


def _kl(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """Return sum of p * d - p + q with d = log p - log q: KL(p || q), every term at least 0.

    For near distributions p (d + expm1(-d)) keeps the digits that p * d alone would lose to rounding.
    """
    close = p * (d + torch.expm1(-d.clamp(-1, 1)))
    far = torch.where(p > 0, p * d, torch.zeros_like(p)) + q - p
    return torch.where(d.abs() < 1, close, far).sum(-1).clamp(min=0)


def _joined(pieces: Sequence[Paired], items: int) -> Paired:
    names = [f.name for f in fields(Paired) if f.name not in ("items", "classes")]
    joined = {n: torch.cat([getattr(p, n) for p in pieces]) for n in names}
    for name in ("new_logp", "kl"):
        if bool(joined[name].isnan().any()):
            raise RequestError(
                "a changed model whose output is NaN on this data",
                expected="finite logits",
                do="train again with a smaller learning rate; this change cannot be audited",
            )
    if not len(joined["item"]):
        raise RequestError(
            "data in which nothing has a label", expected="labelled places", do="raise the truncation length"
        )
    return Paired(**joined, items=items, classes=max(p.classes for p in pieces))
