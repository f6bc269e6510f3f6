"""Value probes: a state's estimate of the reward to come, fitted by temporal differences.

Shape letters: M states of all rollouts in order, n channels, h hidden units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Value:
    """A fitted probe V(s) = squash(w2 . relu(W1 s + b1) + b2), or squash(w2 . s + b2) without hidden units.

    Args:
        W1: [h, n], or None.
        b1: [h], or None.
        w2: [h], or [n].
        b2: [].
        squash: whether a sigmoid ends it; False for probes of errors, which have a sign.
    """

    W1: Tensor | None
    b1: Tensor | None
    w2: Tensor
    b2: Tensor
    squash: bool = True

    def __call__(self, states: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return V of standardised states [M, n], [M]; `keep` names the channels that are not put at their mean."""
        if keep is not None:
            states = torch.zeros_like(states).index_copy_(1, keep, states[:, keep])
        found = states if self.W1 is None or self.b1 is None else (states @ self.W1.t() + self.b1).relu()
        out = found @ self.w2 + self.b2
        return out.sigmoid() if self.squash else out

    def importance(self) -> Tensor:
        """Return the L1 norm of each channel's column of W1, or |w|, [n]."""
        return self.w2.abs() if self.W1 is None else self.W1.abs().sum(0)


def fitted(
    states: Tensor,
    target: Tensor,
    following: Tensor | None,
    *,
    hidden: int,
    gamma: float,
    epochs: int,
    lr: float,
    decay: float,
    rng: torch.Generator,
) -> Value:
    """Fit a probe by full-batch Adam on the mean squared error to target + gamma * V(following state).

    Args:
        states: standardised, float32 [M, n].
        target: what is known, float32 [M]: the reward at a rollout's last state, 0 before it; or, with
            `following` None, the number to regress on.
        following: int64 [M], the state after each, -1 at a rollout's end; its value is a constant of the gradient.
        hidden: units; 0 for a linear probe.
        gamma: discount.
        epochs: steps of Adam.
        lr: step size.
        decay: weight decay of the first layer, which lets channels that tell nothing fall to 0.
        rng: draws the first weights.
    """
    n = states.shape[1]
    shapes = [(hidden, n), (hidden,), (hidden,), ()] if hidden else [(n,), ()]
    bounds = [n**-0.5, 0.0, hidden**-0.5, 0.0] if hidden else [0.0, 0.0]
    params = [((2 * torch.rand(s, generator=rng) - 1) * b).requires_grad_(True) for s, b in zip(shapes, bounds)]
    squash = following is not None

    def probed(*parts: Tensor) -> Value:
        first = parts[:2] if hidden else (None, None)
        return Value(first[0], first[1], parts[-2], parts[-1], squash)

    probe = probed(*params)
    groups: list[dict[str, Any]] = [{"params": params[:1], "weight_decay": decay}, {"params": params[1:]}]
    optimizer = torch.optim.Adam(groups, lr=lr)
    going = torch.zeros(0, dtype=torch.int64) if following is None else (following >= 0).nonzero()[:, 0]
    with torch.enable_grad():
        for _ in range(epochs):
            value, goal = probe(states), target.clone()
            if following is not None:
                goal[going] += gamma * value.detach()[following[going]]
            loss = (value - goal).square().mean()
            params_grads = torch.autograd.grad(loss, params)
            for parameter, gradient in zip(params, params_grads):
                parameter.grad = gradient
            optimizer.step()
    return probed(*[p.detach() for p in params])


def errors(value: Tensor, following: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Return the prediction errors gamma * V(s') - V(s) of steps within rollouts, and the states s' they lead to.

    Example:
        >>> errors(torch.tensor([0.5, 0.7, 0.2]), torch.tensor([1, 2, -1]), 1.0)[1].tolist()
        [1, 2]
    """
    before = (following >= 0).nonzero()[:, 0]
    after = following[before]
    return gamma * value[after] - value[before], after
