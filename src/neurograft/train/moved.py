"""Did the training do what it says? Finite losses, and every awake tensor moved."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from neurograft.core.compact.mount import Mount
from neurograft.core.compact.spill import differing
from neurograft.core.errors import RunError


class Witness:
    """Watches a training from its start.

    Args:
        mount: what is trained.
    """

    def __init__(self, mount: Mount) -> None:
        self.mount = mount
        self.losses: list[float] = []
        self.restart()

    def restart(self) -> None:
        """Begin anew with the tensors the mount has now."""
        self.start = self.mount.mark()
        self.reached: set[str] = set()
        self.awake: set[str] = set()

    def rewind(self, names: Iterable[str]) -> None:
        """Give tensors the values they began with; they need not have moved then."""
        now = self.mount.named_parameters()
        for name in names:
            now[name].data.copy_(self.start[name])
            self.awake.discard(name)

    def loss(self, value: Tensor | float, *, step: int) -> float:
        """Return a loss as a number.

        Raises:
            RunError: it is not finite.
        """
        found = float(value)
        if not math.isfinite(found):
            raise RunError(
                f"the loss is {found} at step {step}; lower the learning rate, or look for overflow in half precision"
            )
        return found

    def gradients(self, awake: frozenset[str] | None = None, reached: Iterable[str] = ()) -> None:
        """Note, before a step, which tensors are awake and which got a gradient, or were reached without one."""
        self.reached |= set(reached)
        for name, parameter in self.mount.named_parameters().items():
            if awake is None or name in awake:
                self.awake.add(name)
                if parameter.grad is not None:
                    self.reached.add(name)

    def check(self) -> dict[str, Any]:
        """Return how many tensors and numbers moved, and which tensors no gradient reached.

        Raises:
            RunError: no step was made, or an awake tensor got no gradient or did not move. Where nobody said what to
                train (where=None), a part that the objective does not use is named instead, as `unreached`.
        """
        if not self.awake and not self.losses:
            raise RunError("the training made no step; raise max_steps or num_train_epochs")
        now = self.mount.named_parameters()
        moved = {n: differing(self.start, n, now[n]) for n in self.awake}
        blind = sorted(self.awake - self.reached)
        if not self.awake or (blind and (self.mount.declared or not self.reached)):
            raise RunError(
                f"no gradient reached {_listed(blind or sorted(now))}, although trained; its module is not used by "
                "this objective, or a custom kernel bypasses the weight"
            )
        still = sorted(n for n, count in moved.items() if not count)
        if still and (self.mount.declared or len(still) == len(moved)):
            raise RunError(
                f"{_listed(still)} did not move, although trained; no example reaches it, the learning rate is too "
                "small for its numbers, or every step was skipped"
            )
        lost = sorted(n for n in self.awake if not bool(torch.isfinite(now[n]).all()))
        if lost:
            raise RunError(f"{_listed(lost)} holds numbers that are not finite after training; lower the learning rate")
        found: dict[str, Any] = {"tensors": len(moved) - len(still), "numbers": sum(moved.values())}
        return found | ({"unreached": still} if still else {})


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
