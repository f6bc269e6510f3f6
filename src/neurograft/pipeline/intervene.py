"""`intervene`: change the activations of chosen units for the length of a block, or for good as a graft."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from neurograft.core.errors import RequestError, one_of
from neurograft.core.intervene import KINDS, Places, interventions
from neurograft.core.units import Site
from neurograft.pipeline._follow import Follow
from neurograft.pipeline._intervened import Intervened
from neurograft.pipeline._replacing import Value, check_given, replacements, values_at
from neurograft.pipeline.attach import Where, selection_of


def intervene(
    model: nn.Module,
    where: Where,
    kind: str,
    *,
    factor: Value = None,
    value: Value = None,
    source: nn.Module | Mapping[str, Any] | None = None,
    data: Any = None,
    positions: str | Sequence[int] | Callable[[dict[str, Any]], Tensor] = "all",
    rows: Sequence[int] | None = None,
    processing_class: Any = None,
    batch_size: int = 8,
    max_length: int = 1024,
) -> Intervened:
    """Change what the chosen units do, exactly undone at the end of the block.

    | kind | needs | new activation |
    |---|---|---|
    | "zero" | | 0 |
    | "scale" | factor | activation * factor |
    | "pin" | value | value |
    | "add" | value | activation + value |
    | "rotate" | value | activation @ value, an orthogonal matrix |
    | "remove" | value | activation - (activation @ value.T) @ value, orthonormal directions [m, w] of wide units |
    | "replace" | data | the units' mean over these examples, in `source` if that is a model |
    | "replace" | source, a batch | what the model does on this other prompt, at the same rows and positions |
    | "replace" | source, a model | what the other model does at the same place on the same input, live |

    Args:
        model: a live model.
        where: a selection of units with activations, or the path of a saved one.
        kind: see above.
        factor: a number, or one for each chosen unit, or site name -> those.
        value: the same; [k, w] for units of several features (heads).
        source: where replacements come from: a batch of inputs, or another model of the same shape.
        data: examples whose mean replaces.
        positions: "all", "last", "answer", "prompt", "generated", numbers of positions (negative ones from the end of
            the first pass), or a callable batch -> bool [B, T].
        rows: elements of the batch, None for all.
        processing_class: tokenizer or processor for raw data.
        batch_size: examples in a batch of `data`.
        max_length: longer texts are cut.

    Returns:
        A context manager; its `graft()` holds the intervention as operations, its `fold()` as weights.

    Raises:
        RequestError: an unknown kind, something missing or too much for it, units without activations.

    Example:
        >>> import neurograft as ng
        >>> from neurograft.anatomy.sites import sites
        >>> from neurograft.worlds.pico import pico, pico_batch
        >>> net = pico("llama")
        >>> where = ng.Selection.of(sites(net, "neuron"), {"model.layers.0.mlp/neuron": [3, 4]})
        >>> with ng.intervene(net, where, "scale", factor=0.0) as live:
        ...     loss = net(**pico_batch(net)).loss
        >>> sorted(live.fold().deltas)
        ['model.layers.0.mlp.down_proj.weight']
    """
    one_of(kind, KINDS, what="kind of intervention")
    chosen = selection_of(where)
    if chosen is None or not len(chosen):
        raise RequestError("an intervention on no unit", expected="a selection", do="select some units")
    check_given(kind, factor, value, source, data)
    sites = {n: chosen.sites[n] for n, ids in chosen.ids.items() if len(ids)}
    ids = {n: chosen.ids[n] for n in sites}
    places: Places = positions if isinstance(positions, str) or callable(positions) else tuple(positions)
    how = {"positions": places, "rows": None if rows is None else tuple(rows)}
    if kind == "replace" and isinstance(source, nn.Module) and data is None:
        return Intervened(model, chosen, kind, (), Follow(source, sites, ids, how))
    values = None
    if kind == "replace":
        found = replacements(model, sites, source, data, processing_class, batch_size, max_length)
        values = {n: v.index_select(_units_axis(v, sites[n]), ids[n]) for n, v in found.items()}
    elif kind != "zero":
        values = values_at(sites, factor if kind == "scale" else value)
    return Intervened(model, chosen, kind, interventions(sites, ids, kind, values, **how))


def _units_axis(values: Tensor, site: Site) -> int:
    """Return which axis of a site's values counts units: the last, or the one before their features."""
    width = site.tap.width if site.tap is not None else 1
    return values.dim() - (1 if width == 1 else 2)
