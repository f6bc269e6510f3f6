"""Circuits: groups of attention heads, each at work at one place of the prompt, and the model without the rest.

Shape letters: B rows, T tokens, n heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from neurograft.core.batches import Batch
from neurograft.core.errors import RequestError, one_of
from neurograft.core.prompts.answering import credit
from neurograft.core.prompts.places import place
from neurograft.core.seeds import generator
from neurograft.core.selection import Selection
from neurograft.core.taps.head_means import Means
from neurograft.core.taps.tap import change
from neurograft.core.units import Site

METRICS = ("accuracy", "probability")
ELSEWHERE = ("ablate", "keep")


@dataclass(frozen=True)
class Group:
    """Heads that do one thing.

    Args:
        where: the heads.
        at: the place at which they do it; see `core.prompts.places`.
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


def ratio(part: float, whole: float) -> float | None:
    """Return part / whole; None where that means nothing."""
    return part / whole if whole and math.isfinite(whole) else None
