"""Anchored: after each step, numbers that matter more to the base than to the task go back to where they began."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from neurograft.core.card import method
from neurograft.core.errors import RequestError

INNER = ("AdamW", "Adam", "SGD", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adamax")


def rank(t: Tensor) -> Tensor:
    """Return sigmoid((|t| - mean |t|) / std |t|); zeros where t is all zero, 1/2 where |t| is the same throughout.

    Example:
        >>> [round(float(r), 4) for r in rank(torch.tensor([1.0, -2.0, 3.0]))]
        [0.2689, 0.5, 0.7311]
    """
    size = t.abs() if t.dtype == torch.float64 else t.abs().float()
    if not bool(size.any()):
        return size
    off = size - size.mean()
    spread = off.square().sum() / max(1, size.numel() - 1)
    return torch.sigmoid(off / spread.sqrt()) if float(spread) > 0 else torch.full_like(size, 0.5)


def shares(base: Tensor, task: Tensor) -> Tensor:
    """Return which share c of its step each number keeps: task / (base + task) where the task wins, over their mean.

    Args:
        base: importance for the base, any shape, 0 to 1.
        task: importance for the task.

    Returns:
        0 where the task does not win, and at most 1.

    Example:
        >>> shares(torch.tensor([0.5, 0.2, 0.6]), torch.tensor([0.5, 0.6, 0.9])).tolist()
        [0.0, 1.0, 0.8888888955116272]
    """
    wins = task > base
    c = torch.where(wins, task / (base + task), torch.zeros_like(task))
    count = int(wins.sum())
    return (c * (count / c.sum())).clamp(max=1.0) if count else c


def blended(began: Tensor, now: Tensor, c: Tensor) -> Tensor:
    """Return (1 - c) began + c now, exactly `began` where c = 0 and `now` where c = 1."""
    wide = began.to(c.dtype)
    mixed = torch.where(c == 1, now.to(c.dtype), wide + c * (now.to(c.dtype) - wide))
    return mixed.to(now.dtype)


class Anchored(torch.optim.Optimizer):
    """Blends what an optimizer of `torch.optim` has just done with the numbers it began with.

    Beside the optimizer's moments it holds two copies of each tensor, in its state and so in checkpoints, and in the
    tensor's dtype: the numbers it began with (`anchor`), and the sum of all gradients (`gathered`).
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make a step of the optimizer, then blend; return what the closure says, if there is one."""
        with torch.enable_grad():
            value = None if closure is None else closure()  # before the gradients are read
        mine = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        fresh = {p: p.detach().clone() for p in mine if "anchor" not in self.state.get(p, {})}
        pulls = {p: p.grad.detach().clone() for p in mine if p.grad is not None}
        super().step()  # type: ignore[safe-super]
        for p, grad in pulls.items():
            state = self.state[p]  # an optimizer of torch makes its own only where there is none, so ours comes later
            if p in fresh:
                state["anchor"], state["gathered"] = fresh[p], torch.zeros_like(fresh[p])
            state["gathered"] += grad
            p.copy_(blended(state["anchor"], p, shares(rank(state["anchor"]), rank(state["gathered"]))))
        return value


@method(
    paper="spider",
    departs="A tensor whose sizes are all equal has rank 1/2, where the paper divides by 0, and one in which the task "
    "wins nowhere stays. The rank of the base is computed anew at each step instead of being kept. Tensors are "
    "ranked as they are trained: whole, or the chosen entries of a slice.",
)
def anchored(
    groups: Iterable[dict[str, Any]],
    *,
    lr: float = 2e-5,
    optimizer: str = "AdamW",
    weight_decay: float = 0.0,
    **options: Any,
) -> torch.optim.Optimizer:
    """Let a number keep the share c of its way that says how far the task outweighs the base: w = (1 - c) w0 + c w.

    c = I / (I0 + I) where I > I0, else 0, divided by its mean over the winners and at most 1; I0 = rank(w0),
    I = rank(sum of all gradients), each over one tensor.

    Args:
        groups: parameter groups.
        lr: learning rate.
        optimizer: what makes the step: an elementwise one of `torch.optim`.
        weight_decay: of the optimizer.
        **options: the optimizer's.

    Raises:
        RequestError: another optimizer.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        >>> moving = anchored([{"params": [w]}], lr=1.0, optimizer="SGD")
        >>> w.grad = torch.tensor([3.0, 2.0, 1.0])
        >>> moving.step()
        >>> w.tolist()
        [-2.0, -2.0, 3.0]
    """
    if optimizer not in INNER:
        raise RequestError(
            f"optimizer={optimizer!r} inside of 'anchored'", expected=f"one of {', '.join(INNER)}", do="check the name"
        )
    inner = getattr(torch.optim, optimizer)
    made: torch.optim.Optimizer = type(f"Anchored{optimizer}", (Anchored, inner), {})(
        groups, lr=lr, weight_decay=weight_decay, **options
    )
    return made
