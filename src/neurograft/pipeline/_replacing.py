"""What `intervene` is given for each site: values, means over data, or the activations of another prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.errors import RequestError
from neurograft.core.taps.capture import capture
from neurograft.core.taps.stream import means
from neurograft.core.units import Site
from neurograft.pipeline.inputs import as_batches, is_batch
from neurograft.pipeline.state import as_found

Value = float | Tensor | Sequence[float] | Mapping[str, Tensor] | None


def check_given(kind: str, factor: Value, value: Value, source: Any, data: Any) -> None:
    """Raise unless a kind of intervention is given what it needs, and nothing else.

    Raises:
        RequestError: something is missing or too much.
    """
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


def values_at(sites: Mapping[str, Site], value: Value) -> dict[str, Tensor]:
    """Return a value for each site, float32: the one given for all, or its own.

    Raises:
        RequestError: a site without one, or one value with a shape for several sites.
    """
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


def replacements(
    model: nn.Module,
    sites: Mapping[str, Site],
    source: Any,
    data: Any,
    processing_class: Any,
    batch_size: int,
    max_length: int,
) -> dict[str, Tensor]:
    """Return what all units of each site are replaced by: means over data, or the activations of another prompt.

    Args:
        model: the model.
        sites: where.
        source: a batch of model inputs; or another model, whose means are taken.
        data: examples to average over; None to take the batch's activations as they are.
        processing_class: for raw data.
        batch_size: examples in a batch.
        max_length: longer texts are cut.

    Raises:
        RequestError: neither data nor a batch.
    """
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
