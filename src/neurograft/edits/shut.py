"""Chosen weights become 0."""

from __future__ import annotations

from neurograft.core.card import method
from neurograft.core.compact.mount import regions_of
from neurograft.core.context import Context
from neurograft.core.grafts.coordinates import coordinates
from neurograft.core.grafts.delta import Delta, Shut
from neurograft.core.grafts.graft import Graft
from neurograft.core.region import Region, union
from neurograft.core.selection import Selection


@method(paper="cones", kinds={"weight", "row", "column", "block"})
def shut(context: Context, where: Selection, *, tied: str = "refuse") -> Graft:
    """Set every number that the chosen units own to 0; the graft holds which, and no values.

    Sums of such grafts shut what either does: `ng.Graft` a + b, or one graft of the selections a | b.

    Args:
        context: the model.
        where: units that own weights.
        tied: what to do with a parameter that has two names: "refuse", or change it for "both".

    Returns:
        A graft of masks: a bit for each entry of a tensor, or the numbers of the shut ones, whichever is shorter.

    Raises:
        RequestError: units without weights, a tied parameter.

    Example:
        >>> from neurograft.anatomy.sites import sites
        >>> from neurograft.worlds.pico import pico
        >>> net = pico("llama")
        >>> single = sites(net, "weight", match="*q_proj*")
        >>> graft = shut(Context(net, single), Selection.of(single, {next(iter(single)): [0, 9]}))
        >>> graft.numel, [sorted(d.tensors()) for d in graft.deltas.values()]
        (2, [['flat']])
    """
    pieces: dict[str, list[Region]] = {}
    places = coordinates(context.model)
    for name, region in regions_of(context.model, where, tied=tied).items():
        for piece in places.to_checkpoint(name, Shut(region).region):
            pieces.setdefault(piece.name, []).append(piece.region)
    found: dict[str, Delta] = {n: Shut(union(regions)) for n, regions in sorted(pieces.items())}
    card = {"edit": "shut", "where": where.digest, "units": len(where), "located": dict(where.card).get("located")}
    return Graft.made(context.model, found, card=card)
