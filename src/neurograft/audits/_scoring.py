"""From a batch to what a model says of each labelled place in it, whatever the kind of model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neurograft.core.context import IGNORE, Batch, shifts
from neurograft.core.errors import RequestError
from neurograft.core.running import run

Sums = tuple[Tensor, Tensor]
CHUNK = 1 << 20  # logits that are made float32 at a time


@dataclass(frozen=True)
class Scored:
    """The labelled places of a batch, in order of its rows.

    A model's output is kept as it came, and read a few places at a time: over a large vocabulary it is the largest
    tensor there is, and a float32 copy of it the second.

    Args:
        blocks: logits [M, V], and which of the M places have a label (int64, None for all); one after another.
        labels: int64 [N].
        rows: which row of the batch each place belongs to, int64 [N].
        size: rows of the batch, also those without a labelled place.
    """

    blocks: Sequence[tuple[Tensor, Tensor | None]]
    labels: Tensor
    rows: Tensor
    size: int

    @property
    def classes(self) -> int:
        """V."""
        return self.blocks[0][0].shape[-1]

    @property
    def logits(self) -> Tensor:
        """The logits of all labelled places, [N, V]."""
        found = [said if at is None else said[at] for said, at in self.blocks]
        return found[0] if len(found) == 1 else torch.cat(found)

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield which of the N places, and their logits [n, V], about `CHUNK` numbers at a time."""
        step, first = max(1, CHUNK // self.classes), 0
        for said, at in self.blocks:
            count = len(said if at is None else at)
            for i in range(0, max(1, count), step):
                part = said[i : i + step] if at is None else said[at[i : i + step]]
                yield slice(first + i, first + i + len(part)), part
            first += count

    @property
    def log_probs(self) -> Tensor:
        """Log-probability of each label, float32 [N] on the CPU."""
        found = torch.empty(len(self.labels))
        for where, logits in self.pieces():
            labels = self.labels[where].to(logits.device)
            found[where] = logits.float().log_softmax(-1).gather(1, labels[:, None])[:, 0].cpu()
        return found

    @property
    def right(self) -> Tensor:
        """Whether the likeliest class is the label, bool [N] on the CPU."""
        found = torch.empty(len(self.labels), dtype=torch.bool)
        for where, logits in self.pieces():
            found[where] = (logits.argmax(-1) == self.labels[where].to(logits.device)).cpu()
        return found

    @property
    def counts(self) -> Tensor:
        """Labelled places of each row, int64 [size] on the CPU."""
        return torch.bincount(self.rows.cpu(), minlength=self.size)

    def by_row(self, values: Tensor) -> Tensor:
        """Return a number for each place, [N] on the CPU, summed over the places of each row, float64 [size]."""
        return torch.zeros(self.size, dtype=torch.float64).index_add_(0, self.rows.cpu(), values.double())

    def only(self, keep: Tensor) -> Scored:
        """Return some of the places, by a mask [N]."""
        blocks, first = [], 0
        for said, at in self.blocks:
            places = torch.arange(len(said), device=said.device) if at is None else at
            blocks.append((said, places[keep[first : first + len(places)].to(places.device)]))
            first += len(places)
        return Scored(blocks, self.labels[keep], self.rows[keep], self.size)


def scored(model: nn.Module, batch: Batch) -> Scored:
    """Run a model and gather its logits where there are labels.

    Causal language models are scored on the next token, and on the text itself if it has no labels; a token
    behind padding is not scored. Classifiers have one place in each row; masked language models, sequence-to-
    sequence models and token or pixel classifiers one for each label other than -100.

    Raises:
        RequestError: no labels, labels that are no classes, or logits of another shape.
    """
    labels = _labels(model, batch)
    logits = _logits(model, batch)
    if not shifts(model) and logits.dim() == labels.dim() + 1 and logits.shape[:-1] != labels.shape:
        logits = logits.movedim(1, -1)
    places, whole, first = torch.ones_like(labels, dtype=torch.bool), logits, 0
    if shifts(model):
        attention = batch.get("attention_mask")
        first = max(0, logits.shape[1] - labels.shape[1])
        logits, labels, places = logits[:, first:][:, :-1], labels[:, 1:], places[:, 1:]
        if attention is not None and attention.dim() == 2 and attention.shape[1] == labels.shape[1] + 1:
            places = attention[:, :-1].bool()
    if logits.shape[:-1] != labels.shape:
        raise RequestError(
            f"logits of shape {tuple(logits.shape)} for labels of shape {tuple(labels.shape)}",
            expected="one row of logits for each label",
            do="give metrics=callable(model, batch) for this kind of model",
        )
    keep = places.to(labels.device) & (labels != IGNORE)
    rows = torch.arange(len(labels), device=labels.device).view(-1, *[1] * (labels.dim() - 1)).expand_as(labels)
    at = keep.to(whole.device)
    if shifts(model):
        at = torch.zeros(whole.shape[:2], dtype=torch.bool, device=whole.device)
        at[:, first : first + keep.shape[1]] = keep.to(whole.device)
    said = whole.reshape(-1, whole.shape[-1])
    return Scored([(said, at.reshape(-1).nonzero()[:, 0])], labels[keep], rows[keep], len(labels))


def _labels(model: nn.Module, batch: Batch) -> Tensor:
    labels = batch.get("labels")
    if labels is None and shifts(model) and "input_ids" in batch:
        labels = batch["input_ids"]
        attention = batch.get("attention_mask")
        if attention is not None and attention.shape == labels.shape:
            labels = labels.masked_fill(attention == 0, IGNORE)
    if labels is None:
        raise RequestError(
            f"a batch without labels ({', '.join(batch)})",
            expected="labels",
            do="give labelled data, or metrics=callable(model, batch)",
        )
    if labels.is_floating_point():
        raise RequestError(
            f"labels of dtype {labels.dtype}",
            expected="classes, whole numbers",
            do="give metrics=callable(model, batch) for regression and multi-label data",
        )
    return labels


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    outputs = run(model, batch)
    found = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(found, Tensor):
        raise RequestError(
            f"a model whose output is a {type(outputs).__name__} without logits",
            expected="logits",
            do="give metrics=callable(model, batch) for this kind of model",
        )
    return found


def halves(batch: Batch) -> list[Batch]:
    """Return a batch as two, cut between rows; as it is where a tensor has another first axis.

    Example:
        >>> [list(h["x"]) for h in halves({"x": torch.arange(3)})]
        [[tensor(0)], [tensor(1), tensor(2)]]
    """
    tensors = [v for v in batch.values() if isinstance(v, Tensor)]
    sizes = {v.shape[0] if v.dim() else 0 for v in tensors}
    if len(sizes) != 1 or max(sizes) < 2 or len(tensors) != len(batch):
        return [batch]
    half = max(sizes) // 2
    return [{k: v[:half] for k, v in batch.items()}, {k: v[half:] for k, v in batch.items()}]


def scored_in_halves(model: nn.Module, batch: Batch) -> Scored:
    """Score a batch in two halves, in the places and order of the whole."""
    parts, size = [], 0
    for half in halves(batch):
        found = scored(model, half)
        parts.append(Scored(found.blocks, found.labels, found.rows + size, found.size))
        size += found.size
    labels, rows = (torch.cat([getattr(p, f) for p in parts]) for f in ("labels", "rows"))
    return Scored([block for p in parts for block in p.blocks], labels, rows, size)


def label_sums(model: nn.Module, batches: Sequence[Batch], *, split: bool = False) -> Sums:
    """Return by item the summed log-probability of its labels and their number, float64 [items] twice."""
    sums, counts = [], []
    for batch in batches:
        found = scored_in_halves(model, batch) if split else scored(model, batch)
        sums.append(found.by_row(found.log_probs))
        counts.append(found.counts.double())
    return torch.cat(sums), torch.cat(counts)


def mean_fall(before: Sums, after: Sums) -> float:
    """Return by how much the mean log-probability of the labels fell."""
    return float((before[0] - after[0]).sum() / before[1].sum())
