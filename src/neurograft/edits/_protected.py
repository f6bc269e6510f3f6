"""The keys whose values an edit must leave: those of general data, and those of the edits before it.

Shape letters: k neurons of an FFN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from neurograft.core.context import Context, device_of
from neurograft.core.errors import RequestError
from neurograft.core.grafts.stack import Stack
from neurograft.core.prompts.requests import Request, joined
from neurograft.core.taps.look import look
from neurograft.core.taps.tap import watch
from neurograft.edits._memory import Memory, at_subjects, read


@torch.no_grad()
def covariances(context: Context, found: Sequence[Memory]) -> dict[str, Tensor]:
    """Return E[key key^T] of each memory, float64 [k, k], over the context's batches.

    Without batches over the requests' own prompts, the subjects' last tokens left out.

    Raises:
        RequestError: no batches, and no other token in any prompt.
    """
    sums = {m.keys.name: torch.zeros(m.keys.n, m.keys.n, dtype=torch.float64) for m in found}
    tokens = dict.fromkeys(sums, 0)

    def add(name: str, x: Tensor) -> None:
        wide = x.double()
        sums[name] += (wide.T @ wide).cpu()
        tokens[name] += len(x)

    where = {m.keys.name: m.keys for m in found}
    if context.batches:
        for batch in context.batches:
            with watch(context.model, where, add):
                look(context.model, batch)
    else:
        rows = joined(context.requests, device=device_of(context.model))
        index = torch.arange(rows.batch["input_ids"].shape[1], device=rows.at.device)
        others = (index != rows.at[:, None]) & (index <= rows.last[:, None])
        if not bool(others.any()):
            raise RequestError(
                "prompts of a single token and no general data",
                expected="keys whose values are to stay",
                do="pass general=data",
            )
        read(context.model, where, rows, others, add)
    return {name: total / tokens[name] for name, total in sums.items()}


def caches(context: Context, found: Sequence[Memory]) -> dict[str, Tensor]:
    """Return sum key key^T over the requests of the edits that lie on the model, float64 [k, k] by memory."""
    earlier = earlier_requests(context.model)
    if not earlier:
        return {}
    rows = joined(earlier, device=device_of(context.model))
    read = at_subjects(context.model, {m.keys.name: m.keys for m in found}, rows)
    return {name: (x.double().T @ x.double()).cpu() for name, x in read.items()}


def earlier_requests(model: nn.Module) -> list[Request]:
    """Return the requests on the cards of the grafts that lie on a model."""
    return [Request.from_dict(r) for g in Stack.of(model).grafts.values() for r in g.card.get("requests", ())]
