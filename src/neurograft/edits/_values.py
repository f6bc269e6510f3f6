"""What a layer's output should be at a subject, so that the model says the target: found by gradient descent.

Shape letters: n requests, r rows, d features of the stream, V words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurograft.core.asking import asking
from neurograft.core.context import IGNORE, device_of, unlabelled
from neurograft.core.errors import RunError
from neurograft.core.prompts.requests import Request, Rows, joined
from neurograft.core.taps.tap import change
from neurograft.edits._memory import Memory, at_subjects


def wanted(
    model: nn.Module,
    memory: Memory,
    requests: Sequence[Request],
    *,
    steps: int,
    lr: float,
    clamp: float,
    decay: float,
    kl: float,
    absolute: bool = False,
    enough: float = 5e-2,
    eos: bool = False,
    at_once: int = 64,
) -> Tensor:
    """Return the stream behind a layer at each subject that makes the model say the target, [n, d].

    A vector is added there and found by Adam: cross-entropy of the target, averaged over its tokens and the contexts,
    plus kl * KL(now || before) of the prediction at the subject itself, plus decay * |vector| / |stream|^2; its norm
    never exceeds clamp * |stream|. Every request is on its own, however many run at once.

    Args:
        model: left as found.
        memory: the layer.
        requests: what is to be said.
        steps: of Adam.
        lr: its learning rate, in units of the stream's root mean square unless absolute.
        clamp: largest share of the stream's own norm.
        decay: weight of the norm.
        kl: weight of the divergence.
        absolute: lr in the stream's own units.
        enough: a request whose loss falls below this stops.
        eos: whether the end of the answer is asked for too.
        at_once: requests a pass.

    Raises:
        RunError: a loss is no number.
    """
    if len(requests) > at_once:
        how: dict[str, Any] = {"steps": steps, "lr": lr, "clamp": clamp, "decay": decay, "kl": kl, "enough": enough}
        parts = [requests[i : i + at_once] for i in range(0, len(requests), at_once)]
        return torch.cat([wanted(model, memory, part, absolute=absolute, eos=eos, **how) for part in parts])
    n, rows = len(requests), joined(requests, eos=eos, device=device_of(model))
    name = memory.stream.name
    first = rows.mean(at_subjects(model, {name: memory.stream}, rows)[name], n)
    limit = clamp * first.norm(dim=1, keepdim=True)
    unit = torch.ones_like(limit) if absolute else first.pow(2).mean(1, keepdim=True).sqrt()
    free = torch.zeros_like(first, requires_grad=True)
    optimizer = torch.optim.Adam([free], lr=lr)
    going = torch.ones(n, dtype=torch.bool, device=first.device)
    before: Tensor | None = None
    with asking(model):
        for _ in range(steps):
            vector = unit * free
            logits = _said(model, memory, rows, vector)
            there = logits[torch.arange(len(rows.at)), rows.at].float().log_softmax(-1)
            before = there.detach() if before is None else before
            told, apart = rows.mean(per_row(logits, rows), n), rows.mean(drifted(before, there), n)
            loss = told + kl * apart + decay * vector.norm(dim=1) / first.norm(dim=1) ** 2
            finite(loss)
            going &= loss.detach() >= enough
            if not bool(going.any()):
                break
            optimizer.zero_grad()
            loss.sum().backward()
            kept = free.detach().clone()
            optimizer.step()
            with torch.no_grad():
                free.mul_((limit / (unit * free).norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp(max=1.0))
                free.copy_(torch.where(going[:, None], free, kept))
    return first + unit * free.detach()


@torch.enable_grad()
def _said(model: nn.Module, memory: Memory, rows: Rows, vector: Tensor) -> Tensor:
    """Return the logits with each request's vector added to the stream at its subject."""

    def added(_: str, x: Tensor) -> Tensor:
        index = (torch.arange(len(rows.at), device=x.device), rows.at.to(x.device))
        return x.index_put(index, vector[rows.owner].to(x.dtype), accumulate=True)

    with change(model, {memory.stream.name: memory.stream}, added):
        logits: Tensor = model(**unlabelled(rows.batch)).logits
    return logits


def finite(loss: Tensor) -> None:
    """Raise if a loss is no number: a request would be left out without a word."""
    if not bool(loss.isfinite().all()):
        raise RunError("the loss of an edit is not finite: look for overflow in half precision, or lower lr")


def drifted(before: Tensor, now: Tensor) -> Tensor:
    """Return KL(now || before) of log-probabilities [..., V], as ROME has it.

    Example:
        >>> before, now = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        >>> round(float(drifted(before, now)), 4), round(float(drifted(now, before)), 4)
        (0.3681, 0.5108)
    """
    return (now.exp() * (now - before)).sum(-1)


def per_row(logits: Tensor, rows: Rows) -> Tensor:
    """Return the mean cross-entropy of each row's target, [r]."""
    labels = rows.batch["labels"][:, 1:]
    each = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
    return each.sum(1) / (labels != IGNORE).sum(1)
