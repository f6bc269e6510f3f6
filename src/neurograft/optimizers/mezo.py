"""MeZO: the loss on both sides of a random direction says how far to go along it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from neurograft.core.card import method
from neurograft.core.compact.forward import ForwardOnly
from neurograft.core.errors import RequestError


@method(
    paper="mezo",
    claims={"forward_only"},
    departs="The shifted numbers are made for each use and never written into the model, which the reference's +eps, "
    "-2 eps, +eps leaves slightly moved; noise belongs to a tensor by name and is drawn in chunks; a step over several "
    "batches averages their losses, which the reference refuses.",
)
def mezo(
    groups: Iterable[dict[str, Any]],
    *,
    lr: float = 1e-6,
    eps: float = 1e-3,
    n: int = 1,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> ForwardOnly:
    """Move along n random directions z: g = (L(theta + eps z) - L(theta - eps z)) / (2 eps), theta -= lr g z.

    Args:
        groups: one group a tensor, with its `name`.
        lr: learning rate; about the number of trained entries times smaller than for SGD.
        eps: how far to look.
        n: directions averaged in a step.
        weight_decay: as for SGD, not on biases and norms.
        seed: root of the directions.

    Raises:
        RequestError: no step to look at.

    Example:
        >>> import torch
        >>> theta = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> moving = mezo([{"params": [theta], "name": "theta"}], lr=0.1)
        >>> def ask(terms):
        ...     (seed, scale), = terms
        ...     return 3.0 * scale
        >>> _ = moving.probe(ask)
        >>> moving.step()
        >>> [round(g, 3) for g in moving.pulls[0]]
        [3.0]
    """
    if eps <= 0:
        raise RequestError(f"eps={eps}", expected="a positive distance", do="1e-3 for full parameters, 1e-2 for LoRA")

    def pull(losses: Tensor) -> Tensor:
        return (losses[:, 0] - losses[:, 1]) / (2 * eps * n)

    return ForwardOnly(groups, lr=lr, weight_decay=weight_decay, directions=n, scales=(eps, -eps), pull=pull, seed=seed)
