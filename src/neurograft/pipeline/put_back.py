"""Module-wise reset: a change with some modules or layers put back to what the base holds."""

from __future__ import annotations

from torch import nn

from neurograft.core.errors import RequestError
from neurograft.core.grafts.delta import New
from neurograft.core.grafts.graft import Graft
from neurograft.core.selection import Selection
from neurograft.pipeline.attach import attach


def put_back(model: nn.Module, graft: Graft, where: Selection) -> Graft:
    """Return the change without the selected modules or layers: interpolation by module, with weights 0 and 1.

    Half-reset puts a random half back; swapping a window of layers back tells how much of the change lies in them.

    Args:
        model: the base; left as found.
        graft: the change.
        where: units that own whole parameters.

    Raises:
        RequestError: the graft holds operations or new parameters, or nothing of it is left.

    Example:
        >>> from neurograft.anatomy.sites import sites
        >>> from neurograft.pipeline.attach import attach
        >>> from neurograft.worlds.pico import pico
        >>> net = pico("llama")
        >>> with attach(net) as live:
        ...     for value in live.parameters():
        ...         value.data += 1.0
        ...     graft = live.graft()
        >>> layers = sites(net, "layer")
        >>> low = Selection.of(layers, {next(iter(layers)): [0]})
        >>> sorted({n.split(".")[2] for n in put_back(net, graft, low).deltas if ".layers." in n})
        ['1']
    """
    odd = [n for n, d in graft.deltas.items() if isinstance(d, New)] + [type(o).__name__ for o in graft.operations]
    if odd:
        raise RequestError(
            f"a graft with {odd[0]}", expected="changes of the base's own weights", do="reset a graft without it"
        )
    with graft.on(model):
        tuned = {n: p.detach().clone() for n, p in model.named_parameters()}
    with attach(model, None, adapter="dense", protect=where) as live:
        for name, parameter in live.trained().items():
            parameter.data.copy_(tuned[name])
        made = live.graft(card={**graft.card, "put_back": {"digest": where.digest, "units": len(where)}})
    if made.empty:
        raise RequestError(
            "a graft of which nothing is left", expected="a change outside of the selection", do="select fewer units"
        )
    return made
