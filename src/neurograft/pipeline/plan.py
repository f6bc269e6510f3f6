"""`plan`: what a recipe would touch and cost, before anything is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neurograft.anatomy.sites import sites
from neurograft.core.choose import choose
from neurograft.core.compact.gradients import Side, route
from neurograft.core.compact.mount import regions_of
from neurograft.core.context import Context
from neurograft.core.errors import RequestError
from neurograft.core.linears import transposed
from neurograft.core.region import Region
from neurograft.core.selection import Scores, Selection
from neurograft.core.units import Site
from neurograft.pipeline._network import network
from neurograft.pipeline.models import Model, load_model
from neurograft.pipeline.recipe import Recipe
from neurograft.pipeline.recipe_file import Trust, opened
from neurograft.pipeline.select import select

OWNED = ("dense", "slice")  # adapters that train the numbers which units own
VALUE = 4  # bytes of a trained value, its gradient and each moment: all float32


def plan(
    model: Model,
    recipe: Recipe | str | Path | Selection,
    *,
    changes: Mapping[str, Any] | None = None,
    trust: Trust = (),
    tied: str = "refuse",
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
) -> dict[str, Any]:
    """Say what a recipe, or a selection, would make trainable, by which gradient route, at what cost in bytes.

    Which units a locator would pick depends on data; how many and of what shape does not, so random scores stand
    in for it. Nothing is run and nothing is changed.

    Args:
        model: a module, a folder, a Hub id or a shipped model.
        recipe: a recipe, its name, its file, a selection, or the path of a saved one.
        changes: as for `run`.
        trust: as for `run`.
        tied: as for the adapters.
        revision: of a Hub id.
        dtype: load the weights so.

    Returns:
        `steps`, `units` (chosen, of), `parameters` (name, layout, numbers, route; or in words, where an edit writes
        or an adapter makes its own), `trainable`, how many numbers, and `bytes`: values, gradients, two moments,
        originals, ids, and the graft's file, all 0 where no step tunes.

    Raises:
        RequestError: as for `run`.
    """
    if isinstance(recipe, (str, Path)) and Path(recipe).suffix == ".safetensors":
        recipe = Selection.load(recipe)
    if isinstance(recipe, Selection):
        if changes or trust:
            raise RequestError("changes or trust for a selection", expected="a recipe with them", do="leave them out")
        return _planned(load_model(model, revision=revision, dtype=dtype), None, recipe, tied)
    with opened(recipe, changes or {}, trust) as found:
        made = found.recipe
        net = load_model(network(model, made), revision=revision, dtype=dtype)
        return _planned(net, made, _stand_in(net, made), tied)


def _planned(net: nn.Module, made: Recipe | None, where: Selection | None, tied: str) -> dict[str, Any]:
    steps = [] if made is None else [dict(s) for s in made.steps]
    units = None if where is None else {"chosen": len(where), "of": where.total}
    verbs = {s["do"] for s in steps}
    if "tune" not in verbs and verbs & {"edit", "intervene"}:
        words = f"written by {' and '.join(sorted(verbs & {'edit', 'intervene'}))}, without a Trainer"
        return {"steps": steps, "units": units, "parameters": words, "trainable": 0, "bytes": _bytes(0, 0, 4)}
    numbers = _by_adapter(net, steps, where)
    if numbers is not None:
        return {
            "steps": steps,
            "units": units,
            "parameters": "all" if numbers == sum(p.numel() for p in net.parameters()) else "by the adapter's options",
            "trainable": numbers,
            "bytes": _bytes(numbers, 0, 4),
        }
    assert where is not None
    regions = regions_of(net, where, tied=tied)
    rows = [_row(net, name, region) for name, region in regions.items()]
    trainable = sum(r["numbers"] for r in rows)
    width = next(net.get_parameter(n).element_size() for n in regions)
    return {
        "steps": steps,
        "units": units,
        "parameters": rows,
        "trainable": trainable,
        "fraction": trainable / sum(p.numel() for p in net.parameters()),
        "bytes": _bytes(trainable, sum(len(r.ids) for r in regions.values()), width),
    }


def _by_adapter(net: nn.Module, steps: Sequence[Mapping[str, Any]], where: Selection | None) -> int | None:
    """Return how many numbers an adapter trains that makes its own; None where it trains what the units own."""
    adapter = next((s["adapter"] for s in steps if s["do"] == "tune" and "adapter" in s), "dense")
    made = choose("adapters", adapter)
    if where is not None and made.function in (choose("adapters", n).function for n in (*OWNED, "mask")):
        return None
    if made.function in (choose("adapters", n).function for n in OWNED):
        return sum(p.numel() for p in net.parameters())
    with made(net, where) as mount:
        return sum(p.numel() for p in mount.parameters())


def _stand_in(net: nn.Module, recipe: Recipe) -> Selection | None:
    """Return a selection of the size and shape the recipe's own would have, or None for full fine-tuning."""
    scores = where = None
    for step in recipe.steps:
        if step["do"] == "locate":
            found = sites(
                net,
                step.get("units", "neuron"),
                **{k: step[k] for k in ("at", "layers", "match", "block") if k in step},
            )
            scores = _scores(net, found, step.get("by", "noise"), recipe)
        elif step["do"] == "select":
            if scores is None:
                raise RequestError("a recipe that selects before it locates", expected="scores first", do="reorder it")
            given = {k: v for k, v in step.items() if k not in ("do", "as", "scores")}
            if any(isinstance(v, str) and v.startswith("$") for v in given.values()):
                continue  # more of the same, whose number depends on what was taken before
            where = select(scores, **given)
    return where


def _scores(net: nn.Module, found: dict[str, Site], by: Any, recipe: Recipe) -> Scores:
    """Return random scores of the sites a locator would score; a bar on scores needs the locator's own."""
    asked = choose("locators", by)
    options = dict(asked.options)
    inside = choose("locators", options.get("by", "noise")) if asked.name.endswith(".within") else asked
    bars = any(str(s.get("by", "")).count("threshold") for s in recipe.steps if s["do"] == "select")
    if not (bars and not inside.card.needs):
        inside = choose("locators", "noise")
    chosen = choose("locators", asked.function, **{**options, "by": inside}) if "by" in options else inside
    made: Scores = chosen(Context(net, found))
    return replace(
        made, per_example={n: v[None] for n, v in made.values.items()}
    )  # one ballot, where some are asked for


def _row(net: nn.Module, name: str, region: Region) -> dict[str, Any]:
    owner = net.get_submodule(name.rpartition(".")[0])
    side: Side = "row" if transposed(owner) else "column"
    if len(region.shape) != 2 or isinstance(owner, nn.Embedding):
        how = "vector" if len(region.shape) < 2 else type(owner).__name__.lower()
    else:
        how = route(region, side, torch.device("cpu")).name
    return {
        "parameter": name,
        "shape": list(region.shape),
        "layout": region.layout,
        "ids": len(region.ids),
        "numbers": region.numel,
        "route": how,
    }


def _bytes(numbers: int, ids: int, width: int) -> dict[str, int]:
    return {
        "values": numbers * VALUE,
        "gradients": numbers * VALUE,
        "moments": 2 * numbers * VALUE,
        "originals": numbers * width,
        "ids": 8 * ids,
        "file": numbers * VALUE + 4 * ids,
    }
