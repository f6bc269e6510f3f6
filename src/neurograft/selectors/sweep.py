"""A window of neighbouring units that moves on from turn to turn."""

from __future__ import annotations

from dataclasses import replace

import torch

from neurograft.core.card import method
from neurograft.core.errors import RequestError, one_of
from neurograft.core.seeds import generator
from neurograft.core.selection import Scores, Selection

STARTS, ENDS = ("random", "first"), ("wrap", "clamp")


@method(paper="slicefine")
def sweep(
    scores: Scores,
    *,
    width: int = 1,
    turn: int = 0,
    start: str = "random",
    ends: str = "wrap",
    bias: bool = False,
    seed: int = 0,
) -> Selection:
    """Take units p, ..., p + width - 1 of every site, p = start + turn * width; the scores are not read.

    Args:
        scores: give the sites.
        width: units at each site; a site with fewer is taken whole.
        turn: how often it has moved; `tune` fills it in where a schedule selects anew.
        start: where each site begins: "random", its own place, or "first".
        ends: "wrap" goes on with the first units after the last, "clamp" stays at the last `width`.
        bias: rows bring their biases along.
        seed: names the starts.

    Raises:
        RequestError: a width below 1, or a negative turn.

    Example:
        >>> from neurograft.core.units import Site
        >>> ten = Scores({"a": Site("a", "column", 10)}, {"a": torch.zeros(10)})
        >>> [sweep(ten, width=4, turn=t, start="first").ids["a"].tolist() for t in (1, 2)]
        [[4, 5, 6, 7], [0, 1, 8, 9]]
    """
    one_of(start, STARTS, what="start")
    one_of(ends, ENDS, what="ends")
    if width < 1 or turn < 0:
        raise RequestError(f"width={width}, turn={turn}", expected="width from 1, turn from 0", do="give width=1")
    sites, ids = {}, {}
    for name, site in scores.sites.items():
        rng = generator(seed, "selectors.sweep", name)
        first = int(torch.randint(site.n, (), generator=rng)) if start == "random" else 0
        first, wide = first + turn * width, min(width, site.n)
        window = first + torch.arange(wide) if ends == "wrap" else min(first, site.n - wide) + torch.arange(wide)
        ids[name] = (window % site.n).sort().values
        sites[name] = site if bias or not site.parts else replace(site.with_parts(0), tap=None)
    rule = {"rule": "sweep", "width": width, "turn": turn, "start": start, "ends": ends, "bias": bias, "seed": seed}
    return Selection(sites, ids, {**rule, "scores": scores.digest, "located": dict(scores.card)})
