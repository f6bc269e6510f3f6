"""Truth: which numbers of a model carry something, and how well a selection or scores find them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from neurograft.core.errors import RequestError
from neurograft.core.selection import Scores, Selection
from neurograft.core.units import Site


@dataclass(frozen=True)
class Truth:
    """The entries of a model's parameters that carry a planted behaviour or change.

    Kept as entries, not units, so that one truth answers for rows, columns, neurons, blocks or single weights.

    Args:
        entries: parameter name -> sorted flat entry numbers, int64.

    Example:
        >>> from neurograft.core.units import Part
        >>> sites = {"w/row": Site("w/row", "row", 3, (Part.rows("w", (3, 2)),))}
        >>> truth = Truth({"w": torch.tensor([2, 3])})
        >>> truth.selection(sites).ids["w/row"].tolist()
        [1]
        >>> truth.found(Selection.of(sites, {"w/row": [0, 1]}))
        {'precision': 0.5, 'recall': 1.0}
    """

    entries: Mapping[str, Tensor]

    @staticmethod
    def of(where: Selection) -> Truth:
        """Return the entries that a selection's units own."""
        found: dict[str, list[Tensor]] = {}
        for name, ids in where.ids.items():
            for part in where.sites[name].parts if len(ids) else ():
                found.setdefault(part.param, []).append(part.flat(ids).reshape(-1))
        return Truth({name: torch.cat(flat).unique() for name, flat in found.items()})

    def selection(self, sites: Mapping[str, Site], *, share: float = 0.5) -> Selection:
        """Return the units of which at least `share` of the numbers are planted.

        Args:
            sites: the units to choose from.
            share: 1.0 asks for whole units; a tiny share for every unit that holds a planted number.

        Raises:
            RequestError: no unit is that much planted.
        """
        ids = {}
        for name, site in sites.items():
            hits = torch.zeros(site.n)
            for part in site.parts:
                if part.param in self.entries:
                    flat = part.flat(torch.arange(site.n))
                    hits += torch.isin(flat, self.entries[part.param]).sum(dim=1)
            size = sum(part.size for part in site.parts)
            ids[name] = (hits >= max(share * size, 1)).nonzero().reshape(-1) if size else torch.empty(0)
        if not any(len(found) for found in ids.values()):
            raise RequestError(
                f"{len(sites)} sites without a planted unit",
                expected="sites that own planted numbers",
                do=f"take units of {', '.join(sorted(self.entries)[:3])}, or a smaller share",
            )
        return Selection.of(sites, {n: i.to(torch.int64) for n, i in ids.items()}, {"rule": "truth"})

    def found(self, where: Selection, *, share: float = 0.5) -> dict[str, float]:
        """Return precision and recall of a selection, counted in units."""
        true = self.selection(where.sites, share=share)
        hits = len(where & true)
        return {"precision": hits / max(1, len(where)), "recall": hits / len(true)}

    def ranked(self, scores: Scores, *, share: float = 0.5) -> dict[str, float]:
        """Return how well scores rank the planted units.

        Returns:
            `precision_at_k` with k = the number of planted units, and `auroc`, ties counted half.
        """
        true = self.selection(scores.sites, share=share).masks()
        value = torch.cat([scores.values[n].double() for n in scores.sites])
        mask = torch.cat([true[n] for n in scores.sites])
        best = value.sort(descending=True, stable=True).indices[: int(mask.sum())]
        above = (value[mask][:, None] > value[~mask]).double() + 0.5 * (value[mask][:, None] == value[~mask]).double()
        return {"precision_at_k": float(mask[best].double().mean()), "auroc": float(above.mean())}
