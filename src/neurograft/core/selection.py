"""Scores and selections: which units matter, and which of them we take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neurograft.core import unit_files
from neurograft.core.errors import RequestError, near
from neurograft.core.fingerprint import digest
from neurograft.core.numerics.chance import at_least, convolved, hypergeometric
from neurograft.core.resolve import resolve
from neurograft.core.seeds import generator
from neurograft.core.units import Site, census

EACH = "::each"  # what the names of scores per example end in, in a file


def _kinds(sites: Mapping[str, Site]) -> str:
    return f"units ({', '.join(dict.fromkeys(s.kind for s in sites.values()))})"


@dataclass(frozen=True)
class Scores:
    """A number for every unit.

    Args:
        sites: site name -> site.
        values: site name -> float32 [n].
        card: provenance: locator, options, data and model digests, seed.
        per_example: site name -> float32 [examples, n], where the locator was asked to keep them; for
            `selectors.vote`.

    Example:
        >>> from neurograft.core.units import Part
        >>> s = Scores({"a": Site("a", "row", 3, (Part.rows("w", (3, 2)),))}, {"a": torch.tensor([0.1, 0.9, 0.5])})
        >>> s.top(count=2).ids["a"].tolist()
        [1, 2]
    """

    sites: Mapping[str, Site]
    values: Mapping[str, Tensor]
    card: Mapping[str, Any] = field(default_factory=dict)
    per_example: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        both = [(name, value, 1) for name, value in self.values.items()]
        for name, value, axes in both + [(name, value, 2) for name, value in self.per_example.items()]:
            if name not in self.sites or value.dim() != axes or value.shape[-1] != self.sites[name].n:
                raise RequestError(
                    f"scores of shape {tuple(value.shape)} for {name!r}",
                    expected="one number for each unit of a known site",
                    do="score every unit once",
                )
            if not torch.isfinite(value).all():
                raise RequestError(
                    f"{int((~torch.isfinite(value)).sum())} scores of {name!r} that are not finite",
                    expected="finite numbers",
                    do="check the data for NaN and the model for overflow",
                )

    @cached_property
    def digest(self) -> str:
        """Digest of the scores."""
        return digest(dict(self.values))

    def __repr__(self) -> str:
        """Say what was scored; the numbers themselves would fill pages."""
        total = sum(s.n for s in self.sites.values())
        return f"<Scores: {total:,} {_kinds(self.sites)} in {len(self.sites)} sites>"

    def top(self, **options: Any) -> Selection:
        """Take the highest scores; `neurograft.selectors.top` documents the options."""
        found: Selection = resolve("neurograft.selectors.top")(self, **options)
        return found

    def bottom(self, **options: Any) -> Selection:
        """Take the lowest scores; `neurograft.selectors.bottom` documents the options."""
        found: Selection = resolve("neurograft.selectors.bottom")(self, **options)
        return found

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file."""
        each = {f"{name}{EACH}": value.clone() for name, value in self.per_example.items()}
        return unit_files.save(Path(path), "scores", self.sites, {**self.values, **each}, self.card)

    @staticmethod
    def load(path: str | Path) -> Scores:
        """Read what `save` wrote."""
        sites, tensors, card = unit_files.load(Path(path), "scores")
        each = {n.removesuffix(EACH): v for n, v in tensors.items() if n.endswith(EACH)}
        return Scores(sites, {n: v for n, v in tensors.items() if not n.endswith(EACH)}, card, each)


@dataclass(frozen=True)
class Selection:
    """Chosen units, sorted, by site.

    Args:
        sites: site name -> site, also those with no chosen unit, so that a complement means something.
        ids: site name -> sorted unit numbers, int64.
        card: provenance: digest of the scores, rule, seed.

    Example:
        >>> site = Site("a", "row", 4)
        >>> a, b = Selection.of({"a": site}, {"a": [0, 1]}), Selection.of({"a": site}, {"a": [1, 2]})
        >>> (a & b).ids["a"].tolist(), (a | b).ids["a"].tolist(), (a - b).ids["a"].tolist(), (~a).ids["a"].tolist()
        ([1], [0, 1, 2], [0], [2, 3])
    """

    sites: Mapping[str, Site]
    ids: Mapping[str, Tensor]
    card: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(
        sites: Mapping[str, Site], ids: Mapping[str, Iterable[int] | Tensor], card: Mapping[str, Any] | None = None
    ) -> Selection:
        """Build a selection; ids are made unique and sorted.

        Raises:
            RequestError: an unknown site or unit, or a mask where unit numbers belong.
        """
        found = {}
        for name in sites:
            raw = ids.get(name, ())
            given = torch.as_tensor(raw if isinstance(raw, Tensor) else list(raw))
            if given.numel() and (given.is_floating_point() or given.dtype == torch.bool):
                raise RequestError(
                    f"units of {name!r} as {given.dtype}",
                    expected="unit numbers",
                    do="of a mask: mask.nonzero().reshape(-1)",
                )
            chosen = given.to(torch.int64).reshape(-1).unique()
            if len(chosen) and (chosen[0] < 0 or chosen[-1] >= sites[name].n):
                raise RequestError(
                    f"unit {int(chosen[0] if chosen[0] < 0 else chosen[-1])} of {name!r}",
                    expected=f"0 to {sites[name].n - 1}",
                    do="count units from 0",
                )
            found[name] = chosen
        for name in ids:
            if name not in sites:
                raise RequestError(f"the site {name!r}", expected="a site of this model", do=near(name, sites))
        return Selection(dict(sites), found, card or {})

    def __repr__(self) -> str:
        """Say how many units were taken; their numbers are in `ids`."""
        places = sum(bool(len(chosen)) for chosen in self.ids.values())
        return (
            f"<Selection: {len(self):,} of {self.total:,} {_kinds(self.sites)}, in {places} of {len(self.sites)} sites>"
        )

    def __len__(self) -> int:
        return sum(len(ids) for ids in self.ids.values())

    @property
    def total(self) -> int:
        """How many units there are to choose from."""
        return sum(site.n for site in self.sites.values())

    @property
    def numel(self) -> int:
        """How many numbers the chosen units own."""
        return census(self.sites, self.ids)

    @cached_property
    def digest(self) -> str:
        """Digest of the choice."""
        return digest({name: ids for name, ids in self.ids.items() if len(ids)})

    def counts(self) -> dict[str, int]:
        """Return how many units are chosen at each site."""
        return {name: len(ids) for name, ids in self.ids.items()}

    def __and__(self, other: Selection) -> Selection:
        return self._with(other, lambda a, b: a & b, "&")

    def __or__(self, other: Selection) -> Selection:
        return self._with(other, lambda a, b: a | b, "|")

    def __sub__(self, other: Selection) -> Selection:
        return self._with(other, lambda a, b: a & ~b, "-")

    def __invert__(self) -> Selection:
        masks = self.masks()
        ids = {name: (~mask).nonzero().reshape(-1) for name, mask in masks.items()}
        return Selection(self.sites, ids, {"rule": "~", "of": [self.origin()]})

    def masks(self) -> dict[str, Tensor]:
        """Return bool [n] for each site."""
        found = {}
        for name, site in self.sites.items():
            mask = torch.zeros(site.n, dtype=torch.bool)
            mask[self.ids[name]] = True
            found[name] = mask
        return found

    def origin(self) -> dict[str, Any]:
        """Return what a combination remembers of this selection, so that evidence knows all data it was located on."""
        return {"digest": self.digest, **self.card}

    def _with(self, other: Selection, join: Callable[[Tensor, Tensor], Tensor], sign: str) -> Selection:
        sites = {**self.sites, **other.sites}
        for name in self.sites.keys() & other.sites.keys():
            if self.sites[name].n != other.sites[name].n:
                raise RequestError(
                    f"selections of {name!r} with {self.sites[name].n} and {other.sites[name].n} units",
                    expected="selections on one model",
                    do="select both on the same model",
                )
        mine, theirs, ids = self.masks(), other.masks(), {}
        for name, site in sites.items():
            nothing = torch.zeros(site.n, dtype=torch.bool)
            ids[name] = join(mine.get(name, nothing), theirs.get(name, nothing)).nonzero().reshape(-1)
        return Selection(sites, ids, {"rule": sign, "of": [self.origin(), other.origin()]})

    def overlap(self, other: Selection) -> dict[str, float]:
        """Compare with another selection and with chance.

        Returns:
            `shared` units, `jaccard`, `expected` shared units of two random selections of these sizes at each
            site, and `p_value`: the chance of sharing at least so many (hypergeometric tail, sites convolved).
        """
        shared = (self & other).counts()
        chances = [1.0]
        expected = 0.0
        for name in self.sites.keys() & other.sites.keys():
            n, k, m = self.sites[name].n, len(self.ids[name]), len(other.ids[name])
            expected += k * m / n
            chances = convolved(chances, hypergeometric(n, k, m))
        both = sum(shared.values())
        either = len(self | other)
        return {
            "shared": both,
            "jaccard": both / either if either else 1.0,
            "expected": expected,
            "p_value": at_least(chances, both),
        }

    def random_like(self, seed: int = 0, *, outside: bool = False) -> Selection:
        """Return the layer- and size-matched control: as many random units at each site.

        Args:
            seed: names the draw.
            outside: draw only units that are not chosen here.
        """
        ids = {}
        for name, chosen in self.ids.items():
            rng = generator(seed, "random_like", name)
            order = torch.randperm(self.sites[name].n, generator=rng)
            if outside:
                order = order[~torch.isin(order, chosen)]
            if len(order) < len(chosen):
                raise RequestError(
                    f"{len(chosen)} of {self.sites[name].n} units of {name!r}",
                    expected="at most half of a site",
                    do="use outside=False",
                )
            ids[name] = order[: len(chosen)].sort().values
        return Selection(self.sites, ids, {"rule": "random_like", "of": [self.digest], "seed": seed})

    def of_parts(self, *keep: int) -> Selection:
        """Return the same units with only some parts of each (see `Site.with_parts`)."""
        return replace(self, sites={n: s.with_parts(*keep) for n, s in self.sites.items()})

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file."""
        return unit_files.save(Path(path), "selection", self.sites, self.ids, self.card)

    @staticmethod
    def load(path: str | Path) -> Selection:
        """Read what `save` wrote."""
        return Selection.of(*unit_files.load(Path(path), "selection"))
