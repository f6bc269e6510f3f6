"""Which parameters ask for gradients, for the length of a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def asking(model: nn.Module, wanted: Iterable[Tensor] = ()) -> Iterator[None]:
    """Let no parameter of a model but the wanted ones ask for gradients; every flag comes back as it was.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> with asking(net, [net.bias]):
        ...     [p.requires_grad for p in net.parameters()]
        [False, True]
        >>> [p.requires_grad for p in net.parameters()]
        [True, True]
    """
    flags, chosen = [(p, p.requires_grad) for p in model.parameters()], {id(p) for p in wanted}
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
