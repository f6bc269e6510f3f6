"""Which layer a parameter belongs to, and where a layer's output passes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from neurograft.anatomy.describe import anatomy

OUTSIDE = "outside of the layers"


def blocks(model: nn.Module) -> list[str]:
    """Return the module names of a model's layers, in order.

    Where the model's anatomy knows none, they are the members of the outermost lists of two or more modules of one
    class that hold parameters; a model without such a list has its direct children for layers.

    Example:
        >>> blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
        ['0', '2']
    """
    return list(anatomy(model).layers) or _lists(model) or [n for n, c in model.named_children() if _owns(c)]


def _lists(model: nn.Module) -> list[str]:
    found: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(f"{b}.") for b in found):
            continue
        children = list(module.named_children()) if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
        like = len(children) > 1 and len({type(c) for _, c in children}) == 1
        if like and all(_owns(c) for _, c in children):
            found += [f"{name}.{child}" for child, _ in children]
    return found


def _owns(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def layer_of(parameter: str, layers: Sequence[str]) -> str:
    """Return the layer that holds a parameter, or `OUTSIDE`."""
    return next((layer for layer in layers if parameter.startswith(f"{layer}.")), OUTSIDE)


def by_layer(parameters: Iterable[str], layers: Sequence[str]) -> dict[str, list[str]]:
    """Return layer -> its parameters, layers in order, those outside last.

    Example:
        >>> by_layer(["h.1.w", "head.w", "h.0.w"], ["h.0", "h.1"])
        {'h.0': ['h.0.w'], 'h.1': ['h.1.w'], 'outside of the layers': ['head.w']}
    """
    names = list(parameters)
    found = {layer: [p for p in names if layer_of(p, layers) == layer] for layer in [*layers, OUTSIDE]}
    return {layer: held for layer, held in found.items() if held}
