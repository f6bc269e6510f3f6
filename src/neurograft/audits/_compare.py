"""What two models say of the same places: the comparison itself, in a few numbers for each place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from neurograft.audits._scoring import Scored
from neurograft.core.errors import RequestError


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


def compared(base: Scored, new: Scored, start: int) -> Paired:
    """Compare log-probabilities [N, V] with logits [N, V'], V' >= V: classes the base lacks are left out."""
    classes = base.classes
    if len(base.labels) != len(new.labels) or new.classes < classes:
        raise RequestError(
            f"{(len(new.labels), new.classes)} logits under the change and {(len(base.labels), classes)} of the base",
            expected="the same places and at least the base's classes",
            do="give a change of this base, and data the base can read",
        )
    known = base.labels < classes
    if not bool(known.all()):
        base, new = base.only(known), new.only(known)
    logp = base.logits
    columns: dict[str, Tensor] = {}
    for at, logits in new.pieces():
        for name, values in _rows(logp[at], logits[:, :classes], base.labels[at]).items():
            # Into one tensor: small results kept between large ones would pin the allocator's heap.
            columns.setdefault(name, values.new_empty(len(base.labels)))[at] = values
    return Paired(base.rows.cpu() + start, **columns, items=0, classes=classes)


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


def joined(pieces: Sequence[Paired], items: int) -> Paired:
    """Return what was compared batch by batch as one.

    Args:
        pieces: of the batches, their items numbered through.
        items: how many there are in all, those without a label too.

    Raises:
        RequestError: no place has a label, or the changed model's output is NaN.
    """
    names = [f.name for f in fields(Paired) if f.name not in ("items", "classes")]
    columns = {n: torch.cat([getattr(p, n) for p in pieces]) for n in names}
    for name in ("new_logp", "kl"):
        if bool(columns[name].isnan().any()):
            raise RequestError(
                "a changed model whose output is NaN on this data",
                expected="finite logits",
                do="train again with a smaller learning rate; this change cannot be audited",
            )
    if not len(columns["item"]):
        raise RequestError(
            "data in which nothing has a label", expected="labelled places", do="raise the truncation length"
        )
    return Paired(**columns, items=items, classes=max(p.classes for p in pieces))
