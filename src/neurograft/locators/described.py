"""Which units a description says are about something."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from neurograft.core.card import method
from neurograft.core.context import Context
from neurograft.core.selection import Scores
from neurograft.core.taps.describe import Description, describe, matches
from neurograft.core.taps.exemplars import as_seen, exemplify
from neurograft.locators._common import need_batches, scored
from neurograft.locators._describers import describer_for


@method(
    paper="milan",
    kinds={"neuron", "channel", "row"},
    needs={"batches", "taps"},
    claims={"finite", "length"},
    departs="The released captioner and its annotations are not used: words or captions are taught on synthetic scenes "
    "or on the pairs that are given, any describer can be put in their place, and units of text models are described "
    "by the tokens they are active at. Scores are margins, so that nearly matching units can be told from the rest. "
    "An exemplar in which a unit is nowhere above its level is left out; where the level is the unit's maximum, the "
    "places at it count.",
)
def described(
    context: Context,
    *,
    query: Sequence[str] | str = (),
    describer: Any = None,
    pairs: Any = None,
    k: int = 15,
    quantile: float = 0.99,
    lam: float = 0.2,
    beam: int = 50,
    length: int = 15,
) -> Scores:
    """Describe every unit by argmax_d [log p(d | E) - lam * log p(d)] and score how well a query's words fit.

    E are its k exemplars, masked where the unit is above its own quantile. The score is that of the best description
    with a word of the query minus that of the best one without, so that it is above 0 exactly where the unit's
    description has one; where the beam holds only one sort, the other counts 1 below the beam's worst. Without a query
    it is the description's own, how much is known by it. The scores' card holds the descriptions, and memory for
    n k positions numbers is needed at each site.

    Args:
        context: model, sites with taps, batches; its processor names tokens.
        query: words; a description matches if it contains one of them, in any case.
        describer: see `_describers.describer_for`.
        pairs: to teach it on.
        k: exemplars of a unit.
        quantile: its level.
        lam: weight of log p(d).
        beam: texts that are proposed.
        length: words of a text.

    Raises:
        RequestError: no data, units without a tap, options out of range, a describer that does not fit the data.
    """
    need_batches(context)
    words = (query,) if isinstance(query, str) else tuple(query)
    seen = {name: as_seen(context.model, site, context.batches) for name, site in context.sites.items()}
    # A decoder has tokens of its own, and of a model of images with texts one side sees pixels.
    own = {name: (batches is not context.batches, "pixel_values" in batches[0]) for name, batches in seen.items()}
    how: dict[str, Any] = {"pairs": pairs, "processor": context.processor, "seed": context.seed}
    first = {side: next(seen[name] for name in own if own[name] == side) for side in dict.fromkeys(own.values())}
    speakers = {side: describer_for(batches, describer, **how) for side, batches in first.items()}
    found = exemplify(context.model, context.sites, context.batches, k=k, quantile=quantile, seed=context.seed)

    def said(name: str, unit: int) -> list[Description]:
        shown = found[name].shown(unit, seen[name])
        return describe(speakers[own[name]], shown, lam=lam, beam=beam, length=length)

    texts: dict[str, list[str]] = {}
    values: dict[str, torch.Tensor] = {}
    for name, site in context.sites.items():
        each = [said(name, unit) for unit in range(site.n)]
        texts[name] = [one[0].text if one else "" for one in each]
        values[name] = torch.tensor([_margin(one, words) for one in each])
    lowest = min(float(v[v.isfinite()].min()) if bool(v.isfinite().any()) else 0.0 for v in values.values())
    filled = {n: torch.where(v.isfinite(), v, torch.full_like(v, lowest - 1)) for n, v in values.items()}
    return scored(
        context,
        filled,
        {"query": list(words), "describer": sorted({s.identity for s in speakers.values()}), "descriptions": texts},
    )


def _margin(found: Sequence[Description], query: Sequence[str]) -> float:
    """Return a unit's score; -inf where nothing is said of it."""
    if not found:
        return -float("inf")
    if not query:
        return found[0].score
    below = min(d.score for d in found) - 1
    best = {True: below, False: below}
    for one in found:
        side = matches(one.text, query)
        best[side] = max(best[side], one.score)
    return best[True] - best[False]
