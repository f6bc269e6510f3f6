"""Leaving a model, and the random numbers of the process, as they were found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from neurograft.train.untouched import random_state


@contextmanager
def as_found(model: nn.Module) -> Iterator[nn.Module]:
    """Give the model in evaluation mode; put modes, `requires_grad`, gradients and generators back afterwards.

    Example:
        >>> net = nn.Linear(2, 2).train()
        >>> with as_found(net):
        ...     net.training
        False
        >>> net.training
        True
    """
    modes = {m: m.training for m in model.modules()}
    flags = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    with random_state():
        try:
            yield model.eval()
        finally:
            for module, training in modes.items():
                module.training = training
            for parameter, (flag, grad) in flags.items():
                parameter.requires_grad_(flag)
                parameter.grad = grad
