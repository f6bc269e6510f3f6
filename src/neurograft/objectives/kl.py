"""Kullback-Leibler divergence to the base: an anchor."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from neurograft.core.card import method
from neurograft.core.context import Step
from neurograft.core.errors import RequestError, one_of


@method(needs={"labels", "per_token"}, claims={"anchor"})
def kl(step: Step, *, direction: Literal["forward", "reverse"] = "forward", temperature: float = 1.0) -> Tensor:
    """Return the mean over labelled tokens of KL(base || model), or of KL(model || base).

    The base is the model itself with the change taken out for one forward pass, so no second copy is held.
    Papers disagree on the direction and results depend on it: "forward" spreads the model over all the base
    allows, "reverse" lets it drop modes.

    Args:
        step: the batch; its `reference` runs something on the base.
        direction: "forward" for KL(base || model), "reverse" for KL(model || base).
        temperature: both are softened by it; the divergence is multiplied by its square.

    Raises:
        RequestError: the training offers no reference.
    """
    one_of(direction, ("forward", "reverse"), what="direction")
    if step.reference is None:
        raise RequestError(
            "kl without a reference", expected="a training that can take the change out", do="use it as anchor="
        )
    mine = (step.scored()[0] / temperature).log_softmax(-1)
    with torch.no_grad():
        base = step.reference(lambda: Step(step.model, step.batch).scored()[0])
    theirs = (base / temperature).log_softmax(-1)
    p, q = (theirs, mine) if direction == "forward" else (mine, theirs)
    return step.mean((p.exp() * (p - q)).sum(-1)) * temperature**2
