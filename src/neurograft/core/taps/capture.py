"""The activations of one batch, as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from neurograft.core.batches import Batch
from neurograft.core.errors import RequestError, RunError
from neurograft.core.prompts.passing import Seen
from neurograft.core.taps.board import Board, Guest
from neurograft.core.taps.look import look
from neurograft.core.units import Site


def capture(model: nn.Module, sites: Mapping[str, Site], batch: Batch) -> dict[str, Tensor]:
    """Run one batch and return its activations at each site, [B, T, n] or [B, T, n, w], on the CPU.

    Raises:
        RequestError: a site inside an expert, which does not see every token.
    """
    found: dict[str, Tensor] = {}

    def visit(name: str, x: Tensor, seen: Seen) -> None:
        if seen.astray(name):
            return
        if len(seen.lead) != 2:
            raise RequestError(
                f"the activations of {name!r}, shaped {tuple(x.shape)}",
                expected="one for each token of each row",
                do="choose sites outside of experts and pooled outputs",
            )
        found[name] = x.detach().to("cpu", torch.float32, copy=True)

    board, guest = Board.of(model), Guest(sites, visit)
    board.join(guest)
    try:
        with torch.no_grad():
            look(model, batch)
    finally:
        board.leave(guest)
    missing: Sequence[str] = [n for n in sites if n not in found]
    if missing:
        raise RunError(f"the tap of {missing[0]} never fired")
    return found
