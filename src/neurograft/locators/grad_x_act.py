"""First-order effect of a unit: activation times gradient, or weight times gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from neurograft.core.card import method
from neurograft.core.context import Batch, Context
from neurograft.core.errors import one_of
from neurograft.core.prompts.examples import singles, size
from neurograft.core.selection import Scores
from neurograft.core.taps.tap import gradients
from neurograft.locators._common import backward, effect, need_batches, per_example, scored, tapped
from neurograft.locators._parts import owners, summed
from neurograft.locators._weights import weight_gradients

OVER = ("token", "example", "data")


@method(
    needs={"batches", "labels", "gradients"},
    takes={"objective", "positions", "target"},
    claims={"finite", "length", "permutes", "planted"},
)
def grad_x_act(context: Context, *, signed: bool = False, over: str = "example", multiply: bool = True) -> Scores:
    """Score each unit by how much the scalar would change, to first order, if it were silenced.

    Units with a tap: sum over tokens (and features) of a * dF/da, in one forward and one backward pass that
    computes no weight gradient. Units with weights only: sum over a unit's numbers of w * dF/dw, each dense
    gradient dropped as soon as it is reduced. F is the loss, or the target. Scores are means over examples; the
    loss of a batch is the mean of its examples' losses, so they do not depend on how examples are batched (a loss of
    your own should be such a mean too).

    Args:
        context: model, sites, batches, loss or target, positions (for taps).
        signed: keep the sign, so that a positive score means silencing lowers F.
        over: where the absolute value is taken: of each "token" (for weights: each number), of each "example", or
            of the mean over the "data". For weights "example" runs the examples one by one.
        multiply: False leaves the activation or weight out and scores by the gradient alone.

    Raises:
        RequestError: no data, no scalar, or units with neither tap nor weights.
    """
    one_of(over, OVER, what="over")
    need_batches(context)
    values = _taps(context, signed, over, multiply) if tapped(context) else _weights(context, signed, over, multiply)
    return scored(context, values)


def _taps(context: Context, signed: bool, over: str, multiply: bool) -> dict[str, Tensor]:
    totals = {n: torch.zeros(s.n, dtype=torch.float64) for n, s in context.sites.items()}
    by_row = over == "example" and not signed
    # A module that several layers share tells its units' effects once a layer; an example's is their sum.
    each: dict[str, Tensor] = {}
    examples = 0

    def read(name: str, x: Tensor, g: Tensor, rows: Tensor) -> None:
        found = effect(g, x if multiply else None)
        if by_row:
            mine = per_example(found, rows, here)
            each[name] = each[name] + mine if name in each else mine
        else:
            found = found.abs() if over == "token" and not signed else found
            totals[name] += here * found.sum(0).double().cpu()

    with gradients(context.model, context.sites, read, mask=context.positions):
        for batch in context.batches:
            here = size(batch)
            backward(context.scalar(batch))
            for name, mine in each.items():
                totals[name] += here * mine.abs().sum(0).double().cpu()
            each.clear()
            examples += here
    found = {n: v / examples for n, v in totals.items()}
    return {n: v.abs() for n, v in found.items()} if over == "data" and not signed else found


def _weights(context: Context, signed: bool, over: str, multiply: bool) -> dict[str, Tensor]:
    found = owners(context.sites, context.model)
    totals = {n: torch.zeros(s.n, dtype=torch.float64) for n, s in context.sites.items()}
    step = {n: torch.zeros(s.n) for n, s in context.sites.items()}

    def tell(name: str, weight: Tensor, grad: Tensor) -> None:
        each = weight * grad if multiply else grad
        if over == "token" and not signed:
            each = each.abs()
        for site, part in found[name]:
            step[site] += summed(part, each)

    examples = 0
    with weight_gradients(context.model, found, tell):
        for batch in _pieces(context, one_by_one=over == "example" and not signed):
            here = size(batch)
            backward(context.scalar(batch))
            for name, value in step.items():
                totals[name] += here * (value.abs() if over == "example" and not signed else value).double()
                value.zero_()
            examples += here
    means = {n: v / examples for n, v in totals.items()}
    return {n: v.abs() for n, v in means.items()} if over == "data" and not signed else means


def _pieces(context: Context, *, one_by_one: bool) -> list[Batch]:
    return [b for batch in context.batches for b in singles(batch)] if one_by_one else list(context.batches)
