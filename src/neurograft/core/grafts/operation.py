"""Operations: payloads of a graft that are no weight change, behind one small protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from neurograft.core.grafts.delta import Slice


class Mounted(Protocol):
    """A mounted operation."""

    def remove(self) -> None:
        """Take it off without a trace."""


class Operation(Protocol):
    """What mounts on a model without changing its weights.

    An operation's class is found again by its dotted name when a graft is read: it offers
    `from_parts(meta, tensors)`.
    """

    @property
    def scalable(self) -> bool:
        """Whether it has a strength."""

    def meta(self) -> dict[str, Any]:
        """Return plain data, with "type": the dotted name of the class."""

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors."""

    def mount(self, model: nn.Module) -> Mounted:
        """Put it on; RequestError if it lands on nothing."""

    def fold(self, model: nn.Module) -> dict[str, Slice]:
        """Return it as weight changes by parameter where that is exact; RequestError where it is not."""

    def clashes(self, other: Operation) -> bool:
        """Say whether both replace the same activation, so that their order would matter."""

    def scaled(self, s: float) -> Operation:
        """Return it at strength s; itself at 1."""

    def describe(self) -> str:
        """Return a few words for messages."""
