"""Compact training of the chosen entries, in place or beside the frozen weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import nn

from neurograft.adapters._side import SideMount
from neurograft.adapters._tied import TiedMount
from neurograft.adapters._turning import SliceMount
from neurograft.core.card import method
from neurograft.core.compact.mount import Mount, regions_of, untied
from neurograft.core.errors import RequestError, one_of
from neurograft.core.region import Region
from neurograft.core.selection import Selection
from neurograft.core.tokens import beside


@method(claims={"undo", "only_the_selection", "compact", "zero_graft", "live_model", "resume", "coordinates"})
def slice(
    model: nn.Module,
    where: Selection,
    *,
    new: Iterable[str] | Mapping[str, int] = (),
    protect: Selection | None = None,
    tied: Literal["refuse", "both", "untie"] = "refuse",
    route: Literal["in-place", "side"] = "in-place",
    tie: Literal["site"] | None = None,
    allow_dense: bool = False,
) -> Mount:
    """Make the numbers that the selected units own trainable, as small float32 tensors of values.

    Args:
        model: any module; everything else in it is frozen meanwhile.
        where: the units.
        new: parameters the base's checkpoint lacks, trained whole (patterns), or name -> rows the base has. What else
            grew with these rows (an untied head, its bias) stays as it is and ships in the graft.
        protect: units whose numbers must not move; their overlap with `where` is left out.
        tied: what to do with a parameter that has two names: "refuse", train it for "both", or "untie" it, so that
            only the selected use changes; the graft then unties it wherever it is put on.
        route: "in-place" writes the values into the base's weight; "side" never writes it, and every use computes as
            if the weight were base + (values - base): for bases that others share, quantized or sharded ones. A
            training that turns to other units shows its locator copies of the weights with the values in them.
        tie: "site" gives all chosen units of a site one shared update vector for each of their parts: row i becomes
            W0[i] + delta of its site, and the tensors trained are the deltas, at 0 first, one row a site. Units in
            several groups stand in several sites, as `pipeline.clustered` makes them. The graft holds the deltas and
            0/1 membership as low-rank factors, so K groups export as a LoRA of rank K; weight decay pulls deltas to 0.
        allow_dense: accept a dense gradient where an operation on a selected weight is not known.

    Weight decay pulls the values themselves towards 0, as in full fine-tuning, on both routes.

    Raises:
        RequestError: the selection touches nothing, or a tied parameter.
    """
    one_of(route, ("in-place", "side"), what="route")
    one_of(tied, ("refuse", "both", "untie"), what="rule for tied weights")
    if tie is not None and one_of(tie, ("site",), what="tie") and isinstance(new, Mapping):
        raise RequestError(f"tie={tie!r} with new={new!r}", expected="no appended rows", do="leave one of them out")
    ties = untied(model, where) if tied == "untie" else None
    try:
        mount = _mounted(
            model, where, new=new, protect=protect, tied=tied, route=route, allow_dense=allow_dense, tie=tie
        )
    except BaseException:
        if ties is not None:
            ties.remove()
        raise
    mount.ties = ties
    return mount


def _mounted(
    model: nn.Module,
    where: Selection,
    *,
    new: Iterable[str] | Mapping[str, int],
    protect: Selection | None,
    tied: str,
    route: str,
    allow_dense: bool,
    tie: str | None,
) -> Mount:
    regions = regions_of(model, where, protect=protect, tied=tied)
    if tie is not None:
        return TiedMount(model, regions, where, new=new, allow_dense=allow_dense, beside=route == "side")
    appended, chosen = dict(new) if isinstance(new, Mapping) else {}, set(regions)
    for name, rows in appended.items():
        known = dict(model.named_parameters())
        weight = known[one_of(name, known, what="parameter to add rows to")]
        if not isinstance(rows, int) or not 0 < rows < len(weight):
            raise RequestError(
                f"new={{{name!r}: {rows!r}}}, of {len(weight)} rows",
                expected=f"how many of them the base has, 1 to {len(weight) - 1}",
                do="resize the model's vocabulary first, then give the number of rows it had",
            )
        grown = Region.of(weight.shape, "rows", torch.arange(rows, weight.shape[0]))
        taken = next((n for n in (name, *beside(model, name)) if n in chosen), None)
        if taken is not None:
            raise RequestError(
                f"a selection in {taken}, to which new rows are added",
                expected="one or the other",
                do="leave its units out of the selection",
            )
        regions[name] = grown
    rules = {"protect": protect, "tied": "both" if tied == "both" else "refuse"}  # of a turn to other units
    kind = SideMount if route == "side" else SliceMount
    return kind(model, regions, new=new, allow_dense=allow_dense, rules=rules)
