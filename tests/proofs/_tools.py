"""What several proofs do in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.choose import choose
from neurograft.core.context import Step


class Says(nn.Module):
    """A causal language model that says the logits it holds, [B, T, V], whatever it is given."""

    loss_type = "ForCausalLM"

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, **inputs: Any) -> SimpleNamespace:
        """Return the logits."""
        return SimpleNamespace(logits=self.logits)


def said(logits: Tensor, labels: Tensor) -> Step:
    """Return a step in which the model says [N, V] and is asked for labels [N], in one row, padding in front."""
    wide = torch.cat([logits, logits[-1:]])[None]
    asked = torch.cat([torch.full((1,), -100), labels])[None]
    return Step(Says(wide.clone()), {"input_ids": torch.ones_like(asked), "labels": asked})


def gradient_of(objective: str, step: Step, **options: Any) -> Tensor:
    """Return the gradient of an objective with respect to the N predictions it scores, [N, V]."""
    step.model.zero_grad()
    choose("objectives", objective, **options)(step).backward()
    return step.model.logits.grad[0, :-1].clone()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of every parameter."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if "neurograft" not in n}


def moved(before: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return parameter -> flat numbers of the entries that differ in any bit, for those that have some."""
    found = {}
    for name, parameter in model.named_parameters():
        if name in before:
            here = (before[name] != parameter.detach()).reshape(-1).nonzero().reshape(-1)
            if len(here):
                found[name] = here
    return found


@contextmanager
def saving() -> Iterator[Callable[[], int]]:
    """Count the bytes autograd saves for the backward pass, parameters left out, each storage once."""
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield lambda: sum(seen.values())
