"""Several processes that train units which change on the way: what DDP does, for tensors that come and go.

DDP's reducer is built over the tensors it begins with. A schedule that selects anew replaces them, so here the model
stays unwrapped, gradients are averaged once a step, and every process takes the first one's selection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neurograft.core.errors import RequestError
from neurograft.core.selection import Selection

Reselect = Callable[[nn.Module, int], Selection]


def agreed(reselect: Reselect) -> Reselect:
    """Return what asks in every process, so that their random numbers keep in step, and gives the first's answer."""

    def ask(model: nn.Module, step: int) -> Selection:
        found: list[Any] = [reselect(model, step)]
        dist.broadcast_object_list(found, src=0)
        selection: Selection = found[0]
        return selection

    return ask


def check_wrapping(accelerator: Any) -> None:
    """Raise if the processes share more than gradients.

    Raises:
        RequestError: the model is to be sharded or driven by another engine.
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if not kind.startswith("MULTI_"):
        raise RequestError(
            f"a schedule that selects anew, with the processes joined by {kind}",
            expected="processes that hold the whole model each (DDP)",
            do="train without sharding, or take a schedule that is pure in (seed, step), such as 'sampled'",
        )


@contextmanager
def unwrapped(accelerator: Any, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Keep accelerate from wrapping a model in DDP inside the block.

    The tensors begin as the first process has them, as DDP sees to.
    """
    for parameter in parameters:
        dist.broadcast(parameter.detach(), src=0)
    # In this mode a model is placed, cast and remembered as always, and not wrapped.
    accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)
    try:
        yield
    finally:
        del accelerator.prepare_model


def average(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their mean over the processes; where only some processes have one, the others count as 0."""
    held = [p for p in parameters if p.requires_grad]
    if not held:
        return
    there = torch.tensor([p.grad is not None for p in held], dtype=torch.int32, device=held[0].device)
    dist.all_reduce(there, op=dist.ReduceOp.MAX)
    world = dist.get_world_size()
    for parameter, someone in zip(held, there.tolist()):
        if someone:
            grad: Tensor = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(grad.div_(world))
            parameter.grad = grad
