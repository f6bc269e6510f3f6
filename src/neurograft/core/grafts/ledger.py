"""What grafts did to one parameter: the originals of its touched entries, and every change on them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from neurograft.core.grafts.combined import combined
from neurograft.core.grafts.delta import Shift, Shut, Slice
from neurograft.core.region import Region

Change = Slice | Shift


@dataclass
class Ledger:
    """What happened to one parameter.

    Args:
        region: every touched entry.
        original: their numbers in the base, in the parameter's dtype, on the CPU.
        members: graft identity -> its changes here, with their strength.
    """

    region: Region
    original: Tensor
    members: dict[str, list[tuple[Change, float]]] = field(default_factory=dict)

    def ordered(self) -> list[tuple[Change, float]]:
        """Return the changes in the order of their grafts' identities."""
        return [change for identity in sorted(self.members) for change in self.members[identity]]

    def numbers(self) -> Tensor:
        """Return what the changes make of the originals, before rounding to the parameter's dtype."""
        return combined(self.region, self.original, self.ordered())


def aligned(change: Change, other: Region) -> Change:
    """Return a change in flat entries if it reads its parameter as other matrices than `other` does."""
    if change.region.matrix == other.matrix or isinstance(change, Shift):
        return change
    flat, order = change.region.flattened()
    if isinstance(change, Shut):
        return Shut(replace(flat, matrix=other.matrix))
    return Slice(replace(flat, matrix=other.matrix), change.values.reshape(-1)[order])
