"""Whether a graft fits a model: names, shapes, and weights that can be written."""

from __future__ import annotations

from torch import Tensor

from neurograft.core.errors import RequestError
from neurograft.core.grafts.contents import Contents
from neurograft.core.grafts.coordinates import Coordinates
from neurograft.core.marks import Watched


def named(tensor: str, graft: Contents, where: Coordinates) -> str:
    """Return what this model's checkpoint calls a graft's tensor.

    Conversions change between versions: a tensor that no checkpoint of this model has may still be the parameter
    whose name stands beside it in the graft.

    Raises:
        RequestError: the model has no such tensor under either name.
    """
    try:
        return where.resolve(tensor)
    except RequestError:
        modules = graft.card.get("modules", {}).get(tensor, [])
        shape = graft.deltas[tensor].shape
        for name in where.names() if len(modules) == 1 else ():
            if where.modules(name) == modules and where.shape(name) == shape:
                return name
        raise


def check_writable(name: str, weight: Tensor) -> None:
    """Raise unless a graft may write into this weight.

    Raises:
        RequestError: it is being trained, packed, offloaded or not contiguous.
    """
    if isinstance(weight, Watched):
        raise RequestError(
            f"a graft on {name}, whose entries are being trained",
            expected="a model at rest",
            do="leave the `attach` block, or detach, before applying or removing grafts",
        )
    if not weight.is_floating_point() or not weight.is_contiguous() or weight.device.type == "meta":
        raise RequestError(
            f"the parameter {name} ({weight.dtype}, {weight.device}, contiguous: {weight.is_contiguous()})",
            expected="a contiguous floating-point weight in memory",
            do="load the base unquantized and not offloaded, or attach the graft with route='side'",
        )


def wrong_shape(tensor: str, made_for: tuple[int, ...], found: tuple[int, ...], graft: Contents) -> RequestError:
    """Return the error for a base whose tensor has another shape."""
    architecture = graft.card.get("base", {}).get("class")
    return RequestError(
        f"a model whose tensor {tensor!r} has shape {found}",
        expected=f"shape {made_for}, as the graft was made for",
        do="load the base the graft was made on" + (f", as {architecture}" if architecture else ""),
    )


def other_base(tensor: str, graft: Contents) -> RequestError:
    """Return the error for a base with other numbers."""
    origin = graft.card.get("base", {})
    name, revision = origin.get("name") or "it was made on", origin.get("revision") or "any"
    return RequestError(
        f"a base whose tensor {tensor!r} holds other numbers than the one this graft was made on",
        expected=f"the base {name}, revision {revision}, loaded as {origin.get('dtype') or 'it was'} or wider",
        do="load that base; a tuned, merged or re-quantized copy is another base",
    )
