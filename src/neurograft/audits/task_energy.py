"""How few directions hold what a task's inputs make of the features."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.anatomy.sites import sites
from neurograft.audits._changes import as_change, evaluating
from neurograft.core.card import method
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError
from neurograft.core.prompts.passing import Seen
from neurograft.core.taps.board import Board, Guest
from neurograft.core.taps.look import look


@method(paper="slicefine")
def task_energy(
    model: nn.Module, change: object = None, batches: Sequence[Batch] = (), *, k: int = 8
) -> dict[str, Any]:
    """Return the share of the variance of each matrix's inputs that lies in their k strongest directions.

    Where it is high and a slice's features are among them, the slice has a gradient to follow.

    Args:
        model: the base.
        change: a graft, grafts or a tuned model to look at instead, or None.
        batches: the task's inputs.
        k: directions.

    Returns:
        `sites`: for each, its name, `features`, `energy`; `k`.

    Raises:
        RequestError: no batches, or k below 1.
    """
    if not batches or k < 1:
        raise RequestError(f"{len(batches)} batches, k={k}", expected="data, and k from 1", do="give both")
    where = {n: s for n, s in sites(model, "column").items() if s.tap is not None}
    sums: dict[str, list[Tensor]] = {}

    def visit(name: str, x: Tensor, seen: Seen) -> None:
        kept = seen.mask("all")
        rows = (x if kept is None else x[kept]).detach().double().reshape(-1, where[name].n).cpu()
        count, mean, square = sums.setdefault(
            name, [torch.zeros(()), torch.zeros(rows.shape[1]), torch.zeros(rows.shape[1], rows.shape[1])]
        )
        sums[name] = [count + len(rows), mean + rows.sum(0), square + rows.t() @ rows]

    with nullcontext(model) if change is None else as_change(model, change).on() as net, evaluating(net):
        board, guest = Board.of(net), Guest(where, visit)
        board.join(guest)
        try:
            for batch in batches:
                look(net, batch)
        finally:
            board.leave(guest)
    found = []
    for name, (count, total, square) in sums.items():
        spread = torch.linalg.eigvalsh(square / count - torch.outer(total, total) / count**2).clamp(min=0).flip(0)
        share = float(spread[:k].sum() / spread.sum()) if float(spread.sum()) else 0.0
        found.append({"name": name, "features": len(total), "energy": share})
    return {"sites": found, "k": k}
