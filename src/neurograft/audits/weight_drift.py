"""Which weights moved, by how much, in how many directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.audits._changes import Touched, as_change
from neurograft.audits._layers import blocks, by_layer, layer_of
from neurograft.audits._measures import as_measure, numbers
from neurograft.core.card import method
from neurograft.core.context import Batch
from neurograft.core.units import Parameters

TOP, BINS = 8, 96
EXACT = 1024  # a full spectrum up to this smaller side; above it the largest values by random projection


@method(claims={"empty_is_zero", "noise_floor"})
def weight_drift(model: nn.Module, change: object, batches: Sequence[Batch] = ()) -> dict[str, Any]:
    """Measure the change of every touched parameter and layer; no data is needed.

    Args:
        model: the base.
        change: a graft, grafts, or a tuned model.
        batches: not read.

    Returns:
        `parameters`: for each, the entries touched, norm of the change, norm relative to the touched numbers and to
        the whole parameter, `spectrum` (largest singular values; stable rank ||D||_F^2 / s_1^2; effective rank
        exp(H(s / sum s)), None where only the largest values were computed), `units` (norm of the change along rows
        or columns, in at most 96 bins); `layers`: the same norms by layer; `new`; `operations`; `measures`:
        "relative_norm", exact, so that its noise floor is 0.
    """
    made, layers = as_change(model, change), blocks(model)
    weights = {n: p.detach() for n, p in Parameters.of(model).by_name.items()}
    parameters = [_parameter(n, t, weights[n], layer_of(n, layers)) for n, t in made.weights.items()]
    order = {layer: i for i, layer in enumerate(layers)}
    parameters.sort(key=lambda p: (order.get(p["layer"], len(order)), p["name"]))
    found = [
        _layer(layer, [p for p in parameters if p["name"] in names])
        for layer, names in by_layer(made.weights, layers).items()
    ]
    relative = _norm([p["norm"] for p in parameters]) / max(_norm([p["norm_base"] for p in parameters]), 1e-30)
    return {
        "measures": {
            "relative_norm": as_measure(
                {"value": relative, "low": relative, "high": relative},
                unit="norm of the change / norm of the touched parameters",
                better="zero",
                noise_floor={"value": 0.0, "kind": "stored numbers are compared exactly"},
            )
        },
        "entries": sum(p["entries"] for p in parameters),
        "total": sum(w.numel() for w in weights.values()),
        "layers": found,
        "layer_names": layers,
        "parameters": parameters,
        "new": list(made.new),
        "operations": list(made.operations),
    }


def _parameter(name: str, touched: Touched, weight: Tensor, layer: str) -> dict[str, Any]:
    delta = touched.delta
    norm, before, whole = (float(x.double().norm()) for x in (delta, touched.before, weight))
    return {
        "name": name,
        "layer": layer,
        "shape": list(weight.shape),
        "layout": touched.region.layout,
        "entries": touched.region.numel,
        "moved": int((delta != 0).sum()),
        "norm": norm,
        "norm_base": whole,
        "relative": norm / max(whole, 1e-30),
        "relative_touched": norm / max(before, 1e-30),
        "spectrum": spectrum(_thin(touched)) if weight.dim() > 1 else None,
        "units": _units(touched),
    }


def _layer(name: str, parameters: list[dict[str, Any]]) -> dict[str, Any]:
    norm, base = _norm([p["norm"] for p in parameters]), _norm([p["norm_base"] for p in parameters])
    entries = sum(p["entries"] for p in parameters)
    return {"name": name, "entries": entries, "norm": norm, "relative": norm / max(base, 1e-30)}


def _norm(norms: list[float]) -> float:
    return math.sqrt(sum(n * n for n in norms))


def _thin(touched: Touched) -> Tensor:
    """Return a matrix with the singular values of the change: its rows or columns, or all of it."""
    region, delta = touched.region, touched.delta
    bank, rows, columns = region.matrix
    if region.layout in ("rows", "cols") and bank == 1:
        return delta
    if region.layout == "all":
        return delta.reshape(bank * rows, columns)
    flat = torch.zeros(bank * rows * columns, dtype=delta.dtype)
    flat[region.flat().cpu()] = delta.reshape(-1)
    return flat.view(bank * rows, columns)


def spectrum(delta: Tensor) -> dict[str, Any]:
    """Return the largest singular values, the stable and the effective rank of a matrix.

    Example:
        >>> s = spectrum(torch.eye(4))
        >>> round(s["stable_rank"], 6), round(s["effective_rank"], 6)
        (4.0, 4.0)
    """
    square = float(delta.double().square().sum())
    if square == 0.0:
        return {"top": [], "stable_rank": 0.0, "effective_rank": 0.0}
    if min(delta.shape) <= EXACT:
        small = delta if delta.shape[0] <= delta.shape[1] else delta.t()
        values = torch.linalg.eigvalsh(small.double() @ small.double().t()).clamp(min=0).sqrt().flip(0)
        share = values / values.sum()
        effective = float(torch.exp(-(share * share.clamp(min=1e-300).log()).sum()))
    else:
        values, effective = _largest(delta), None
    return {
        "top": numbers(values[:TOP]),
        "stable_rank": square / float(values[0]) ** 2,
        "effective_rank": effective,
    }


def _largest(delta: Tensor) -> Tensor:
    """Return about the `TOP` largest singular values, by subspace iteration from fixed random directions."""
    rng = torch.Generator().manual_seed(0)
    found = torch.randn(delta.shape[1], 2 * TOP, generator=rng, dtype=delta.dtype)
    for _ in range(4):
        found = torch.linalg.qr(delta.t() @ (delta @ found)).Q
    return torch.linalg.svdvals(delta @ found)


def _units(touched: Touched) -> dict[str, Any]:
    """Return the norm of the change along rows or columns, in bins, and how many units are touched in each."""
    region, square = touched.region, touched.delta.double().square()
    bank, rows, columns = region.matrix
    axis, total = ("column", bank * columns) if region.layout == "cols" else ("row", bank * rows)
    if bank * rows == 1:
        axis, total = "entry", columns
    if region.layout in ("rows", "cols"):
        ids, sums = region.ids.cpu(), square.sum(1)
    else:
        ids, sums = region.flat().cpu(), square.reshape(-1)
        ids = ids if axis == "entry" else ids // columns
    if axis == "entry" and region.layout == "rows":
        ids, sums = region.flat().cpu(), square.reshape(-1)
    bins = min(BINS, total)
    by_unit = torch.zeros(total, dtype=torch.float64).index_add_(0, ids, sums)
    touched_units = torch.zeros(total, dtype=torch.float64)
    touched_units[ids] = 1
    where = torch.arange(total) * bins // total
    norms = torch.zeros(bins, dtype=torch.float64).index_add_(0, where, by_unit).sqrt()
    counts = torch.zeros(bins, dtype=torch.float64).index_add_(0, where, touched_units)
    return {
        "axis": axis,
        "total": total,
        "touched": int(touched_units.sum()),
        "norms": numbers(norms),
        "counts": [int(c) for c in counts],
    }
