"""Which units move from task to task."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from neurograft.core.card import method
from neurograft.core.choose import choose
from neurograft.core.context import Context
from neurograft.core.errors import RequestError
from neurograft.core.grafts.graft import Graft
from neurograft.core.prompts.collate import rebatched
from neurograft.core.selection import Scores
from neurograft.core.units import Parameters
from neurograft.locators._common import backward, scored

State = Mapping[str, Tensor]


@method(
    paper="fpf",
    needs={"gradients"},
    takes={"against", "objective", "target"},
    claims={"finite", "length"},
    departs="The paper's sensitivity score could not be read; units are ranked by the change between the ends of "
    "consecutive tasks, and the change between epochs inside a task is reported beside it (`inside`). Their ratio is "
    "no rank: units that hardly move inside a task come first by it. Batch statistics stay as they are.",
)
def drift(context: Context, *, tasks: int = 2, epochs: int = 2, lr: float = 0.05, batch_size: int = 16) -> Scores:
    """Score each unit by mean over n of (1 / its size) sum |theta_n - theta_(n-1)|, theta_n the model after task n.

    The model learns task after task by plain SGD and is put back; the tasks are consecutive parts of the examples.

    Args:
        context: model, examples in the order of the tasks, loss; or `against`, a list of models or grafts at the ends
            of tasks that were learned already, which are then compared and nothing is trained.
        tasks: parts of the data, of as many examples each as divides.
        epochs: passes over each part.
        lr: learning rate of SGD.
        batch_size: examples in a step, however the data are batched.

    Returns:
        Scores; the card holds `tasks`, and `inside`: site -> the same between consecutive epochs of one task.

    Raises:
        RequestError: fewer than two tasks, or fewer examples than tasks.
    """
    mine = {n: p for n, p in Parameters.of(context.model).by_name.items() if p.is_floating_point()}
    start = {n: p.detach().clone() for n, p in mine.items()}
    try:
        ends, steps = (
            _given(context, mine) if context.against is not None else _learned(context, tasks, epochs, lr, batch_size)
        )
        if len(ends) < 2:
            raise RequestError(f"{len(ends)} tasks", expected="at least 2, to compare", do="give more of them")
        between = _mean(context, mine, list(itertools.pairwise(ends)))
        inside = _mean(context, mine, steps) if steps else {}
    finally:
        _put(mine, start)
    card = {"tasks": len(ends), "inside": {n: v.tolist() for n, v in inside.items()}}
    return scored(context, between, card)


def _learned(
    context: Context, tasks: int, epochs: int, lr: float, batch_size: int
) -> tuple[list[State], list[tuple[State, State]]]:
    rows = rebatched(context.model, context.batches, 1)
    if tasks < 2 or len(rows) < tasks:
        raise RequestError(
            f"{tasks} tasks of {len(rows)} examples",
            expected="2 or more tasks, each of an example",
            do="give more data",
        )
    parts = [rows[task * len(rows) // tasks : (task + 1) * len(rows) // tasks] for task in range(tasks)]
    flags = {p: p.requires_grad for p in context.model.parameters()}
    mine = {n: p for n, p in Parameters.of(context.model).by_name.items() if p.is_floating_point()}
    for parameter in mine.values():
        parameter.requires_grad_(True)
    held = {p: p.grad for p in mine.values()}
    ends: list[State] = []
    steps: list[tuple[State, State]] = []
    try:
        optimizer = torch.optim.SGD(mine.values(), lr=lr)
        for part in parts:
            batches = rebatched(context.model, part, batch_size)
            last: State | None = None
            for _ in range(epochs):
                for batch in batches:
                    optimizer.zero_grad(set_to_none=True)
                    backward(context.scalar(batch))
                    optimizer.step()
                now = {n: p.detach().clone() for n, p in mine.items()}
                steps += [] if last is None else [(last, now)]
                last = now
            ends += [] if last is None else [last]
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for parameter, grad in held.items():
            parameter.grad = grad
    return ends, steps


def _given(context: Context, mine: Mapping[str, nn.Parameter]) -> tuple[list[State], list[tuple[State, State]]]:
    several = context.against
    if not isinstance(several, Sequence) or any(not isinstance(s, (nn.Module, Graft)) for s in several):
        raise RequestError(
            f"against={type(several).__name__}", expected="a list of models or grafts, in order", do="give the list"
        )
    ends: list[State] = []
    for one in several:
        if isinstance(one, nn.Module):
            ends.append({n: p.detach().clone() for n, p in Parameters.of(one).by_name.items()})
        else:
            with one.on(context.model):
                ends.append({n: p.detach().clone() for n, p in mine.items()})
    return ends, []


def _mean(
    context: Context, mine: Mapping[str, nn.Parameter], pairs: Sequence[tuple[State, State]]
) -> dict[str, Tensor]:
    total = {n: torch.zeros(s.n, dtype=torch.float64) for n, s in context.sites.items()}
    change = choose("locators", "change")
    for before, after in pairs:
        _put(mine, before)
        for name, value in change(replace(context, against=after)).values.items():
            total[name] += value / len(pairs)
    return total


def _put(mine: Mapping[str, nn.Parameter], state: State) -> None:
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(state[name])
