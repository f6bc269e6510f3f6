"""Models without numbers, for other libraries to wrap."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from neurograft.core.grafts.stack import ATTRIBUTE, Stack


def skeleton(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose parameters and buffers are on the meta device.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> skeleton(net).weight.device.type, net.weight.device.type
        ('meta', 'cpu')
    """
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    if ATTRIBUTE in model.__dict__:
        memo[id(model.__dict__[ATTRIBUTE])] = Stack()
    return copy.deepcopy(model, memo)
