"""How strongly the data pull at a unit's weights."""

from __future__ import annotations

import torch
from torch import Tensor

from neurograft.core.card import method
from neurograft.core.context import Context
from neurograft.core.errors import RequestError, one_of
from neurograft.core.selection import Scores
from neurograft.core.units import Parameters
from neurograft.locators._common import backward, need_batches, scored, shares
from neurograft.locators._parts import numbers, owners, summed, view
from neurograft.locators._weights import put_back, weight_gradients

SCORES = ("abs_mean", "mean_abs", "l1", "l2")


@method(
    paper="smt",
    needs={"batches", "labels", "gradients"},
    takes={"objective", "target"},
    claims={"finite", "length", "permutes", "planted"},
)
def gradient(context: Context, *, score: str = "abs_mean", warmup_lr: float = 0.0) -> Scores:
    """Score each unit by the signed gradient of its weights, accumulated over the batches: G = dL/dW of all the data.

    "abs_mean" is linear in G until the end, so it adds up each unit's sum and holds no dense accumulator; the
    others hold one float32 accumulator of every parameter of the sites, on the CPU. One dense gradient at a time
    is held in either case.

    Args:
        context: model, sites, batches, loss or target; the loss is that of one big batch, however it is cut.
        score: of a unit's numbers of G: "abs_mean" |mean G|, the default of the SMT paper's code (Sparse Matrix
            Tuning, arXiv 2405.15525), where neighbours of opposite sign cancel; "mean_abs" mean |G|, which its text
            describes; "l1" sum |G|; "l2" the Euclidean norm.
        warmup_lr: above 0, the model takes a step of AdamW with this rate after each batch while the gradients are
            gathered, as in the paper's warm-up, and is put back to the base afterwards.

    Raises:
        RequestError: no data, no scalar, or units without weights.
    """
    one_of(score, SCORES, what="score")
    if warmup_lr < 0:
        raise RequestError(f"warmup_lr={warmup_lr}", expected="0 or more", do="give 1e-5, or leave it out")
    need_batches(context)
    found = owners(context.sites, context.model)
    parameters = Parameters.of(context.model).by_name
    sums = {n: torch.zeros(s.n, dtype=torch.float64) for n, s in context.sites.items()}
    dense = {} if score == "abs_mean" else {n: torch.zeros(parameters[n].shape) for n in found}

    def tell(name: str, weight: Tensor, grad: Tensor) -> None:
        if name in dense:
            dense[name] += grad.float().cpu()
        else:
            for site, part in found[name]:
                sums[site] += summed(part, grad).double()

    if warmup_lr:
        _warm(context, parameters, tell, warmup_lr)
    else:
        share = shares(context)
        with weight_gradients(context.model, found, tell):
            for batch in context.batches:
                backward(share(batch))
    for name, total in dense.items():
        for site, part in found[name]:
            mine = view(part, total)
            sums[site] += (mine.square() if score == "l2" else mine.abs()).sum((1, 2)).double()
    sizes = {n: numbers(s) if score in ("abs_mean", "mean_abs") else 1 for n, s in context.sites.items()}
    values = {n: (v.sqrt() if score == "l2" else v.abs() / sizes[n]) for n, v in sums.items()}
    return scored(context, values, {"batches": len(context.batches)})


def _warm(context: Context, parameters: dict[str, torch.nn.Parameter], tell: object, lr: float) -> None:
    """Gather gradients along a short full fine-tune, and put every number back."""
    assert callable(tell)
    model = context.model
    moving = {n: p for n, p in parameters.items() if p.is_floating_point()}
    wanted, share = owners(context.sites, model), shares(context)
    with put_back(moving):
        for parameter in moving.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        optimizer = torch.optim.AdamW(moving.values(), lr=lr, weight_decay=0.0)
        for batch in context.batches:
            backward(share(batch))
            with torch.no_grad():
                for name in wanted:
                    grad = moving[name].grad
                    if grad is not None:
                        tell(name, moving[name].detach(), grad)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
