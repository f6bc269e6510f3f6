"""Another locator, asked after the head has been trained for a moment."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from neurograft.anatomy.describe import anatomy
from neurograft.core.card import method
from neurograft.core.choose import choose
from neurograft.core.context import Context
from neurograft.core.errors import RequestError
from neurograft.core.prompts.collate import rebatched
from neurograft.core.selection import Scores
from neurograft.locators._common import backward, need_batches
from neurograft.locators._weights import put_back


@method(
    needs={"batches", "labels", "gradients"},
    takes={"against", "objective", "positions", "target"},
    claims={"finite", "length", "permutes"},
)
def rehearsed(
    context: Context, *, by: Any = "fisher", steps: int = 100, lr: float = 1e-2, batch_size: int = 8
) -> Scores:
    """Train the head alone for a few steps, ask another locator, and put the head back.

    Gradients behind a random head say nothing about the layers before it.

    Args:
        context: model, batches with labels, loss; and what the other locator needs.
        by: the other locator: a choice of `locators`.
        steps: of AdamW, over the batches in turn; 0 asks at once.
        lr: their learning rate.
        batch_size: examples in a step, however the data are batched.

    Raises:
        RequestError: no data, or a model without a head.
    """
    need_batches(context)
    head = anatomy(context.model).head
    if head is None:
        raise RequestError("a model without a head", expected="a model for a task", do="ask the other locator itself")
    batches = rebatched(context.model, context.batches, batch_size)
    mine = dict(context.model.get_submodule(head).named_parameters())
    flags = {p: p.requires_grad for p in context.model.parameters()}
    losses = []
    with put_back(mine):
        try:
            for parameter in flags:
                parameter.requires_grad_(any(parameter is p for p in mine.values()))
            optimizer = torch.optim.AdamW(mine.values(), lr=lr, weight_decay=0.0)
            for step in range(steps):
                optimizer.zero_grad(set_to_none=True)  # also what the model came with
                loss = context.scalar(batches[step % len(batches)])
                backward(loss)
                losses.append(float(loss.detach()))
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
        found: Scores = choose("locators", by)(context)
    card = {
        **found.card,
        "head": head,
        "rehearsal": {"steps": steps, "lr": lr, "losses": losses[:: max(1, steps // 20)]},
    }
    return replace(found, card=card)
