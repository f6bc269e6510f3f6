"""Dynamic fine-tuning: cross-entropy weighted by the token's own probability."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from neurograft.core.card import method
from neurograft.core.context import Step

NEUTRAL: dict[str, Any] = {"alpha": 0.0}


@method(paper="dft", needs={"labels", "per_token"}, claims={"cross_entropy"})
def dft(step: Step, *, alpha: float = 1.0) -> Tensor:
    """Return -mean over labelled tokens of sg(p_t)^alpha * log p_t, sg meaning "no gradient through".

    Plain cross-entropy follows the policy gradient with a reward of 1 / p_t; the weight cancels it, so that at
    alpha = 1 the gradient is that of -mean p_t (Wu et al. 2025, arXiv 2508.05629).

    Args:
        step: the batch, its outputs and the size of the window.
        alpha: power of the weight; 1 is the paper, 0 is cross-entropy.
    """
    weight = (alpha * step.log_probs.detach()).exp()
    return step.mean(-weight * step.log_probs)
