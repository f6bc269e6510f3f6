"""What a block of watching has seen, and the check on leaving that every tap did its work."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from neurograft.core.errors import RequestError, RunError
from neurograft.core.prompts.passing import Pass, Seen
from neurograft.core.taps.board import Board, Guest
from neurograft.core.units import Site


@dataclass
class Watch:
    """What a block of watching has seen.

    Args:
        now: the model's current pass; `now.number` counts passes.
        fired: site name -> how often its tap fired.
        tokens: site name -> how many tokens it saw.
        seen: where the activations that are being read stand; only during a call of the reader.
        kept: which of these the mask lets through, bool like their leading axes; None for all.
        lost: the site whose tap does not tell whose tokens it got, if this is one.
    """

    now: Pass
    fired: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    seen: Seen | None = None
    kept: Tensor | None = None
    lost: str = ""

    def place(self) -> tuple[Tensor, Tensor]:
        """Return the batch row and the position of the tokens that are being read, int64 [tokens] each.

        Raises:
            RequestError: it is not told whose tokens they are, as inside some experts.
        """
        if self.seen is None:
            raise RunError("place() was asked for outside of a reader")
        if self.lost:
            raise RequestError(
                f"activations at {self.lost!r}, which does not tell whose tokens it got",
                expected="units of which every token's example is known",
                do="leave it out (match=), or do not ask by example (over='data', pool='token')",
            )
        rows, at = (p.reshape(-1) for p in self.seen.place())
        if self.kept is None:
            return rows, at
        kept = self.kept.reshape(-1).cpu()
        return rows[kept], at[kept]


@contextmanager
def seated(board: Board, guest: Guest, found: Watch, why: str = "") -> Iterator[None]:
    """Seat a guest for a block and check on a regular end that every tap did its work."""
    board.join(guest)
    before = board.now.number
    try:
        yield
    finally:
        board.leave(guest)
    silent = [n for n, s in guest.sites.items() if not found.fired[n] and (guest.fired[n] or not routed(s))]
    if silent:
        passes = board.now.number - before
        raise RunError(
            f"the tap of {silent[0]} never fired ({len(silent)} of {len(guest.sites)} sites, {passes} forward passes): "
            + (why or "the model was not called, or a compiled or fused kernel bypasses the module")
        )
    empty = [n for n in guest.sites if not found.tokens[n] and not routed(guest.sites[n])]
    if empty:
        raise RunError(f"the tap of {empty[0]} saw no token ({len(empty)} sites): every position was masked")


def lost(site: Site, seen: Seen) -> bool:
    """Say whether tokens are some that were sent to an expert and nobody knows which, or no example's at all."""
    if seen.tokens is not None:
        return False
    return (routed(site) and len(seen.lead) == 1) or bool((seen.place()[0] < 0).any())


def routed(site: Site) -> bool:
    """Say whether a tap lies inside an expert, which may rightly see no token."""
    tap = site.tap
    return tap is not None and (tap.expert is not None or re.search(r"\bexperts\.\w*\d+\b", tap.module) is not None)
