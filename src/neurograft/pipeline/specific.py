"""Steps of recipes: the units each group of data uses all the time, and what a change makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neurograft.anatomy.sites import sites
from neurograft.audits.alteration import alteration
from neurograft.core.context import Batch
from neurograft.core.taps.rates import rates
from neurograft.core.venn import general, pairwise, unique
from neurograft.pipeline.grouped import grouped_rows
from neurograft.pipeline.inputs import as_batches
from neurograft.pipeline.state import as_found

AT = "gate|up|act"


def specific(
    state: Mapping[str, Any],
    *,
    least: float = 0.9,
    within: bool = True,
    expert_share: float | None = None,
    data: Any = None,
    max_length: int = 1024,
) -> dict[str, Any]:
    """Return the neurons that fire at `least` a share of a group's tokens, and how the groups' sets lie to each other.

    Args:
        state: what the recipe has made so far, its model and data.
        least: the bar of the firing rate, inclusive.
        within: count over the tokens routed to an expert, not over all.
        expert_share: the experts too that this share of a group's tokens are routed to; for a mixture of experts.
        data: rows in groups, instead of the run's.
        max_length: longer texts are cut.

    Returns:
        `specific` (group -> selection), `general`, `unique` (group -> selection), `pairs` (overlaps and chance),
        and with `expert_share` also `experts`.

    Raises:
        RequestError: data without groups, or no experts where they are asked for.
    """
    model = state["model"]
    where, groups = sites(model, "neuron", at=AT), _batches(state, data, max_length)
    with as_found(model):
        found = rates(model, where, groups)
    mine = found.often(where, least, within=within)
    made = {"specific": mine, "general": general(mine), "unique": unique(mine), "pairs": pairwise(mine)}
    if expert_share is not None:
        made["experts"] = found.experts(where, sites(model, "expert"), expert_share)
    return made


def altered(
    state: Mapping[str, Any],
    *,
    least: float = 0.9,
    within: bool = True,
    data: Any = None,
    max_length: int = 1024,
    of: str = "graft",
) -> dict[str, Any]:
    """Return as `alteration` which of these neurons a change keeps, gains and loses; see `audits.alteration`."""
    model = state["model"]
    with as_found(model):
        made = alteration(model, state[of], groups=_batches(state, data, max_length), least=least, within=within, at=AT)
    return {"alteration": made}


def _batches(state: Mapping[str, Any], data: Any, max_length: int) -> dict[str, list[Batch]]:
    options: Mapping[str, Any] = state.get("common", {})
    how: dict[str, Any] = {"processing_class": options.get("processing_class"), "max_length": max_length}
    rows = grouped_rows(state["data"] if data is None else data)
    return {group: as_batches(mine, state["model"], **how) for group, mine in rows.items()}
