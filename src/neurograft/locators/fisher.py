"""How sharply the likelihood depends on a unit: the diagonal of the empirical Fisher information."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neurograft.core.card import method
from neurograft.core.context import IGNORE, Batch, Context, shifts
from neurograft.core.errors import RequestError, one_of
from neurograft.core.prompts.examples import singles
from neurograft.core.running import run
from neurograft.core.selection import Scores
from neurograft.core.taps.tap import gradients
from neurograft.core.units import Parameters
from neurograft.locators._common import backward, effect, limited, need_batches, scored
from neurograft.locators._parts import numbers, owners, squared, view
from neurograft.locators._weights import weight_gradients

AGGREGATES, LABELS = ("sum", "mean", "fro"), ("true", "sampled")


@method(
    needs={"batches", "labels", "gradients"},
    takes={"objective", "positions", "target"},
    claims={"finite", "length", "permutes", "planted"},
)
def fisher(
    context: Context, *, aggregate: str = "sum", labels: str = "true", on: str = "weights", limit: int | None = None
) -> Scores:
    """Score each unit by F = mean over examples of (d log p(y|x) / dw)^2, squared before it is averaged.

    Examples run one by one. On the weights, F of every number a unit owns is aggregated; on the "gate", the
    number is a factor m = 1 in front of the unit's activation, dF/dm = sum over tokens of a * dL/da.

    Args:
        context: model, sites, batches with labels, loss; the loss of one example is taken as -log p.
        aggregate: "sum" of F over a unit's numbers (grows with the unit), their "mean", or "fro": the Frobenius norm
            of F in each tensor, summed over tensors, which holds one float32 for every number of the sites.
        labels: "true" labels, or "sampled" from the model's own predictions, which gives the Fisher itself.
        on: "weights" or "gate" (units with a tap).
        limit: use at most so many examples.

    Raises:
        RequestError: no data, no labels to sample in place of, or units without weights (or without a tap).
    """
    one_of(aggregate, AGGREGATES, what="aggregate")
    one_of(labels, LABELS, what="labels")
    one_of(on, ("weights", "gate"), what="on")
    need_batches(context)
    ones = [one for batch in limited(context.batches, limit) for one in singles(batch)]
    if labels == "sampled":
        ones = [sampled(context, one, i) for i, one in enumerate(ones)]
    if on == "gate":
        return scored(context, _gates(context, ones))
    return scored(context, _frobenius(context, ones) if aggregate == "fro" else _sums(context, aggregate, ones))


def sampled(context: Context, batch: Batch, number: int) -> Batch:
    """Return the batch with its labels drawn from the model's predictions; ignored places stay ignored.

    Raises:
        RequestError: there are no integer labels in the shape of the predictions.
    """
    labels = batch.get("labels")
    with torch.no_grad():
        out: Any = run(context.model, batch)
    logits = getattr(out, "logits", None)
    if labels is None or logits is None or labels.is_floating_point() or logits.shape[: labels.dim()] != labels.shape:
        raise RequestError(
            "labels='sampled' for a model that does not predict one of several classes at each label",
            expected="integer labels and logits [..., classes]",
            do="use labels='true'",
        )
    flat = logits.float().softmax(-1).reshape(-1, logits.shape[-1]).cpu()
    drawn = torch.multinomial(flat, 1, generator=context.generator("fisher", number)).reshape(labels.shape)
    if shifts(context.model):  # the prediction at t is of the token at t + 1
        drawn = torch.cat([drawn[:, :1], drawn[:, :-1]], 1)
    return {**batch, "labels": torch.where(labels == IGNORE, labels, drawn.to(labels))}


def _gates(context: Context, ones: Sequence[Batch]) -> dict[str, Tensor]:
    totals = {n: torch.zeros(s.n, dtype=torch.float64) for n, s in context.sites.items()}
    slopes: dict[str, Tensor] = {}  # a module that several layers share tells its part once a layer

    def read(name: str, x: Tensor, g: Tensor, rows: Tensor) -> None:
        mine = effect(g, x).sum(0).double().cpu()
        slopes[name] = slopes[name] + mine if name in slopes else mine

    for one in ones:
        slopes.clear()
        with gradients(context.model, context.sites, read, mask=context.positions):
            backward(context.scalar(one))
        for name, slope in slopes.items():
            totals[name] += slope.square()
    return {n: v / len(ones) for n, v in totals.items()}


def _sums(context: Context, aggregate: str, ones: Sequence[Batch]) -> dict[str, Tensor]:
    found = owners(context.sites, context.model)
    totals = {n: torch.zeros(s.n, dtype=torch.float64) for n, s in context.sites.items()}

    def tell(name: str, weight: Tensor, grad: Tensor) -> None:
        for site, part in found[name]:
            totals[site] += squared(part, grad).double()

    for one in ones:
        with weight_gradients(context.model, found, tell):
            backward(context.scalar(one))
    sizes = {n: numbers(s) if aggregate == "mean" else 1 for n, s in context.sites.items()}
    return {n: v / (len(ones) * sizes[n]) for n, v in totals.items()}


def _frobenius(context: Context, ones: Sequence[Batch]) -> dict[str, Tensor]:
    found, parameters = owners(context.sites, context.model), Parameters.of(context.model).by_name
    dense = {n: torch.zeros_like(parameters[n], dtype=torch.float32, requires_grad=False) for n in found}

    def tell(name: str, weight: Tensor, grad: Tensor) -> None:
        dense[name] += grad.float().square()

    for one in ones:
        with weight_gradients(context.model, found, tell):
            backward(context.scalar(one))
    totals = {n: torch.zeros(s.n, dtype=torch.float64) for n, s in context.sites.items()}
    for name, pairs in found.items():
        dense[name] /= len(ones)
        for site, part in pairs:
            totals[site] += view(part, dense[name]).square().sum((1, 2)).sqrt().double().cpu()
    return totals
