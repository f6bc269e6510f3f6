"""What grafts did to one parameter: the originals of its touched entries, each kept once, and every change on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor

from neurograft.core.grafts.combined import Changes, combined, patched, rounded
from neurograft.core.overlap import Piece, parted, together
from neurograft.core.region import Region, union


@dataclass(frozen=True)
class Member:
    """A graft on one parameter.

    Args:
        changes: its changes, with their strength.
        region: every entry they touch.
        held: originals, in the parameter's dtype, on the CPU: of the entries that no older graft touches.
    """

    changes: Changes
    region: Region
    held: tuple[Piece, ...]


@dataclass
class Ledger:
    """What happened to one parameter.

    Nothing is kept for the union of the grafts: one that comes or goes looks at what it touches itself. The original
    of an entry stays with the oldest graft on it, and passes to the next oldest when that one leaves.

    Args:
        members: graft identity -> what it does here, the oldest first.
    """

    members: dict[str, Member] = field(default_factory=dict)

    def ordered(self) -> Changes:
        """Return the changes in the order of their grafts' identities."""
        return [change for identity in sorted(self.members) for change in self.members[identity].changes]

    def originals(self) -> Iterator[Piece]:
        """Give the originals of all touched entries, each once."""
        for member in self.members.values():
            yield from member.held

    def under(self, region: Region, now: Tensor) -> Tensor:
        """Turn the current numbers of a region, on the CPU, into the base's: in place, where a graft touches them."""
        for held, numbers in self.originals():
            now = patched(region, now, held, numbers)
        return now

    def numbers(self, region: Region, original: Tensor) -> Tensor:
        """Return what the grafts make of a region's originals, before rounding to the parameter's dtype."""
        return combined(region, original, self.ordered())

    def rounded(self, region: Region, original: Tensor) -> Tensor:
        """Return what the grafts make of a region's originals, in their dtype."""
        return rounded(region, original, self.ordered())

    def entered(self, identity: str, changes: Changes, weight: Tensor) -> tuple[Ledger, Piece]:
        """Return the ledger with one graft more, and the originals of what it touches."""
        region = union(change.region for change, _ in changes)
        original = self.under(region, region.read(weight).cpu())
        rest: Piece | None = (region, original)
        for member in self.members.values():
            rest = parted(rest, member.region)[1] if rest else None
        made = Member(changes, region, (rest,) if rest else ())
        return Ledger({**self.members, identity: made}), (region, original)

    def left(self, identity: str, weight: Tensor) -> tuple[Ledger, Piece]:
        """Return the ledger with one graft less, and the originals of what that one touched."""
        members = dict(self.members)
        gone = members.pop(identity)
        original = self.under(gone.region, gone.region.read(weight).cpu())
        rests: list[Piece | None] = list(gone.held)
        for name, member in members.items():
            cut = [parted(rest, member.region) for rest in rests if rest]
            passed, rests = [inside for inside, _ in cut if inside], [rest for _, rest in cut]
            if passed:
                members[name] = replace(member, held=(*member.held, *together(passed)))
        return Ledger(members), (gone.region, original)
