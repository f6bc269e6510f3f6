"""A task's gradient, dropped at random where staying near the base pulls the other way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neurograft.core.card import method
from neurograft.core.context import Step
from neurograft.core.errors import RequestError
from neurograft.core.seeds import generator

NEUTRAL: dict[str, Any] = {"lam": 0.0, "penalty": 0.0}


@method(
    paper="ramt",
    needs={"labels", "per_token"},
    claims={"cross_entropy"},
    departs="One draw for each step and tensor, from a named generator. In an accumulation window, or over several "
    "processes, each batch's gradient is dropped by itself before they are added.",
)
def gradient_dropout(step: Step, *, lam: float = 1.0, penalty: float = 1e-4, seed: int = 0) -> Tensor:
    """Return the task's loss with the gradient a * (keep + (1 - keep) * (1 - lam)) on what is trained.

    a is the gradient of cross-entropy + penalty * sum over tensors of ||theta||_2, b that of the distillation loss
    -sum_v p_base(v) log p(v), and keep = [u < P] with u uniform in [0, 1) and

        P = 1/2 (1 + sign(a) (a + b) / (|a| + |b|)),

    which is 1 where the signs agree and |a| / (|a| + |b|) where they differ; b itself is never added. One forward pass
    is shared by both gradients, and the base is asked without them. Where nothing is trained, or gradients are off,
    only the value is returned.

    Args:
        step: the batch, its outputs; its `reference` runs something on the base.
        lam: how much of a is taken away where it is dropped; 0 gives cross-entropy.
        penalty: weight of the norms.
        seed: names the draws.

    Raises:
        RequestError: the training offers no reference, or lam is outside of [0, 1].
    """
    if not 0 <= lam <= 1:
        raise RequestError(f"lam={lam}", expected="a number from 0 to 1", do="give 1.0 to drop the whole gradient")
    trained = {n: p for n, p in step.model.named_parameters() if p.requires_grad}
    loss = step.mean(-step.log_probs)
    if penalty and trained:
        share = step.mean(torch.ones_like(step.log_probs))  # so that the batches of a window add up to one penalty
        loss = loss + penalty * share * torch.stack([p.norm() for p in trained.values()]).sum().to(loss.device)
    if not trained or not torch.is_grad_enabled():
        return loss
    base = step.of_base(lambda: Step(step.model, step.batch).scored()[0], who="gradient_dropout")
    distance = step.mean(-(base.softmax(-1) * step.scored()[0].log_softmax(-1)).sum(-1))
    pulls = torch.autograd.grad(loss, list(trained.values()), retain_graph=True, allow_unused=True)
    others = torch.autograd.grad(distance, list(trained.values()), allow_unused=True)
    total = loss.detach()
    for (name, theta), a, b in zip(trained.items(), pulls, others):
        if a is None:
            continue
        u = torch.rand(a.shape, generator=generator(seed, "gradient_dropout", step.step, name)).to(a.device)
        kept = a if b is None else dropped(a, b, u, lam)
        total = total + ((theta - theta.detach()) * kept.detach()).sum().to(total.device)
    return total


def agreement(a: Tensor, b: Tensor) -> Tensor:
    """Return P, the chance that an entry of a is kept; 1 where both are 0.

    Example:
        >>> agreement(torch.tensor([1.0, 1.0, -3.0]), torch.tensor([5.0, -1.0, 1.0])).tolist()
        [1.0, 0.5, 0.75]
    """
    size = a.abs() + b.abs()
    return torch.where(size > 0, 0.5 * (1 + a.sign() * (a + b) / size), 1.0)


def dropped(a: Tensor, b: Tensor, u: Tensor, lam: float) -> Tensor:
    """Return a where u < P, and (1 - lam) * a elsewhere."""
    return torch.where(u < agreement(a, b), a, (1 - lam) * a)
