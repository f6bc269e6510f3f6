"""Operations under training: their tensors are trainable, and the graft holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from neurograft.core.compact.mount import Mount
from neurograft.core.compact.values import register_values, unregister_values
from neurograft.core.grafts.delta import Delta
from neurograft.core.grafts.operation import Operation


class Held:
    """A trainable tensor of an operation; an `Entry` of `core.compact.values`.

    Args:
        name: under which the model lists it: a module of the model, a dot, and a leaf.
        value: what it starts with.
    """

    def __init__(self, name: str, value: Tensor) -> None:
        wide = value.detach().clone() if value.dtype == torch.float64 else value.detach().float().clone()
        self.name, self.theta = name, nn.Parameter(wide)

    def moved(self, device: torch.device) -> None:
        """Follow the model to another device."""
        self.theta.data = self.theta.data.to(device)

    def write(self) -> None:
        """Nothing to write: no weight holds it."""

    def reload(self) -> None:
        """Nothing to take over: what was loaded is the base."""


class Live(Protocol):
    """An operation on the model whose tensors are trained."""

    resting: bool

    def held(self) -> Mapping[str, Held]:
        """Return its trainable tensors, each by the name of a parameter nearby with a word behind it."""

    def operation(self) -> Operation:
        """Return it as it is now."""

    def remove(self) -> None:
        """Take it off."""


class OperationMount(Mount):
    """Operations in the place of weight changes.

    Args:
        model: the model.
        place: called once the model is frozen, puts the operations on one after the other and yields them.
        new: parameters the base's checkpoint lacks.
    """

    def __init__(
        self,
        model: nn.Module,
        place: Callable[[], Iterator[Live]],
        *,
        new: Iterable[str] | Mapping[str, int] = (),
    ) -> None:
        self.live: list[Live] = []
        super().__init__(model, new=new)
        for live in place():
            self.live.append(live)
        register_values(model, [h for live in self.live for h in live.held().values()])

    def undo(self) -> None:
        """Take back what an attachment did that failed half way."""
        for live in self.live:
            live.remove()
        super().undo()

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the operations' tensors."""
        return {name: held.theta for live in self.live for name, held in live.held().items()}

    def deltas(self) -> dict[str, Delta]:
        """Return nothing: no weight changes."""
        return {}

    def operations(self) -> tuple[Operation, ...]:
        """Return the operations as they are now."""
        return tuple(live.operation() for live in self.live)

    def rest(self) -> Callable[[], None]:
        """Pass the operations by for a moment."""
        self._resting(True)
        return lambda: self._resting(False)

    def _resting(self, value: bool) -> None:
        for live in self.live:
            live.resting = value

    def unmount(self) -> None:
        """Take the operations off."""
        for live in self.live:
            live.remove()
        unregister_values(self.model)
