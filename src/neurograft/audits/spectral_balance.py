"""Are all slices of a matrix alike? Eigenvalues of neighbouring groups of rows or columns, compared."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.audits._changes import as_change
from neurograft.core.card import method
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError, one_of
from neurograft.core.units import Parameters

AXES = ("rows", "columns")


@method(
    paper="slicefine",
    departs="Groups are neighbours of equal size (the last may be smaller and is then left out); spreads are standard "
    "deviation over mean across groups. The paper's own summary was not read.",
)
def spectral_balance(
    model: nn.Module, change: object = None, batches: Sequence[Batch] = (), *, groups: int = 8, axis: str = "columns"
) -> dict[str, Any]:
    """Cut every matrix into groups of rows or columns and compare the spectra of W_g W_g^T across them.

    Args:
        model: the base.
        change: a graft, grafts or a tuned model to look at instead, or None.
        batches: not read.
        groups: how many; matrices with fewer rows or columns are left out.
        axis: "rows" or "columns".

    Returns:
        `parameters`: for each name, `traces` by group, `trace_spread`, and `eigenvalue_spread`, the mean over the
        eigenvalues of their spread; small is balanced.

    Raises:
        RequestError: no matrix has that many rows or columns.
    """
    one_of(axis, AXES, what="axis")
    found = []
    with nullcontext(model) if change is None else as_change(model, change).on() as net:
        for name, weight in Parameters.of(net).by_name.items():
            if weight.dim() == 2 and groups > 1:
                w = weight.detach().double() if axis == "rows" else weight.detach().double().t()
                size = len(w) // groups
                if size:
                    found.append({"name": name, **_compared(w[: size * groups].reshape(groups, size, -1))})
    if not found:
        raise RequestError(
            f"groups={groups} of {axis}", expected="2, up to the size of a matrix of this model", do="ask for fewer"
        )
    return {"parameters": found, "groups": groups, "axis": axis}


def _compared(pieces: Tensor) -> dict[str, Any]:
    values = torch.linalg.svdvals(pieces).square()  # [groups, eigenvalues]
    traces = values.sum(1)
    mean = values.mean(0)
    kept = mean > mean.max() * 1e-12
    spread = (values.std(0)[kept] / mean[kept]).mean() if bool(kept.any()) else torch.tensor(0.0)
    return {
        "traces": traces.tolist(),
        "trace_spread": float(traces.std() / traces.mean().clamp(min=1e-300)),
        "eigenvalue_spread": float(spread),
    }
