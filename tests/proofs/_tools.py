"""What several proofs do in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.choose import choose
from neurograft.core.context import IGNORE, Step
from neurograft.pipeline.attach import attach
from neurograft.train.loop import fit
from neurograft.worlds.mixture import mixture
from neurograft.worlds.tiny import fit as plain_fit
from neurograft.worlds.tiny import llama


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


def rows_in(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return a batch's examples one by one, as a user's rows come."""
    return [{k: v[i] for k, v in batch.items()} for i in range(len(next(iter(batch.values()))))]


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


KNOWN, LEARNED = ("copy", "reverse"), "count"


@cache
def base(seed: int) -> nn.Module:
    """Return a tiny decoder that knows how to copy and to reverse; shared, to be left as found."""
    model = llama(seed, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_key_value_heads=4)
    return plain_fit(model, mixture(KNOWN, count=260, batch=32, length=3, seed=seed), lr=4e-3)


def held_out_at(
    model: nn.Module,
    where: Any,
    *,
    lr: float,
    target: float = 0.75,
    task: str = LEARNED,
    seed: int = 0,
    steps: int = 240,
) -> float:
    """Return KL(base || tuned) on what the base knew, when the loss on a new task first falls below the target.

    Raises:
        AssertionError: it never does.
    """
    return tuned_to(model, where, lr=lr, target=target, task=task, seed=seed, steps=steps)["kl"]


def tuned_to(
    model: nn.Module,
    where: Any,
    *,
    lr: float,
    target: float,
    task: str,
    seed: int = 0,
    steps: int = 240,
    probe: Callable[[], dict[str, float]] | None = None,
    adapter: Any = "slice",
    known_tasks: tuple[str, ...] = KNOWN,
) -> dict[str, float]:
    """Tune on a task until its held-out loss falls below the target, and return what was read there."""
    batches = mixture((task,), count=40, batch=32, length=3, seed=50 + seed)
    test = mixture((task,), count=1, batch=128, length=3, seed=90)
    held = mixture(known_tasks, count=1, batch=128, length=3, seed=91)
    with torch.no_grad():
        known = Step(model, held[0]).scored()[0].log_softmax(-1)
    found: dict[str, float] = {}

    class Reached(Exception):
        pass

    def look(step: int) -> None:
        if step % 5:
            return
        with torch.no_grad():
            model.eval()
            loss = float(Step(model, test[0]).log_probs.mean().neg())
            now = Step(model, held[0]).scored()[0].log_softmax(-1)
            model.train()
        if loss < target:
            found.update(kl=float((known.exp() * (known - now)).sum(-1).mean()), loss=loss, steps=step)
            if probe is not None:
                model.eval()
                found.update(probe())
            raise Reached

    with attach(model, where, adapter=adapter) as live:
        with suppress(Reached):
            fit(live, batches, steps=steps, lr=lr, warmup=10, evaluate=look, seed=seed)
    model.eval()
    assert found, f"the loss on {task} never fell below {target}"
    return found


@torch.no_grad()
def right(model: nn.Module, batch: Mapping[str, Tensor]) -> float:
    """Return the share of a causal model's labelled tokens that are the likeliest, a number without a gradient."""
    labels = batch["labels"][:, 1:]
    keep = labels != IGNORE
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return float((logits.argmax(-1)[keep] == labels[keep]).float().mean())
