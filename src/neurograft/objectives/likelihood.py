"""Token likelihood: plain cross-entropy."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from neurograft.core.card import method
from neurograft.core.context import Step

NEUTRAL: dict[str, Any] = {}


@method(needs={"labels", "per_token"}, claims={"cross_entropy"})
def likelihood(step: Step) -> Tensor:
    """Return -mean over labelled tokens of log p_t.

    The mean is over the whole accumulation window, so that k accumulated batches give the loss of one big batch.

    Args:
        step: the batch, its outputs and the size of the window.
    """
    return step.mean(-step.log_probs)
