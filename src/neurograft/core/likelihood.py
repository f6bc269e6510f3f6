"""Log-probabilities of labels, of logits that are read a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1 << 20  # logits that are made float32 at a time


def label_log_probs(logits: Tensor, at: Tensor, labels: Tensor) -> Tensor:
    """Return the log-probability of a label at each of some places, [N], float32 (float64 of float64), with gradient.

    Over a large vocabulary logits are the largest tensor there is. Nothing else as large is made but their gradient:
    the softmax is computed a piece at a time, and once more on the way back. What is kept until then are the logits
    themselves, or a copy of the chosen ones where these are the lesser half.

    Args:
        logits: [M, V].
        at: which of the M places, int64 [N], each once.
        labels: int64 [N].

    Example:
        >>> x = torch.zeros(3, 4, requires_grad=True)
        >>> found = label_log_probs(x, torch.tensor([0, 2]), torch.tensor([1, 3]))
        >>> found.sum().backward()
        >>> [round(float(p.exp()), 2) for p in found.detach()], x.grad.tolist()[1:]
        ([0.25, 0.25], [[0.0, 0.0, 0.0, 0.0], [-0.25, -0.25, -0.25, 0.75]])
    """
    found: Tensor = _LogProbs.apply(logits, at, labels)
    return found


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, at: Tensor, labels: Tensor) -> Tensor:
        few = ctx.needs_input_grad[0] and 2 * len(at) <= len(logits)
        kept = logits[at] if few else logits
        ctx.save_for_backward(kept, at, labels)
        ctx.places, ctx.few = len(logits), few
        made = torch.float64 if logits.dtype == torch.float64 else torch.float32
        found = torch.empty(len(at), dtype=made, device=logits.device)
        for here in _pieces(len(at), logits.shape[-1]):
            found[here] = -F.cross_entropy(
                (kept[here] if few else kept[at[here]]).to(made), labels[here], reduction="none"
            )
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        kept, at, labels = ctx.saved_tensors
        grad = kept.new_zeros(ctx.places, kept.shape[-1])
        for here in _pieces(len(at), kept.shape[-1]):
            each = (kept[here] if ctx.few else kept[at[here]]).to(g.dtype).log_softmax(-1).exp_().mul_(-g[here, None])
            each[torch.arange(len(each), device=each.device), labels[here]] += g[here]
            grad[at[here]] = each.to(grad.dtype)
        return grad, None, None


def _pieces(count: int, classes: int) -> Iterator[slice]:
    step = max(1, CHUNK // max(1, classes))
    return (slice(i, min(i + step, count)) for i in range(0, count, step))
