"""A supernet over a frozen backbone: every unit has a tuned copy and an adapter, and a path says which are used.

A path is a bit vector [2 K]: of each unit, whether the tuned copy stands for the pretrained weights, and whether the
adapter is attached. Everything but a prefix is a change of weights, so paths are run by `functional_call`:

| unit | copy | adapter |
|---|---|---|
| a convolution | its weight | alpha, 1 x 1, beside it: the kernel's middle moves by alpha |
| a block of attention and FFN | all it holds | offsets behind both: their output biases move; a prefix |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from neurograft.core.numerics.prototypes import class_means, cosines, prototypical
from neurograft.core.prefix import Prefix
from neurograft.core.seeds import generator
from neurograft.train.adaptable import Featured, Unit


@dataclass(frozen=True)
class Episode:
    """A support and a query set; labels number the episode's classes from 0."""

    support: Mapping[str, Tensor]
    support_labels: Tensor
    query: Mapping[str, Tensor]
    query_labels: Tensor


@dataclass
class Supernet:
    """The backbone with copies and adapters.

    Args:
        model: frozen, in evaluation mode.
        units: what may be copied and adapted.
        prefix: tokens of a prefix.
        seed: names the prefixes' start.

    Example:
        >>> from neurograft.train.adaptable import units_of
        >>> from neurograft.worlds.pico import pico
        >>> net = pico("vit")
        >>> supernet = Supernet(net, units_of(net), prefix=1)
        >>> path = torch.tensor([0.0, 1.0, 0.0, 0.0])
        >>> [name.rsplit(".", 2)[-2:] for name in supernet.awake(path)][:2]
        [['o_proj', 'bias::offset'], ['fc2', 'bias::offset']]
    """

    model: nn.Module
    units: Sequence[Unit]
    prefix: int = 2
    seed: int = 0
    own: dict[str, nn.Parameter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base = {n: p.detach() for n, p in self.model.named_parameters()}
        self.featured = Featured(self.model)
        for unit in self.units:
            for name in unit.copied:
                self.own[f"{name}::copy"] = nn.Parameter(self.base[name].clone())
            if unit.middle is not None:
                self.own[f"{unit.middle}::alpha"] = nn.Parameter(
                    self.base[unit.middle].new_zeros(self.base[unit.middle].shape[:2])
                )
            for name in unit.offsets:
                self.own[f"{name}::offset"] = nn.Parameter(torch.zeros_like(self.base[name]))
            if unit.attention is not None:
                like = self.base[f"{unit.attention}.k_proj.weight"]
                for part in ("keys", "values"):
                    rng = generator(self.seed, "prefix", unit.attention, part)
                    start = 0.02 * torch.randn(self.prefix, len(like), generator=rng).to(like)
                    self.own[f"{unit.attention}::{part}"] = nn.Parameter(start)

    def awake(self, path: Tensor) -> list[str]:
        """Return the names of what a path trains."""
        names = []
        for unit, (tuned, adapted) in zip(self.units, path.reshape(-1, 2).tolist()):
            names += [f"{n}::copy" for n in unit.copied] if tuned else []
            if adapted:
                names += [f"{unit.middle}::alpha"] if unit.middle is not None else []
                names += [f"{n}::offset" for n in unit.offsets]
                names += [f"{unit.attention}::{p}" for p in ("keys", "values")] if unit.attention is not None else []
        return names

    def weights(self, path: Tensor, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of a path that are not the backbone's."""
        found: dict[str, Tensor] = {}
        for unit, (tuned, adapted) in zip(self.units, path.reshape(-1, 2).tolist()):
            for name in unit.copied if tuned else ():
                found[name] = own[f"{name}::copy"]
            if adapted and unit.middle is not None:
                weight = found.get(unit.middle, self.base[unit.middle])
                high, wide = (k // 2 for k in weight.shape[2:])
                alpha = own[f"{unit.middle}::alpha"][:, :, None, None]
                found[unit.middle] = weight + nn.functional.pad(alpha, (wide, wide, high, high))
            for name in unit.offsets if adapted else ():
                found[name] = found.get(name, self.base[name]) + own[f"{name}::offset"]
        return found

    def features(self, path: Tensor, inputs: Mapping[str, Tensor], own: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the features [B, d] that a path gives."""
        own = self.own if own is None else own
        with self._prefixed(path, own):
            swapped = {f"model.{n}": w for n, w in {**self.base, **self.weights(path, own)}.items()}
            found: Tensor = functional_call(self.featured, swapped, (), dict(inputs))
        return found

    @contextmanager
    def _prefixed(self, path: Tensor, own: Mapping[str, Tensor]) -> Iterator[None]:
        with ExitStack() as stack:
            for prefix in self.prefixes(path, own):
                stack.callback(prefix.mount(self.model).remove)
            yield

    def prefixes(self, path: Tensor, own: Mapping[str, Tensor]) -> list[Prefix]:
        """Return the prefixes of a path."""
        chosen = [u.attention for u, (_, adapted) in zip(self.units, path.reshape(-1, 2).tolist()) if adapted]
        return [Prefix(n, own[f"{n}::keys"], own[f"{n}::values"]) for n in chosen if n is not None]

    def loss(self, path: Tensor, episode: Episode, own: Mapping[str, Tensor], *, on_support: bool = False) -> Tensor:
        """Return the prototypical loss of an episode's query, or of its support."""
        known = self.features(path, episode.support, own)
        if on_support:
            return prototypical(known, episode.support_labels, known, episode.support_labels)
        asked = self.features(path, episode.query, own)
        return prototypical(known, episode.support_labels, asked, episode.query_labels)

    def train(self, episodes: Iterable[Episode], *, optimizer: str, lr: float, decay: float = 0.01) -> list[float]:
        """Take one step of a uniformly drawn path on each episode, and return the losses."""
        rng = generator(self.seed, "supernet")
        step = getattr(torch.optim, optimizer)(self.own.values(), lr=lr, weight_decay=decay)
        losses = []
        for episode in episodes:
            path = torch.randint(2, (2 * len(self.units),), generator=rng).double()
            loss = self.loss(path, episode, self.own)
            step.zero_grad(set_to_none=True)
            if loss.requires_grad:
                loss.backward()
                step.step()
            losses.append(float(loss.detach()))
        return losses

    def tuned(
        self, path: Tensor, episode: Episode, *, steps: int, optimizer: str, lr: float, decay: float = 0.01
    ) -> tuple[dict[str, Tensor], float]:
        """Fine-tune a path on an episode's support, from the supernet's weights, and return it and its support loss."""
        own = {n: nn.Parameter(self.own[n].detach().clone()) for n in self.awake(path)}
        if not own:
            with torch.no_grad():
                return {}, float(self.loss(path, episode, own, on_support=True))
        step = getattr(torch.optim, optimizer)(own.values(), lr=lr, weight_decay=decay)
        for _ in range(steps):
            step.zero_grad(set_to_none=True)
            self.loss(path, episode, own, on_support=True).backward()
            step.step()
        with torch.no_grad():
            return {n: p.detach() for n, p in own.items()}, float(self.loss(path, episode, own, on_support=True))

    @torch.no_grad()
    def accuracy(self, path: Tensor, episode: Episode, own: Mapping[str, Tensor]) -> float:
        """Return the share of the query that lies nearest to its own class mean."""
        means = class_means(self.features(path, episode.support, own), episode.support_labels)
        said = cosines(self.features(path, episode.query, own), means).argmax(-1)
        return float((said == episode.query_labels).double().mean())
