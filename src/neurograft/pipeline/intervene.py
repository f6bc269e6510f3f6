"""`intervene`: change the activations of chosen units for the length of a block, or for good as a graft."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.errors import RequestError, RunError, one_of
from neurograft.core.grafts.graft import Graft
from neurograft.core.intervene import KINDS, Intervention, Places, interventions
from neurograft.core.selection import Selection
from neurograft.core.taps.board import Board
from neurograft.core.taps.capture import capture
from neurograft.core.taps.folding import as_deltas
from neurograft.core.taps.stream import means
from neurograft.core.units import Site
from neurograft.pipeline._follow import Follow, fired
from neurograft.pipeline.attach import Where, selection_of
from neurograft.pipeline.inputs import as_batches, is_batch
from neurograft.pipeline.state import as_found

Value = float | Tensor | Sequence[float] | Mapping[str, Tensor] | None


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
    _check_given(kind, factor, value, source, data)
    sites = {n: chosen.sites[n] for n, ids in chosen.ids.items() if len(ids)}
    ids = {n: chosen.ids[n] for n in sites}
    places: Places = positions if isinstance(positions, str) or callable(positions) else tuple(positions)
    how = {"positions": places, "rows": None if rows is None else tuple(rows)}
    if kind == "replace" and isinstance(source, nn.Module) and data is None:
        return Intervened(model, chosen, kind, (), Follow(source, sites, ids, how))
    values = None
    if kind == "replace":
        found = _sources(model, sites, source, data, processing_class, batch_size, max_length)
        values = {n: v.index_select(v.dim() - (1 if _width(sites[n]) == 1 else 2), ids[n]) for n, v in found.items()}
    elif kind != "zero":
        values = _values(sites, factor if kind == "scale" else value)
    return Intervened(model, chosen, kind, interventions(sites, ids, kind, values, **how))


class Intervened:
    """An intervention that is on inside of its `with` block.

    Args:
        model: the model.
        where: the units.
        kind: what is done to them.
        operations: one for each site.
        follow: instead of them, another model to follow, which no graft can hold.
    """

    def __init__(
        self,
        model: nn.Module,
        where: Selection,
        kind: str,
        operations: tuple[Intervention, ...],
        follow: Follow | None = None,
    ) -> None:
        self.model, self.where, self.kind, self.operations, self.follow = model, where, kind, operations, follow
        self.mounted: list[Any] = []

    def __enter__(self) -> Intervened:
        if self.mounted:
            raise RequestError("a second `with` on one intervention", expected="one at a time", do="make another one")
        try:
            for operation in self.operations:
                self.mounted.append(operation.mount(self.model))
            if self.follow is not None:
                self.mounted += self.follow.mount(self.model)
        except Exception:
            self._remove()
            raise
        self.before = Board.of(self.model).now.number
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        passes = Board.of(self.model).now.number - self.before
        silent = [m for m in self.mounted if not fired(m)]
        self._remove()
        if kind is None and silent and passes:
            raise RunError(
                f"the intervention at {next(iter(silent[0].guest.sites))} never fired in {passes} forward passes: "
                "a compiled or fused kernel bypasses the module"
            )

    def _remove(self) -> None:
        for mounted in reversed(self.mounted):
            mounted.remove()
        self.mounted = []

    def graft(self) -> Graft:
        """Return the intervention as a graft of operations, which changes no weight.

        Raises:
            RequestError: it follows another model live, or its positions are a callable.
        """
        self._check_savable()
        return Graft.made(self.model, {}, operations=self.operations, card=self._card("operations"))

    def fold(self) -> Graft:
        """Return the intervention as a graft of weight changes, where that is exact.

        Raises:
            RequestError: it is not, with the reason.
        """
        self._check_savable()
        found = as_deltas(self.model, self.operations)
        return Graft.made(self.model, found, card=self._card("weights"))

    def _check_savable(self) -> None:
        if self.follow is not None:
            raise RequestError(
                "an intervention that follows another model, as a graft",
                expected="values that are known beforehand",
                do="give data, to replace by the other model's mean",
            )
        for operation in self.operations:
            operation.meta()

    def _card(self, how: str) -> dict[str, Any]:
        return {
            "intervention": {
                "kind": self.kind,
                "as": how,
                "where": self.where.digest,
                "units": {n: len(ids) for n, ids in self.where.ids.items() if len(ids)},
                "located": dict(self.where.card).get("located"),
            }
        }


def _width(site: Site) -> int:
    return site.tap.width if site.tap is not None else 1


def _check_given(kind: str, factor: Value, value: Value, source: Any, data: Any) -> None:
    needs: dict[str, set[str]] = {"zero": set(), "scale": {"factor"}, "replace": {"source", "data"}}
    given = {n for n, v in (("factor", factor), ("value", value), ("source", source), ("data", data)) if v is not None}
    allowed: set[str] = needs.get(kind, {"value"})
    if given - allowed or (allowed and not given):
        call = f"ng.intervene(model, where, {kind!r}, {sorted(allowed)[0]}=...)" if allowed else f"{kind!r} alone"
        raise RequestError(
            f"{kind!r} with {', '.join(sorted(given)) or 'nothing'}",
            expected=" or ".join(sorted(allowed)) or "no value",
            do=call,
        )


def _values(sites: Mapping[str, Site], value: Value) -> dict[str, Tensor]:
    if isinstance(value, Mapping):
        missing = [n for n in sites if n not in value]
        if missing:
            raise RequestError(f"no value for {missing[0]!r}", expected="one for each chosen site", do="add it")
        return {n: torch.as_tensor(value[n], dtype=torch.float32) for n in sites}
    made = torch.as_tensor(value, dtype=torch.float32)
    if made.dim() and len(sites) > 1:
        raise RequestError(
            f"one value of shape {tuple(made.shape)} for {len(sites)} sites",
            expected="a number, or site name -> values",
            do=f"give {{{next(iter(sites))!r}: ...}}",
        )
    return dict.fromkeys(sites, made)


def _sources(
    model: nn.Module,
    sites: Mapping[str, Site],
    source: Any,
    data: Any,
    processing_class: Any,
    batch_size: int,
    max_length: int,
) -> dict[str, Tensor]:
    """Return replacements: means over data, or the activations of another prompt."""
    if data is None:
        if not isinstance(source, Mapping) or not is_batch(dict(source)):
            raise RequestError(
                f"a source of type {type(source).__name__}",
                expected="a batch of model inputs, or another model",
                do="encode the other prompt first: source=tokenizer(text, return_tensors='pt')",
            )
        with as_found(model):
            return capture(model, sites, dict(source))
    other = source if isinstance(source, nn.Module) else model
    batches = as_batches(data, other, processing_class=processing_class, batch_size=batch_size, max_length=max_length)
    with as_found(other):
        return means(other, sites, batches)
