"""Circuits: groups of attention heads, each at work at one place of the prompt, and the model without the rest.

Shape letters: B rows, T tokens, n heads, w features of a head, D distances from the end of the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.context import Batch
from neurograft.core.errors import RequestError, one_of
from neurograft.core.intervene import capture
from neurograft.core.places import answers, ends, place, rows_of
from neurograft.core.seeds import generator
from neurograft.core.selection import Selection
from neurograft.core.tap import change
from neurograft.core.units import Site

METRICS = ("accuracy", "probability")
ELSEWHERE = ("ablate", "keep")


@dataclass(frozen=True)
class Group:
    """Heads that do one thing.

    Args:
        where: the heads.
        at: the place at which they do it; see `core.places`.
    """

    where: Selection
    at: str = "end"


Circuit = Mapping[str, Group]
Unit = tuple[str, str, int]  # group, site, head


def units_of(circuit: Circuit) -> list[Unit]:
    """Return every head of every group; one that stands in two groups is there twice."""
    found = [(g, s, int(i)) for g, group in circuit.items() for s, ids in group.where.ids.items() for i in ids]
    if not found:
        raise RequestError("a circuit without a head", expected="at least one", do="take more heads into its groups")
    return found


def without(circuit: Circuit, gone: Sequence[Unit]) -> dict[str, Group]:
    """Return the circuit less some heads; groups may become empty."""
    found = {}
    for name, group in circuit.items():
        ids = {s: [int(i) for i in old if (name, s, int(i)) not in gone] for s, old in group.where.ids.items()}
        found[name] = replace(group, where=Selection.of(group.where.sites, ids, group.where.card))
    return found


def random_like(circuit: Circuit, seed: int = 0) -> dict[str, Group]:
    """Return as many random heads in each group, of all the model's, at the same places."""
    found = {}
    for name, group in circuit.items():
        every = [(s, i) for s, site in group.where.sites.items() for i in range(site.n)]
        order = torch.randperm(len(every), generator=generator(seed, "random circuit", name))[: len(group.where)]
        ids: dict[str, list[int]] = {}
        for k in order.tolist():
            ids.setdefault(every[k][0], []).append(every[k][1])
        card = {"rule": "random_like", "of": [group.where.digest], "seed": seed}
        found[name] = replace(group, where=Selection.of(group.where.sites, ids, card))
    return found


@dataclass(frozen=True)
class Means:
    """What heads do on average, by how far before the end of the prompt.

    Args:
        values: site name -> float32 [D, n, w], row 0 at the end.
    """

    values: Mapping[str, Tensor]

    @staticmethod
    def of(model: nn.Module, sites: Mapping[str, Site], batches: Sequence[Batch]) -> Means:
        """Measure them on reference prompts, such as other scenes with queries that nothing answers.

        Raises:
            RequestError: no batches.
        """
        if not batches:
            raise RequestError("no reference prompts", expected="data to take means over", do="give corrupt prompts")
        longest = max(int(ends(b).max()) + 1 for b in batches)
        count = torch.zeros(longest, dtype=torch.float64)
        total: dict[str, Tensor] = {}
        for batch in batches:
            last = ends(batch).cpu()
            far = last[:, None] - torch.arange(batch["input_ids"].shape[1])
            inside = far >= 0
            count.index_add_(0, far[inside], torch.ones(int(inside.sum()), dtype=torch.float64))
            for name, x in capture(model, sites, batch).items():
                here = x[inside].double()
                total.setdefault(name, torch.zeros(longest, *here.shape[1:], dtype=torch.float64))
                total[name].index_add_(0, far[inside], here)
        shape = {name: (longest, *[1] * (t.dim() - 1)) for name, t in total.items()}
        return Means({name: (t / count.reshape(shape[name])).float() for name, t in total.items()})

    def at(self, name: str, batch: Batch) -> Tensor:
        """Return the means at a batch's tokens, [B, T, n, w]; behind the end those at the end.

        Raises:
            RequestError: a prompt longer than every reference prompt.
        """
        far = (ends(batch).cpu()[:, None] - torch.arange(batch["input_ids"].shape[1])).clamp(min=0)
        if int(far.max()) >= len(self.values[name]):
            raise RequestError(
                f"a prompt of {int(far.max()) + 1} tokens",
                expected=f"at most the {len(self.values[name])} of the reference prompts",
                do="give reference prompts of the same lengths",
            )
        return self.values[name][far]


@dataclass(frozen=True)
class Bench:
    """Where circuits are run: prompts, what stands in for heads left out, and what counts as an answer.

    Args:
        model: the model, evaluating; left as found.
        sites: all its heads.
        batches: prompts with answers.
        means: of this model.
        query: the place whose token mentions are like.
        elsewhere: what heads do where no group is at work: "ablate" (their means) or "keep".
        metric: "accuracy", or "probability", the mean chance of the answer.
    """

    model: nn.Module
    sites: Mapping[str, Site]
    batches: Sequence[Batch]
    means: Means
    query: str = "end-2"
    elsewhere: str = "ablate"
    metric: str = "accuracy"

    def __post_init__(self) -> None:
        one_of(self.metric, METRICS, what="metric")
        one_of(self.elsewhere, ELSEWHERE, what="word for heads elsewhere")

    def whole(self) -> float:
        """Return how well the model answers."""
        return self._scored(None)

    def alone(self, circuit: Circuit) -> float:
        """Return how well the circuit answers, every other head at its mean."""
        return self._scored(lambda batch: self.kept(circuit, batch))

    def knocked(self, circuit: Circuit, gone: Sequence[Unit]) -> float:
        """Return how well the model answers with some heads at their means, each at its group's place."""
        only = without(circuit, [u for u in units_of(circuit) if u not in gone])
        return self._scored(lambda batch: {n: ~flags for n, flags in self._places(only, batch)[0].items()})

    def kept(self, circuit: Circuit, batch: Batch) -> dict[str, Tensor]:
        """Return which heads stay as they are where, bool [B, T, n]."""
        flags, vital = self._places(circuit, batch)
        if self.elsewhere == "keep":
            flags = {n: f | ~vital[..., None] for n, f in flags.items()}
        return flags

    def _places(self, circuit: Circuit, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        shape = tuple(batch["input_ids"].shape)
        flags = {n: torch.zeros(*shape, s.n, dtype=torch.bool) for n, s in self.sites.items()}
        vital = torch.zeros(shape, dtype=torch.bool)
        for group in circuit.values():
            here = place(batch, group.at, query=self.query).flags(shape[1]).cpu()
            vital |= here
            for name, ids in group.where.ids.items():
                flags[name][..., ids] |= here[..., None]
        return flags, vital

    def _scored(self, kept: Callable[[Batch], dict[str, Tensor]] | None) -> float:
        total, count = 0.0, 0
        for batch in self.batches:
            with nullcontext() if kept is None else held(self.model, self.sites, kept(batch), self.means, batch):
                total += float(credit(self.model, batch, self.metric).sum())
            count += len(batch["input_ids"])
        if not count:
            raise RequestError("no prompts", expected="prompts with answers", do="give data")
        return total / count


@contextmanager
def held(
    model: nn.Module, sites: Mapping[str, Site], kept: Mapping[str, Tensor], means: Means, batch: Batch
) -> Iterator[None]:
    """Put heads at their means but where they are kept, for passes of this batch."""
    values = {name: means.at(name, batch) for name in sites}

    def fn(name: str, x: Tensor) -> Tensor:
        keep = kept[name].to(x.device)
        return torch.where(keep.reshape(*keep.shape, *[1] * (x.dim() - keep.dim())), x, values[name].to(x))

    with change(model, sites, fn):
        yield


@torch.no_grad()
def said(model: nn.Module, batch: Batch) -> Tensor:
    """Return log-probabilities at the end of each prompt, float64 [B, V]."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logits = model(**inputs).logits
    finish = ends(batch).to(logits.device)
    found: Tensor = logits[torch.arange(len(finish), device=logits.device), finish].double().log_softmax(-1)
    return found


def credit(model: nn.Module, batch: Batch, metric: str) -> Tensor:
    """Return each row's credit, float64 [B]: whether its answer is the likeliest token, or its probability."""
    logp, answer = said(model, batch), answers(batch)
    if metric == "accuracy":
        return (logp.argmax(-1) == answer.to(logp.device)).double()
    return logp.gather(1, answer.to(logp.device)[:, None])[:, 0].exp()


def ratio(part: float, whole: float) -> float | None:
    """Return part / whole; None where that means nothing."""
    return part / whole if whole and math.isfinite(whole) else None


def paired(clean: Sequence[Batch], other: Sequence[Batch]) -> Iterator[tuple[Batch, Batch]]:
    """Yield batches side by side.

    Raises:
        RequestError: they are not row for row the same number.
    """
    sizes = [[len(b["input_ids"]) for b in side] for side in (clean, other)]
    if sizes[0] != sizes[1] or not sizes[0]:
        raise RequestError(
            f"batches of {sizes[0][:4]} and {sizes[1][:4]} prompts",
            expected="a second prompt for each prompt",
            do="give rows with `positive` and `negative`",
        )
    yield from zip(clean, other)


def both(clean: Batch, other: Batch, at: Any, there: Any) -> tuple[Batch, Batch, Tensor, Tensor]:
    """Return two batches cut to the rows that have both places, and these places."""
    keep = (at.found & there.found.to(at.found.device)).nonzero()[:, 0]
    return rows_of(clean, keep), rows_of(other, keep), at.at[keep], there.at[keep.to(there.at.device)]
