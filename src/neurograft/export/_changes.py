"""What a graft does to each parameter of its base, for writers of other formats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from neurograft.core.errors import RequestError
from neurograft.core.grafts.combined import Change, combined
from neurograft.core.grafts.coordinates import Coordinates, coordinates, holders
from neurograft.core.grafts.delta import New
from neurograft.core.grafts.graft import Graft
from neurograft.core.grafts.stack import Stack
from neurograft.core.region import Region
from neurograft.core.resolve import resolve
from neurograft.core.units import Parameters


@dataclass(frozen=True)
class Touched:
    """One parameter under a graft.

    Args:
        name: module name of the parameter.
        weight: the parameter.
        owner: the module that holds it.
        members: its changes, disjoint, with the graft's strength.
        stack: what lies on the model, to see the base below it.
        new: whether the base's checkpoint lacks it.
    """

    name: str
    weight: Tensor
    owner: nn.Module
    members: list[tuple[Change, float]]
    stack: Stack
    new: bool

    @property
    def leaf(self) -> str:
        """The parameter's name in its module."""
        return self.name.rpartition(".")[2]

    @property
    def module(self) -> str:
        """The module's name."""
        return self.name.rpartition(".")[0]

    def before(self, region: Region) -> Tensor:
        """Return the base's numbers."""
        return self.stack.original(self.name, self.weight, region)

    def after(self, change: Change, s: float) -> Tensor:
        """Return the numbers the graft makes of a change's region, float32 (64)."""
        return combined(change.region, self.before(change.region), [(change, s)])

    def difference(self, change: Change, s: float) -> Tensor:
        """Return what a change adds to its region, float32 (64)."""
        now = self.after(change, s)
        return now - self.before(change.region).to(now.dtype)

    def mismatches(self, change: Change, s: float) -> int:
        """Return how many numbers base + difference rounds elsewhere than the graft does."""
        before, added = self.before(change.region), self.difference(change, s)
        now = self.after(change, s).to(before.dtype)
        return int(((before.to(added.dtype) + added).to(before.dtype) != now).sum())


def base_model(graft: Graft, model: nn.Module | None) -> nn.Module:
    """Return the given model, or the base that the graft's card names.

    Raises:
        RequestError: no model is given and the card names none that can be loaded.
    """
    if model is not None:
        return model
    origin: dict[str, Any] = dict(graft.card.get("base", {}))
    if not origin.get("name") or not origin.get("class"):
        raise RequestError(
            "an export without the base model, whose name the graft does not know",
            expected="the base",
            do="pass model=, the base the graft was made on",
        )
    dtype = getattr(torch, origin.get("dtype") or "float32")
    loader = resolve(f"transformers.{origin['class']}")
    try:
        loaded: nn.Module = loader.from_pretrained(
            origin["name"], revision=origin.get("revision"), dtype=dtype, use_safetensors=True
        )
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise RequestError(
            f"the base {origin['name']!r} (revision {origin.get('revision') or 'main'}), which cannot be loaded",
            expected="the model the graft was made on, in safetensors files; pickled weights are never read",
            do="pass model=, the base loaded from where it lies now",
        ) from error
    return loaded


def touched(graft: Graft, model: nn.Module) -> Iterator[Touched]:
    """Yield every parameter a graft changes, verified against the base, in the model's order.

    Raises:
        RequestError: the model is not the graft's base, or the graft is no plain change of weights.
    """
    if graft.operations:
        raise RequestError(
            f"the export of a graft with {graft.operations[0].describe()}",
            expected="changes of weights only",
            do="fold the operation into weights first, or export to='merged' where that is possible",
        )
    stack, where, weights = Stack.of(model), coordinates(model), holders(model)
    longer = [n for n, d in graft.deltas.items() if isinstance(d, New) and d.after is not None]
    if longer:
        raise RequestError(
            f"the export of a graft that appends rows to {longer[0]}",
            expected="changes of parameters the base has",
            do="export to='merged'",
        )
    fresh = _fresh(graft, where)
    found = stack.translated(model, graft, where, weights)
    for name in weights:
        if name in found:
            owner = model.get_submodule(name.rpartition(".")[0])
            members = [(change, graft.strength) for change in found[name]]
            yield Touched(name, weights[name], owner, members, stack, name in fresh)


def _fresh(graft: Graft, where: Coordinates) -> set[str]:
    names: set[str] = set()
    for tensor, delta in graft.deltas.items():
        if isinstance(delta, New):
            names |= {piece.name for piece in where.to_module(tensor, delta.on().region)}
    return names


def tied_names(model: nn.Module, name: str) -> list[str]:
    """Return the other names of a parameter."""
    return Parameters.of(model).tied(name)


def place(folder: Path) -> Path:
    """Make an empty folder to export into.

    Raises:
        RequestError: it exists and holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RequestError(
            f"the folder {folder}, which holds something",
            expected="a new or empty folder",
            do="choose another folder, or remove this one first",
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def base_name(graft: Graft, model: nn.Module, base: str | None) -> tuple[str, str | None]:
    """Return the base's id or path and revision, for the files of other libraries."""
    origin = graft.card.get("base", {})
    name = base or getattr(getattr(model, "config", None), "name_or_path", None) or origin.get("name") or ""
    return str(name), None if base else origin.get("revision")
