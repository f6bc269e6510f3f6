"""Evolution strategies: a population of perturbed models, each direction worth the z-score of its loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from neurograft.core.card import method
from neurograft.core.compact.forward import ForwardOnly
from neurograft.core.errors import RequestError

TINY = 1e-8


@method(
    paper="es-landscape",
    claims={"forward_only"},
    departs="As the companion code of arXiv 2509.24372, whose update holds no sigma, but for its faults: tensors of "
    "one shape and neighbouring seeds share no noise, the perturbed numbers are never written into the model, the "
    "spread is the unbiased one and equal losses move nothing. Weight decay is an extension.",
)
def evolution(
    groups: Iterable[dict[str, Any]],
    *,
    lr: float = 5e-4,
    sigma: float = 1e-3,
    n: int = 30,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> ForwardOnly:
    """Look at n perturbed models theta + sigma eps_i, and move: theta -= lr / n * sum of z_i eps_i.

    z_i = (L_i - mean) / (std + 1e-8), of the losses; the paper's reward is minus the loss, its alpha the lr. Noise in
    the losses ends in a plateau of about lr * spread / (2 n sigma) * sum over curvatures of 1 / 2: raise n or cut the
    learning rate late, and stop at the peak; a smaller sigma raises the floor.

    Args:
        groups: one group a tensor, with its `name`.
        lr: the paper's alpha.
        sigma: how far the population spreads.
        n: its size; about 30 whatever the model's.
        weight_decay: as for SGD, not on biases and norms.
        seed: root of the directions.

    Raises:
        RequestError: a population of one, or no distance.

    Example:
        >>> [round(z, 2) for z in _z(torch.tensor([[1.0], [2.0], [3.0]])).tolist()]
        [-0.33, 0.0, 0.33]
        >>> _z(torch.full((3, 1), 0.1)).tolist()
        [0.0, 0.0, 0.0]
    """
    if n < 2 or sigma <= 0:
        raise RequestError(
            f"n={n}, sigma={sigma}", expected="a population of at least 2 at a positive distance", do="n=30, sigma=1e-3"
        )
    return ForwardOnly(
        groups, lr=lr, weight_decay=weight_decay, directions=n, scales=(sigma,), pull=lambda x: _z(x), seed=seed
    )


def _z(losses: Tensor) -> Tensor:
    """Return z-scores over the population, divided by its size."""
    found = losses[:, 0]
    if bool((found == found[0]).all()):
        return torch.zeros_like(found)
    return (found - found.mean()) / (found.std() + TINY) / len(found)
