"""Which kind of component moved most: queries, norms, biases, ... over all layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from neurograft.audits._changes import as_change
from neurograft.core.card import method
from neurograft.core.context import Batch
from neurograft.core.errors import one_of
from neurograft.core.units import Parameters

NORMS = ("mean_abs", "relative")


@method(
    paper="layernorm-key",
    claims={"empty_is_zero"},
    departs="The paper's own normalisation was not read; mean |d| is the one that gives its ranking at small scale.",
)
def component_change(
    model: nn.Module, change: object, batches: Sequence[Batch] = (), *, norm: str = "mean_abs"
) -> dict[str, Any]:
    """Measure the change of each component, a parameter's name with the numbers of layers left out.

    The normalisation decides the answer: "mean_abs", sum |d| / number of entries, puts an encoder's output norms
    among the first; "relative", ||d|| / ||theta||, among the last, since a norm's weights are near 1.

    Args:
        model: the base.
        change: a graft, grafts, or a tuned model.
        batches: not read.
        norm: what the components are ranked by.

    Returns:
        `components`: name, entries, mean_abs, relative, the largest first; `norm`.
    """
    one_of(norm, NORMS, what="norm")
    made = as_change(model, change)
    sums: dict[str, list[float]] = {}
    for name, weight in Parameters.of(model).by_name.items():
        mine = sums.setdefault(re.sub(r"\.\d+(?=\.)", ".*", name), [0.0, 0.0, 0.0, 0.0])
        touched = made.weights.get(name)
        delta = None if touched is None else touched.delta.double()
        moved = (0.0, 0.0) if delta is None else (float(delta.abs().sum()), float(delta.square().sum()))
        for i, more in enumerate((weight.numel(), *moved, float(weight.detach().double().square().sum()))):
            mine[i] += more
    found = [
        {"name": n, "entries": int(size), "mean_abs": d / size, "relative": (sq / max(base, 1e-300)) ** 0.5}
        for n, (size, d, sq, base) in sums.items()
    ]
    found.sort(key=lambda c: -float(c[norm]))
    return {"components": found, "norm": norm}
