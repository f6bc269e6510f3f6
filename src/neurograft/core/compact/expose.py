"""Live weights for kernels that take a weight past `__torch_function__`: `autograd.Function.apply(x, weight)`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from neurograft.core.compact.live import Plain
from neurograft.core.compact.uses import LiveWeight


@contextmanager
def exposed(modules: Iterable[nn.Module]) -> Iterator[list[str]]:
    """Hand the live weights of these modules over as dense aliases, for custom kernels that read `module.weight`.

    Such a kernel would see a frozen weight and give it no gradient, silently. Inside the block the attribute is
    read through a property, so that the kernel's dense gradient reaches the compact values. Keys, parameters and
    `isinstance` stay what they were. Its price is the dense gradient of that weight, which the kernel computes, and
    for a weight that is never written (`core.compact.beside`) a copy with the values, held until the backward pass.

    Args:
        modules: owners of the weights; those without a live weight are left alone.

    Yields:
        Names of the weights that are handed over.
    """
    swapped: list[tuple[nn.Module, type[nn.Module]]] = []
    names: list[str] = []
    for module in modules:
        leaves = [n for n, p in module._parameters.items() if isinstance(p, LiveWeight)]
        if leaves:
            plain = type(module)
            module.__class__ = type(plain.__name__, (plain,), {leaf: _handed(leaf) for leaf in leaves})
            swapped.append((module, plain))
            names += [module._parameters[leaf].neurograft.name for leaf in leaves]  # type: ignore[union-attr]
    try:
        yield names
    finally:
        for module, plain in swapped:
            module.__class__ = plain


def _handed(leaf: str) -> property:
    def read(module: nn.Module) -> Tensor:
        weight = module._parameters[leaf]
        if not isinstance(weight, LiveWeight):
            return weight  # type: ignore[return-value]
        live = weight.neurograft
        if not torch.is_grad_enabled() and not live.beside:
            return weight
        with Plain():
            live.sync()
            return live.dense()

    return property(read)
