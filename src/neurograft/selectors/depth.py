"""All units of the blocks in a stretch of the depth."""

from __future__ import annotations

import torch

from neurograft.core.card import method
from neurograft.core.errors import RequestError
from neurograft.core.selection import Scores, Selection


@method()
def depth(scores: Scores, *, start: float = 0.0, stop: float = 0.5) -> Selection:
    """Take all units of the blocks from one share of the depth to another, in the middle of which a block counts.

    Args:
        scores: give the sites; their blocks, in order, are the depth.
        start: from this share on; 0 is the lowest block.
        stop: up to this share; 1 is behind the highest.

    Raises:
        RequestError: shares out of order, sites outside of blocks alone, or no block between the two.

    Example:
        >>> from neurograft.core.units import Site
        >>> sites = {f"{i}": Site(f"{i}", "head", 2, layer=i) for i in range(4)}
        >>> found = depth(Scores(sites, {n: torch.zeros(2) for n in sites}), stop=0.5)
        >>> [len(ids) for ids in found.ids.values()]
        [2, 2, 0, 0]
    """
    blocks = sorted({s.layer for s in scores.sites.values() if s.layer is not None})
    taken = {b for i, b in enumerate(blocks) if start <= (i + 0.5) / len(blocks) < stop}
    if not 0 <= start < stop <= 1 or not taken:
        raise RequestError(
            f"the depth from {start} to {stop} of {len(blocks)} blocks",
            expected="shares 0 <= start < stop <= 1 with a block between them",
            do="widen the stretch, or choose units that stand in blocks",
        )
    ids = {n: torch.arange(s.n if s.layer in taken else 0) for n, s in scores.sites.items()}
    return Selection(dict(scores.sites), ids, {"rule": "depth", "start": start, "stop": stop})
