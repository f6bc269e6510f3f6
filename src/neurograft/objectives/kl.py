"""Kullback-Leibler divergence to the base: an anchor."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from neurograft.core.card import method
from neurograft.core.context import Step
from neurograft.core.errors import one_of
from neurograft.core.numerics.entropies import relative_entropy


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
    own = step.scored()[0]
    base = step.of_base(lambda: Step(step.model, step.batch).scored()[0], who="kl", do="use it as anchor=")
    mine, theirs = ((logits / temperature).log_softmax(-1) for logits in (own, base))
    p, q = (theirs, mine) if direction == "forward" else (mine, theirs)
    return step.mean(relative_entropy(p, q)) * temperature**2
