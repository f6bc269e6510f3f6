"""Gradients of weights, one parameter at a time: told, reduced, dropped; and weights put back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from neurograft.core.asking import asking
from neurograft.core.errors import RunError
from neurograft.core.units import Parameters


@contextmanager
def weight_gradients(
    model: nn.Module, names: Iterable[str], tell: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """Call `tell(name, weight, gradient)` for each named parameter during every backward pass of the block.

    Only these parameters ask for gradients, and each gradient is dropped as soon as it was told, so at most one
    dense gradient is held besides those autograd has in flight. Flags and what was in `.grad` come back.

    Args:
        model: any module.
        names: parameters, as in `named_parameters()`.
        tell: called without gradients.

    Raises:
        RunError: no parameter got a gradient. One alone may have none: the loss does not depend on it.
    """
    parameters = Parameters.of(model).by_name
    chosen = {n: parameters[n] for n in names}
    kept = {n: p.grad for n, p in chosen.items()}
    heard: set[str] = set()

    def hook(name: str) -> Callable[[Tensor], None]:
        def listen(p: Tensor) -> None:
            grad, p.grad = p.grad, None
            heard.add(name)
            if grad is not None:
                with torch.no_grad():
                    tell(name, p.detach(), grad)

        return listen

    with asking(model, chosen.values()):
        handles = []
        for name, parameter in chosen.items():
            parameter.grad = None
            handles.append(parameter.register_post_accumulate_grad_hook(hook(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name, grad in kept.items():
                chosen[name].grad = grad
    if not heard:
        raise RunError(f"none of {len(chosen)} parameters got a gradient: no backward pass ran, or it reached none")


@contextmanager
def put_back(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Put numbers, flags and what was in `.grad` of some parameters back at the end of the block.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> before = net.weight.detach().clone()
        >>> with put_back(dict(net.named_parameters())), torch.no_grad():
        ...     _ = net.weight.zero_()
        >>> torch.equal(net.weight, before)
        True
    """
    kept = {n: (p.detach().cpu().clone(), p.requires_grad, p.grad) for n, p in parameters.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, (numbers, flag, grad) in kept.items():
                parameters[name].copy_(numbers)
                parameters[name].requires_grad_(flag)
                parameters[name].grad = grad
