"""Which units a group of data uses all the time, before and after a change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from neurograft.anatomy.sites import sites as sites_of
from neurograft.audits._changes import as_change
from neurograft.core.card import method
from neurograft.core.context import Batch
from neurograft.core.prompts.passing import Positions
from neurograft.core.selection import Selection
from neurograft.core.taps.rates import rates
from neurograft.core.venn import by_layer


@method(
    paper="sparcom",
    needs={"batches"},
    departs="The paper describes the shift in figures; here each group gets the counts kept, gained and lost by layer, "
    "the overlap with its chance, and `moved`, (gained + lost) / union.",
)
def alteration(
    model: nn.Module,
    change: object,
    batches: Sequence[Batch] = (),
    *,
    groups: Mapping[str, Sequence[Batch]] | None = None,
    least: float = 0.9,
    within: bool = False,
    units: str = "neuron",
    at: str | None = "gate|up|act",
    positions: Positions = "all",
) -> dict[str, Any]:
    """Compare, group by group, the units that fire at `least` a share of the tokens in the base and under a change.

    Args:
        model: the base; left as found.
        change: a graft, grafts, or a tuned model.
        batches: one group, named "all", if no groups are given.
        groups: name -> batches.
        least: the bar of the firing rate, inclusive.
        within: count over the tokens routed to an expert, not over all.
        units: kind of unit.
        at: which of its activations.
        positions: which tokens count.

    Returns:
        group -> `kept`, `gained`, `lost` (units by layer), `moved`, and `overlap`: shared, jaccard, expected, p_value.

    Raises:
        RequestError: no data, or units without activations.
    """
    told = groups or {"all": batches}
    where = sites_of(model, units, at=at)

    def often(net: nn.Module) -> dict[str, Selection]:
        return rates(net, where, told, positions=positions).often(where, least, within=within)

    before, after = as_change(model, change).both(often)
    found = {}
    for group, old in before.items():
        new = after[group]
        union = len(old | new)
        found[group] = {
            "kept": by_layer(old & new),
            "gained": by_layer(new - old),
            "lost": by_layer(old - new),
            "moved": 1 - len(old & new) / union if union else 0.0,
            "overlap": old.overlap(new),
        }
    return found
