"""Episodes of few-shot learning, drawn from examples in domains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from neurograft.core.errors import RequestError
from neurograft.train.supernet import Episode

Domain = tuple[Mapping[str, Tensor], Tensor]


def domain(name: str, examples: Sequence[Mapping[str, Tensor]], device: torch.device | str = "cpu") -> Domain:
    """Return examples as stacked inputs and labels [N].

    Raises:
        RequestError: an example without a label.
    """
    odd = next((i for i, e in enumerate(examples) if "labels" not in e), None)
    if odd is not None:
        raise RequestError(
            f"example {odd} of {name!r} without a label", expected="labelled examples", do="give every row a label"
        )
    inputs = {k: torch.stack([e[k] for e in examples]).to(device) for k in examples[0] if k != "labels"}
    return inputs, torch.stack([e["labels"] for e in examples]).reshape(-1).long().to(device)


def episodes(
    domains: Mapping[str, Domain], count: int, *, ways: int, shots: int, queries: int, rng: torch.Generator
) -> Iterator[Episode]:
    """Yield episodes: of a domain some classes, of each `shots` examples to learn from and `queries` to be asked.

    Raises:
        RequestError: a domain with too few classes, or too few examples of them.
    """
    pools = {name: _pools(name, labels, ways, shots + queries) for name, (_, labels) in domains.items()}
    names = list(domains)
    for _ in range(count):
        name = names[int(torch.randint(len(names), (1,), generator=rng))]
        (inputs, labels), pool = domains[name], pools[name]
        classes = torch.arange(ways, device=labels.device)
        chosen = torch.randperm(len(pool), generator=rng)[:ways].tolist()
        known, asked = [], []
        for c in chosen:
            rows = pool[c][torch.randperm(len(pool[c]), generator=rng)[: shots + queries]]
            known.append(rows[:shots])
            asked.append(rows[shots:])
        yield Episode(
            {k: v[torch.cat(known)] for k, v in inputs.items()},
            classes.repeat_interleave(shots),
            {k: v[torch.cat(asked)] for k, v in inputs.items()},
            classes.repeat_interleave(queries),
        )


def support(found: Domain) -> Episode:
    """Return a whole domain as the support of an episode that asks for nothing else, its classes numbered anew."""
    inputs, labels = found
    numbered = labels.unique(return_inverse=True)[1]
    return Episode(inputs, numbered, inputs, numbered)


def _pools(name: str, labels: Tensor, ways: int, least: int) -> list[Tensor]:
    pools = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    enough = [p for p in pools if len(p) >= least]
    if len(enough) < ways:
        raise RequestError(
            f"{len(enough)} classes with {least} examples or more in the domain {name!r}",
            expected=f"at least {ways}, for episodes of {ways} classes",
            do="give more examples, or pass fewer ways=, shots= or queries=",
        )
    return enough
