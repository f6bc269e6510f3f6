"""How far one distribution is from another."""

from __future__ import annotations

from torch import Tensor


def relative_entropy(logp: Tensor, logq: Tensor) -> Tensor:
    """Return KL(p || q) in nats of log-probabilities [..., V] at each place, [...].

    Example:
        >>> import torch
        >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> round(float(relative_entropy(p, q)), 4), round(float(relative_entropy(q, p)), 4)
        (0.1438, 0.1308)
    """
    return (logp.exp() * (logp - logq)).sum(-1)
