"""How well a language model answers, read off the first token of each answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from neurograft.core.context import IGNORE, Batch, Context, Step, shifts
from neurograft.core.errors import RequestError

METRICS = ("probability", "accuracy", "logit", "rank")


def metric_of(metric: str, context: Context) -> Callable[[nn.Module], float]:
    """Return model -> the metric over the examples' first answer tokens, more is better."""
    if metric != "logit":
        return lambda model: float(read(model, context.batches, metric).mean())
    base = read(context.model, context.batches, "logit")
    return lambda model: float((read(model, context.batches, "logit") - base).mean())


@torch.no_grad()
def read(model: nn.Module, batches: Sequence[Batch], metric: str) -> Tensor:
    """Return a number for each example, float64 [N]."""
    return torch.cat([_of(metric, *first_answers(model, batch)) for batch in batches])


def _of(metric: str, logits: Tensor, answers: Tensor) -> Tensor:
    right = logits.gather(-1, answers[:, None])
    if metric == "probability":
        return logits.softmax(-1).gather(-1, answers[:, None])[:, 0]
    if metric == "logit":
        return right[:, 0]
    if metric == "accuracy":
        return (logits.argmax(-1) == answers).double()
    return -(logits > right).sum(-1).double()


def first_answers(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return logits, float64 [B, V], and token [B] of the first labelled position of each example."""
    step = Step(model, batch)
    logits, tokens = step.scored()
    labels = batch["labels"]
    if labels.dim() == 1:
        return logits.double(), tokens
    # Where the model predicts ahead, the first column of labels is never asked for.
    asked = (labels[:, 1:] if shifts(model) else labels) != IGNORE
    if not bool(asked.any(-1).all()):
        raise RequestError(
            "an example in which no token has a label",
            expected="an answer in every example",
            do="give prompt/completion rows, or labels that are not all -100",
        )
    rows = asked.nonzero()[:, 0]
    first = torch.ones_like(rows, dtype=torch.bool)
    first[1:] = rows[1:] != rows[:-1]
    return logits[first].double(), tokens[first]
