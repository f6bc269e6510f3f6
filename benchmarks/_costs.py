"""What a training takes, read where the Trainer passes, or where an optimizer steps in any other loop."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import TrainerCallback

from neurograft.core.compact.meter import saved


class Costs(TrainerCallback):
    """What a training takes, read where the Trainer passes.

    `seconds` has a number for each step, `saved`, `gradients` and `state` are bytes, and `before` counts steps that
    were taken for something else than this training.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.gradients, self.state, self.saved, self.before, self.began = 0, 0, 0, 0, 0.0
        self.watching: ExitStack | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock; in the second step watch what autograd saves instead."""
        if len(self.seconds) == 1:
            self.watching = ExitStack()
            self.meter = self.watching.enter_context(saved(kwargs["model"]))
        self.began = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the gradients that are there when the optimizer steps."""
        self.close()
        held = [p.grad for g in kwargs["optimizer"].param_groups for p in g["params"] if p.grad is not None]
        self.gradients = max(self.gradients, sum(g.nbytes for g in held))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock and count the optimizer's state."""
        self.close()
        self.seconds.append(time.perf_counter() - self.began)
        tensors = [v for s in kwargs["optimizer"].state.values() for v in s.values() if isinstance(v, Tensor)]
        self.state = max(self.state, sum(t.nbytes for t in tensors))

    def close(self, *, keep: bool = True) -> None:
        """Watch no longer, and keep what was seen if it was a step."""
        if self.watching is not None:
            self.watching.close()
            self.watching, self.saved = None, self.meter.bytes if keep else 0

    def become(self, other: Costs, *, before: int) -> None:
        """Take another's numbers over."""
        self.__dict__.update(other.__dict__)
        self.before = before


@contextmanager
def each_optimizer(model: nn.Module) -> Iterator[list[Costs]]:
    """Meter every optimizer that steps inside the block, in any loop; yield their costs in the order of first steps.

    A step begins where the one before it ended, so the first of each optimizer has no length of its own.

    Args:
        model: whose parameters, beside the optimizer's, count as no activations.
    """
    costs: list[Costs] = []
    known: weakref.WeakKeyDictionary[Optimizer, Costs] = weakref.WeakKeyDictionary()

    def before(optimizer: Optimizer, *rest: Any) -> None:
        if optimizer not in known:
            for other in costs:
                other.close(keep=False)
            known[optimizer] = Costs()
            costs.append(known[optimizer])
            known[optimizer].on_step_begin(None, None, None, model=model)
        known[optimizer].on_pre_optimizer_step(None, None, None, optimizer=optimizer)

    def after(optimizer: Optimizer, *rest: Any) -> None:
        mine = nn.ParameterList(p for group in optimizer.param_groups for p in group["params"])
        known[optimizer].on_step_end(None, None, None, optimizer=optimizer)
        known[optimizer].on_step_begin(None, None, None, model=nn.ModuleList([model, mine]))

    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    try:
        yield costs
    finally:
        for handle in handles:
            handle.remove()
        for one in costs:
            one.close(keep=False)
