"""Entropy-adaptive fine-tuning: tokens the model is sure about weigh little."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from neurograft.core.card import method
from neurograft.core.context import Step

NEUTRAL: dict[str, Any] = {"alpha": 0.0}


@method(paper="eaft", needs={"labels", "per_token"}, claims={"cross_entropy"})
def eaft(step: Step, *, alpha: float = 1.0, top: int | None = 20, scale: float = 3.0) -> Tensor:
    """Return -mean over labelled tokens of sg(w_t) log p_t with w_t = min(1, H_t / scale)^alpha.

    H_t is the entropy in nats of the softmax over the `top` largest logits. A token the model is sure about and
    the data contradict has a small H_t and a large loss; it is what a fine-tune forgets old knowledge for
    (arXiv 2601.02151). The mean divides by the number of tokens, not by the sum of weights, so the effective
    learning rate falls too.

    Args:
        step: the batch, its outputs and the size of the window.
        alpha: power of the weight; 1 is the paper, 0 is cross-entropy.
        top: logits that count for the entropy; None for all, which is what a fused head offers.
        scale: the paper writes ln 20 = 2.9957, its code divides by 3.0, as here. With `top` <= 20 the minimum
            with 1 never binds.
    """
    weight = (step.entropy(top=top).detach() / scale).clamp(0, 1) ** alpha
    return step.mean(-weight * step.log_probs)
