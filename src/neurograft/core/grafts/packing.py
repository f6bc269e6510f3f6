"""A graft as plain data and named tensors, and back: what its two files hold."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from neurograft.core.errors import RequestError
from neurograft.core.grafts.codes import narrow_ids, shortest, unpacked_bits, wide_ids
from neurograft.core.grafts.contents import Contents
from neurograft.core.grafts.delta import Delta, LowRank, New, Shut, Slice
from neurograft.core.grafts.replay import Log, Replay
from neurograft.core.region import Region
from neurograft.core.resolve import resolve

FORMAT = 1


def packed(graft: Contents) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a graft's tensors, named "tensor::what", "log.i::what" and "operation.i::what", and its plain data."""
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    logs: list[Log] = []
    for name, delta in graft.deltas.items():
        entry, held = _entry(delta, logs)
        entries[name] = {"shape": list(delta.shape), "kind": type(delta).__name__.lower(), **entry}
        tensors |= {f"{name}::{key}": tensor for key, tensor in held.items()}
    for i, log in enumerate(logs):
        tensors |= {f"log.{i}::{key}": getattr(log, key) for key in Log.NAMES}
    for i, operation in enumerate(graft.operations):
        tensors |= {f"operation.{i}::{key}": tensor for key, tensor in operation.tensors().items()}
    text = {
        "format": FORMAT,
        "identity": graft.identity,
        "strength": graft.strength,
        "tensors": entries,
        "base": dict(graft.base),
        "operations": [o.meta() for o in graft.operations],
        "card": dict(graft.card),
    }
    if logs:
        text["logs"] = [{"grain": log.grain, "made": log.made} for log in logs]
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, text


def unpacked(text: dict[str, Any], tensors: dict[str, Tensor]) -> Contents:
    """Read what `packed` wrote.

    Raises:
        RequestError: an operation whose package is not imported, or that is none.
        KeyError: something is missing or of another shape; so do TypeError, ValueError and their like say.
    """
    logs = [_log(i, made, tensors) for i, made in enumerate(text.get("logs", ()))]
    deltas = {name: _delta(name, entry, tensors, logs) for name, entry in text["tensors"].items()}
    operations = tuple(_operation(i, meta, tensors) for i, meta in enumerate(text["operations"]))
    base, card, strength = text["base"], text["card"], text["strength"]
    if not (isinstance(base, dict) and isinstance(card, dict) and math.isfinite(strength)):
        raise KeyError("a base, a card and a finite strength")
    return Contents(deltas, operations, base, card, strength)


def _entry(delta: Delta, logs: list[Log]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a file says of one change, and its tensors; the log of a replay joins the others."""
    if isinstance(delta, LowRank):
        return {"scale": delta.scale, "transposed": delta.transposed}, {"lora_A": delta.A, "lora_B": delta.B}
    if isinstance(delta, New):
        return {"after": delta.after}, {"added": delta.values}
    region = delta.region
    if isinstance(delta, Shut):
        return {"matrix": list(region.matrix)}, dict([shortest(region)])
    entry = {"layout": region.layout, "matrix": list(region.matrix), "block": region.block}
    where: dict[str, Tensor] = {}
    if region.layout != "all":
        where[region.layout] = narrow_ids(region.ids, gaps=region.layout == "flat")
    if isinstance(delta, Replay):
        return entry | _logged(delta, logs), where
    return entry, where | {"value": delta.values}


def _logged(delta: Replay, logs: list[Log]) -> dict[str, Any]:
    """Return what a file says of a replayed change; its log joins those of the others if it is not among them."""
    if not any(log is delta.log for log in logs):
        logs.append(delta.log)
    number = next(i for i, log in enumerate(logs) if log is delta.log)
    held = str(delta.held).removeprefix("torch.")
    return {"log": number, "track": delta.track, "stream": delta.stream, "held": held, "result": delta.result}


def _log(i: int, made: dict[str, Any], tensors: dict[str, Tensor]) -> Log:
    seeds, pulls, rates, keeps = (tensors[f"log.{i}::{key}"] for key in Log.NAMES)
    return Log(seeds, pulls, rates, keeps, made["grain"], made["made"])


def _delta(name: str, entry: dict[str, Any], tensors: dict[str, Tensor], logs: list[Log]) -> Delta:
    shape = tuple(entry["shape"])
    if entry["kind"] == "lowrank":
        A, B = tensors[f"{name}::lora_A"], tensors[f"{name}::lora_B"]
        (rank, into), (out, same) = A.shape, B.shape
        if rank != same or math.prod(shape) != out * into:
            raise KeyError(f"factors of a tensor of shape {shape} for {name}")
        return LowRank(shape, A, B, entry["scale"], entry["transposed"])
    if entry["kind"] == "new":
        after = entry["after"]
        if after is not None and not (isinstance(after, int) and after >= 0):
            raise KeyError(f"how many rows the base has for {name}")
        return New(tensors[f"{name}::added"], after)
    if entry["kind"] == "shut":
        return _shut(name, shape, _matrix(name, shape, entry), tensors)
    if entry["kind"] not in ("slice", "replay"):
        raise KeyError(f"a kind of change that is known here for {name}")
    layout = entry["layout"]
    ids: Iterable[int] | Tensor = ()
    if layout != "all":
        ids = wide_ids(tensors[f"{name}::{layout}"], gaps=layout == "flat")
    block = tuple(entry["block"]) if entry["block"] else None
    matrix = _matrix(name, shape, entry)
    if block and (matrix[0] != 1 or min(block) < 1 or matrix[1] % block[0] or matrix[2] % block[1]):
        raise KeyError(f"blocks that fill a tensor of shape {shape} for {name}")
    region = Region.of(shape, layout, ids, matrix=matrix, block=block)
    if entry["kind"] == "replay":
        held = getattr(torch, entry["held"])
        if not isinstance(held, torch.dtype):
            raise KeyError(f"a dtype for {name}")
        return Replay(region, entry["stream"], held, logs[entry["log"]], entry["track"], entry["result"])
    values = tensors[f"{name}::value"]
    if tuple(values.shape) != region.values_shape:
        raise KeyError(f"values of shape {region.values_shape} for {name}")
    return Slice(region, values)


def _matrix(name: str, shape: tuple[int, ...], entry: dict[str, Any]) -> tuple[int, int, int]:
    """Return how a tensor is read as matrices; what is read and written by it must be the whole tensor."""
    bank, rows, columns = entry["matrix"]
    if min(bank, rows, columns) < 0 or bank * rows * columns != math.prod(shape):
        raise KeyError(f"matrices that make up a tensor of shape {shape} for {name}")
    return bank, rows, columns


def _shut(name: str, shape: tuple[int, ...], matrix: tuple[int, int, int], tensors: dict[str, Tensor]) -> Shut:
    bits = tensors.get(f"{name}::bits")
    if bits is None:
        return Shut(Region.of(shape, "flat", wide_ids(tensors[f"{name}::flat"], gaps=True), matrix=matrix))
    if len(bits) != -(-math.prod(shape) // 8):
        raise KeyError(f"a bit for each of the {math.prod(shape)} entries of {name}")
    return Shut(Region.of(shape, "flat", unpacked_bits(bits).nonzero().reshape(-1), matrix=matrix))


def _operation(i: int, meta: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """Read an operation. A file may name classes of this library, or of a package that is imported already."""
    module = str(meta["type"]).rpartition(".")[0]
    if not module.startswith("neurograft.") and module not in sys.modules:
        raise RequestError(
            f"a graft with an operation of {module!r}, which is not imported",
            expected="operations of neurograft, or of packages you use",
            do=f"import {module.partition('.')[0]} first, if you trust it",
        )
    kind = resolve(meta["type"])
    made: Any = kind if inspect.isclass(kind) else None
    if not all(hasattr(made, word) for word in ("from_parts", "mount", "fold")):
        raise RequestError(
            f"a graft with {meta['type']!r}, which is no operation",
            expected="the class of an operation",
            do="upgrade neurograft, or ask whoever made the graft",
        )
    prefix = f"operation.{i}::"
    return made.from_parts(meta, {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
