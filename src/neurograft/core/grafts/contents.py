"""What a graft holds: changes, the base they belong to, and a card. What it does is `graft.Graft`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from neurograft.core.fingerprint import digest
from neurograft.core.grafts.delta import Delta
from neurograft.core.grafts.operation import Operation
from neurograft.core.grafts.replay import Home, Replay


@dataclass(frozen=True, eq=False)  # tensors have no one truth of being equal; whether two do the same says `identity`
class Contents:
    """The contents of a graft.

    Args:
        deltas: checkpoint tensor -> its change.
        operations: payloads that are no weight change.
        base: checkpoint tensor -> digest of it in the base; covers every delta but the `New` ones.
        card: plain data: base, recipe, selection, data digests, seeds, versions, citations, audit.
        strength: s in original + s * (value - original).
        originals: the base's numbers under each slice, if known; never saved.
        home: the model a log of seeds was made on, held weakly; never saved.
    """

    deltas: Mapping[str, Delta] = field(default_factory=dict)
    operations: tuple[Operation, ...] = ()
    base: Mapping[str, str] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)
    strength: float = 1.0
    originals: Mapping[str, Tensor] = field(default_factory=dict)
    home: Home | None = field(default=None, repr=False, compare=False)

    @cached_property
    def identity(self) -> str:
        """Digest of what the graft changes, whatever its strength and card."""
        deltas = {n: {"shape": list(d.shape), **d.tensors()} for n, d in self.deltas.items()}
        return digest(deltas, dict(self.base), [digest(o.meta(), o.tensors()) for o in self.operations])

    @property
    def numel(self) -> int:
        """How many numbers the graft holds."""
        return sum(d.numel for d in self.deltas.values()) + sum(
            t.numel() for o in self.operations for t in o.tensors().values()
        )

    @property
    def empty(self) -> bool:
        """Whether it changes nothing at all."""
        return not self.deltas and not self.operations

    @property
    def logged(self) -> bool:
        """Whether some of it is a log of seeds, which replays only where it was made."""
        return any(isinstance(d, Replay) for d in self.deltas.values())

    def scaled_operations(self) -> tuple[Operation, ...]:
        """Return the operations at the graft's strength."""
        return tuple(o.scaled(self.strength) for o in self.operations)
