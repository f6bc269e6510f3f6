"""How far what the layers pass on has moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.audits._changes import Null, as_change, evaluating
from neurograft.audits._layers import blocks
from neurograft.audits._measures import as_measure, floor
from neurograft.audits._paired import Switch
from neurograft.audits._statistics import estimate
from neurograft.core.card import method
from neurograft.core.context import Batch, token_mask
from neurograft.core.errors import RequestError, RunError
from neurograft.core.numerics.linalg import linear_cka
from neurograft.core.prompts.examples import size
from neurograft.core.taps.look import look

BATCHES = 16
WHOLE = ""  # the name of the model itself, for one without layers


@method(needs={"batches"}, claims={"empty_is_zero", "noise_floor"})
def representation_drift(
    model: nn.Module,
    change: object,
    batches: Sequence[Batch],
    *,
    tokens: int = 256,
    nulls: int = 4,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare the output of every layer (of the model, if it has none) under base and change on the same tokens.

    With X, Y the outputs at m tokens, float64 [m, d], columns centred:
    CKA = ||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F), reported as 1 - CKA; and the mean over tokens of
    1 - cosine(x, y) and of ||x - y|| / ||x||, not centred. CKA overlooks rotations and one common scale, the
    cosine does not. With fewer tokens than features CKA is biased towards 1; read it against its noise floor.

    Args:
        model: the base.
        change: a graft, grafts, or a tuned model with layers of the same names.
        batches: data.
        tokens: at most about so many tokens are compared, evenly spread over at most 16 batches.
        nulls: how many random changes of the same size the noise floor is measured with.
        level: of the intervals, from a bootstrap over items, whose tokens are no independent observations.
        draws: of the bootstrap.
        seed: of bootstrap and nulls.

    Returns:
        `layers`: name, `cka_drift`, `cosine_drift`, `shift` with intervals (the cosine and shift), `noise_floor`,
        tokens, items and width; `measures`: "cka_drift" and "cosine_drift", the layer where each is largest.
    """
    made, names = as_change(model, change), blocks(model) or [WHOLE]
    if not batches:
        raise RequestError("no batches", expected="at least one", do="give data with at least one row")
    step = max(1, len(batches) // BATCHES)
    used = list(batches[::step][:BATCHES])
    switches: dict[str, Switch] = {"change": made}
    if made.weights and not made.empty:
        switches |= {f"null/{i}": Null(made, seed * 1000 + i) for i in range(nulls)}
    with evaluating(model, made.tuned):
        base, items = outputs(model, names, used, tokens)
        again = {"rerun": compare(base, outputs(model, names, used, tokens)[0])}
        for name, switch in switches.items():
            with switch.on() as changed:
                again[name] = compare(base, outputs(changed, names, used, tokens)[0])
    layers = []
    for layer in names:
        found = again["change"][layer]
        entry: dict[str, Any] = {"name": layer, "tokens": len(found["cosine"]), "width": base[layer].shape[1]}
        entry["items"] = int(items[layer].unique().numel())
        entry["cka_drift"] = {"value": found["cka"], "low": None, "high": None}
        entry["noise_floor"] = {"cka_drift": floor({k: v[layer]["cka"] for k, v in again.items()})}
        for key, name in (("cosine", "cosine_drift"), ("shift", "shift")):
            entry[name] = estimate(
                _by_item(found[key], items[layer]), level=level, draws=draws, seed=seed, name=f"{layer}/{key}"
            )
            entry["noise_floor"][name] = floor({k: float(v[layer][key].mean()) for k, v in again.items()})
        layers.append(entry)
    return {"measures": {k: _headline(layers, k) for k in ("cka_drift", "cosine_drift")}, "layers": layers}


def _headline(layers: list[dict[str, Any]], key: str) -> dict[str, Any]:
    most = max(layers, key=lambda layer: layer[key]["value"])
    unit = "1 - CKA" if key == "cka_drift" else "1 - cosine"
    return as_measure(most[key], unit=unit, better="zero", noise_floor=most["noise_floor"][key], layer=most["name"])


def _by_item(values: Tensor, items: Tensor) -> Tensor:
    """Return the sum of values and their number for each item that has some, float64 [items, 2]."""
    _, place = items.unique(return_inverse=True)
    table = torch.zeros(int(place.max()) + 1, 2, dtype=torch.float64)
    return table.index_add_(0, place, torch.stack([values.double(), torch.ones_like(values.double())], 1))


def outputs(
    model: nn.Module, names: Sequence[str], batches: Sequence[Batch], tokens: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what passes out of each named module at some tokens, float32 [m, d] on the CPU, and each token's item.

    Raises:
        RunError: a module never fired.
    """
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    items: dict[str, list[Tensor]] = {name: [] for name in names}
    each, first = -(-tokens // len(batches)), 0
    batch: Batch = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            x = output if isinstance(output, Tensor) else getattr(output, "logits", None)
            x = output[0] if x is None else x
            rows, which = _picked(x.detach(), batch, each)
            kept[name].append(rows)
            items[name].append(which + first)

        return keep

    modules = dict(model.named_modules())
    missing = [n for n in names if n not in modules]
    if missing:
        raise RequestError(
            f"a tuned model without the layer {missing[0]!r}",
            expected="the base's layers",
            do="give a model of the same architecture",
        )
    handles = [modules[name].register_forward_hook(hook(name)) for name in names]
    try:
        for batch in batches:
            look(model, batch, hooked=names)
            first += size(batch)
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name, found in kept.items() if not found]
    if silent:
        raise RunError(f"no output passed the layer {silent[0]!r}; it cannot be compared")
    return {name: torch.cat(found) for name, found in kept.items()}, {name: torch.cat(i) for name, i in items.items()}


def _picked(x: Tensor, batch: Batch, count: int) -> tuple[Tensor, Tensor]:
    """Return at most `count` evenly spaced rows of an output [..., d] or map [B, C, H, W], padding left out, and which
    row of the batch each is of."""
    if x.dim() == 4:
        x = x.movedim(1, -1)
    flat = x.reshape(-1, x.shape[-1])
    which = torch.arange(len(flat)) * size(batch) // max(1, len(flat))  # also where a module joins rows and tokens
    mask = token_mask(batch)
    if mask is not None and tuple(mask.shape) == tuple(x.shape[:-1]):
        flat, which = flat[mask.reshape(-1).to(flat.device)], which[mask.reshape(-1).cpu()]
    where = torch.linspace(0, len(flat) - 1, min(count, len(flat)), device=flat.device).round().long()
    return flat[where].float().cpu(), which[where.cpu()]


def compare(base: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Return 1 - CKA, and for every token 1 - cosine and the relative shift, by layer."""
    found = {}
    for name, x in base.items():
        x, y = x.double(), new[name].double()
        norms = (x.square().sum(1), y.square().sum(1))
        cosine = (x * y).sum(1) / (norms[0] * norms[1]).sqrt().clamp(min=1e-30)
        shift = (x - y).norm(dim=1) / norms[0].sqrt().clamp(min=1e-30)
        found[name] = {"cka": 1 - linear_cka(x, y), "cosine": 1 - cosine, "shift": shift}
    return found
