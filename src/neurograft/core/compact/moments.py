"""What an optimizer remembers of numbers, carried to another set of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def carried(state: Mapping[str, Any], old: Tensor, new: Tensor, inside: Tensor, there: Tensor) -> dict[str, Any]:
    """Return an optimizer's state of one tensor for another: moments of shared numbers stay, others begin at 0.

    Args:
        state: of the old tensor; what has its shape is carried, anything else (step counts) is kept.
        old: the tensor it was for.
        new: the tensor it is to be for.
        inside: where the shared numbers stand in `new`, flattened.
        there: where they stand in `old`.

    Example:
        >>> before = {"step": 3, "exp_avg": torch.tensor([1.0, 2.0])}
        >>> carried(before, torch.zeros(2), torch.zeros(3), torch.tensor([2]), torch.tensor([0]))["exp_avg"].tolist()
        [0.0, 0.0, 1.0]
    """
    return {name: _moved(value, old, new, inside, there) for name, value in state.items()}


def _moved(value: Any, old: Tensor, new: Tensor, inside: Tensor, there: Tensor) -> Any:
    if not isinstance(value, Tensor) or value.shape != old.shape:
        return value
    found = torch.zeros_like(new, dtype=value.dtype)
    found.view(-1)[inside] = value.reshape(-1)[there]
    return found
