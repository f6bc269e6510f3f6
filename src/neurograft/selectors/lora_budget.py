"""As many weights of each matrix as a low-rank update of it would have numbers."""

from __future__ import annotations

import torch

from neurograft.core.card import method
from neurograft.core.errors import RequestError
from neurograft.core.selection import Scores, Selection
from neurograft.selectors._quota import highest, split


@method(kinds={"weight"})
def lora_budget(scores: Scores, *, r: int = 8, lowest: bool = False) -> Selection:
    """Take the highest r (m + n) weights of each m x n matrix, or all of a smaller one; ties by unit number.

    A bank of experts has that many for each expert.

    Args:
        scores: a number for every weight, kind "weight".
        r: rank of the low-rank update that would cost as much.
        lowest: take the lowest scores.

    Raises:
        RequestError: units that are no single weights of matrices, or r below 1.

    Example:
        >>> from neurograft.core.units import Part, Site
        >>> site = Site("w", "weight", 20, (Part("w", ((4, 5), (5, 1))),))
        >>> len(lora_budget(Scores({"w": site}, {"w": torch.rand(20)}), r=1))
        9
    """
    if r < 1:
        raise RequestError(f"r={r}", expected="at least 1", do="give r=8")
    chosen, first = [], 0
    for name, site in scores.sites.items():
        if site.kind != "weight" or len(site.parts) != 1 or len(site.parts[0].units) < 2:
            raise RequestError(
                f"a low-rank budget at {name!r}, of kind {site.kind}",
                expected="single weights of matrices",
                do="use units='weight', or give count= or fraction=",
            )
        (high, _), (wide, _) = site.parts[0].units[-2:]
        count = min(site.n, r * (high + wide) * (site.n // (high * wide)))
        key = scores.values[name].float()[None]
        chosen.append(first + highest(-key if lowest else key, count)[0].nonzero()[:, 0])
        first += site.n
    return split(scores, torch.cat(chosen), {"rule": "lora_budget", "r": r, "lowest": lowest})
