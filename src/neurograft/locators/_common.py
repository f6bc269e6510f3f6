"""What several locators do in the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from neurograft.core.context import IGNORE, Batch, Context, Step, shifts
from neurograft.core.errors import RequestError
from neurograft.core.prompts.examples import singles, size
from neurograft.core.ranges import least
from neurograft.core.selection import Scores


def scored(context: Context, values: Mapping[str, Tensor], card: Mapping[str, Any] | None = None) -> Scores:
    """Return scores float32 on the CPU."""
    return Scores(dict(context.sites), {n: v.detach().to("cpu", torch.float32) for n, v in values.items()}, card or {})


def tapped(context: Context) -> bool:
    """Say whether every site has a tap."""
    return all(site.tap is not None for site in context.sites.values())


def need_batches(context: Context) -> None:
    """Refuse to work without data."""
    if not context.batches:
        raise RequestError("no batches", expected="data to score the units on", do="give data")


def need_two_sets(
    context: Context, *, came: str = "one set of examples", expected: str = "two sets to tell apart"
) -> None:
    """Refuse to work without batches and contrast batches."""
    need_batches(context)
    if not context.contrast:
        raise RequestError(came, expected=expected, do="give rows with `positive` and `negative`")


def limited(batches: Sequence[Batch], limit: int | None) -> list[Batch]:
    """Return batches of at most so many examples together, the last one cut; all of them if None.

    Raises:
        RequestError: a limit below 1.

    Example:
        >>> [b["x"].tolist() for b in limited(2 * [{"x": torch.arange(2)}], 3)]
        [[0, 1], [0]]
    """
    least(limit=(limit, 1))
    if limit is None:
        return list(batches)
    found: list[Batch] = []
    for batch in batches:
        n = size(batch)
        if limit:
            cut = {k: v[:limit] if isinstance(v, Tensor) and v.dim() and len(v) == n else v for k, v in batch.items()}
            found.append(cut)
        limit = max(0, limit - n)
    return found


def effect(g: Tensor, x: Tensor | None) -> Tensor:
    """Return what each unit does to first order at each token, g * x summed over its features, float32 [tokens, n].

    Args:
        g: gradient, [tokens, n] or [tokens, n, w].
        x: what it is multiplied with, shaped alike; None for the gradient alone.

    Example:
        >>> effect(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, -1.0]]])).tolist()
        [[1.0]]
    """
    found = (g if x is None else x * g).float()
    return found.sum(-1) if found.dim() == 3 else found


def per_example(tokens: Tensor, rows: Tensor, examples: int) -> Tensor:
    """Sum [tokens, n] over the tokens of each example, [examples, n].

    Raises:
        RequestError: it is not known whose tokens they are, row -1.

    Example:
        >>> per_example(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0, 0, 1]), 2).tolist()
        [[3.0], [4.0]]
    """
    if len(rows) and int(rows[0]) < 0:
        raise RequestError(
            "scores by example of units that do not tell whose tokens they got, as some experts and relative positions",
            expected="units of which every token's example is known",
            do="leave them out (match=), or take over='data' or 'token'",
        )
    length = len(tokens) // examples
    if length and length * examples == len(rows):
        grid = torch.arange(examples, device=rows.device).repeat_interleave(length)
        if torch.equal(grid, rows):
            return tokens.reshape(examples, length, -1).sum(1)
    return tokens.new_zeros(examples, tokens.shape[1]).index_add_(0, rows, tokens)


def shares(context: Context) -> Callable[[Batch], Tensor]:
    """Return batch -> its share of what is attributed over all the batches: shares add up to the loss of one big batch.

    As in training a loss over tokens counts each token alike; what counts no tokens, and a target, counts examples.
    """
    examples = sum(size(b) for b in context.batches)
    labels = [b["labels"] for b in context.batches if isinstance(b.get("labels"), Tensor)]
    items = sum(int((v[..., 1:] if shifts(context.model) else v).ne(IGNORE).sum()) for v in labels)

    def share(batch: Batch) -> Tensor:
        if context.target is not None or context.asked is None:
            return context.scalar(batch) * (size(batch) / examples)
        step = Step(context.model, batch, items=items or None, apart=True)
        loss = context.asked(step)
        return loss if step.counted else loss * (size(batch) / examples)

    return share


def backward(scalar: Tensor) -> None:
    """Run backward from a scalar.

    Raises:
        RequestError: it is no scalar, not finite, or depends on nothing that is watched.
    """
    if scalar.dim() != 0 or not bool(torch.isfinite(scalar)):
        raise RequestError(
            f"a loss or target of {scalar.item() if scalar.dim() == 0 else f'shape {tuple(scalar.shape)}'}",
            expected="one finite number",
            do="check the data for NaN, or let the target return a scalar",
        )
    if not scalar.requires_grad:
        raise RequestError(
            "a loss or target that depends on no watched unit",
            expected="a differentiable function of the model's outputs",
            do="keep tensors attached: no .detach(), .item() or torch.no_grad() in it",
        )
    scalar.backward()


def ballots(locator: Callable[..., Scores], context: Context, **options: Any) -> list[Scores]:
    """Return the scores a locator gives for each example alone, for `selectors.vote`."""
    need_batches(context)
    found = []
    for batch in context.batches:
        for one in singles(batch):
            found.append(locator(_with_batches(context, [one]), **options))
    return found


def _with_batches(context: Context, batches: list[Batch]) -> Context:
    return replace(context, batches=batches)
