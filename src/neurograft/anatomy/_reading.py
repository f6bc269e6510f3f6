"""What the builders of sites work from, and the words they share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import nn

from neurograft.anatomy._types import Anatomy, Slot
from neurograft.anatomy.inventory import Inventory
from neurograft.core.units import Part, Site, Tap

# The activations of each kind, the default first; kinds that are missing take a parameter's short name.
AT: Mapping[str, tuple[str, ...]] = {
    "neuron": ("act", "gate", "up"),
    "head": ("out", "kv"),
    "expert": ("", "router"),
    "channel": ("", "residual"),
    "layer": ("", "attention", "cross_attention", "ffn", "residual"),
    "module": ("",),
    "norm": ("",),
    "token": ("embedding", "head"),
}


@dataclass
class Reading:
    """What the builders work from: a model, and what was asked for.

    Args:
        inventory: the model's modules and parameters.
        anatomy: what is known of them.
        at: the activation asked for, or None.
        block: block size asked for, or None.
        only: sites that are wanted, for block sizes that fit these alone; None for all.
        offered: activations that were met instead, for the error.
    """

    inventory: Inventory
    anatomy: Anatomy
    at: str | None = None
    block: int | tuple[int, int] | None = None
    only: frozenset[str] | None = None
    offered: list[str] = field(default_factory=list)

    @cached_property
    def _layers(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.anatomy.layers)}

    def layer(self, module: str) -> int | None:
        """Return the number of the block a module lies in."""
        while module:
            if module in self._layers:
                return self._layers[module]
            module = module.rpartition(".")[0]
        return None

    @cached_property
    def embeddings(self) -> set[str]:
        """Parameters of embeddings."""
        held = (n for n, m in self.inventory.modules.items() if isinstance(m, nn.Embedding))
        return {p for n in held if (p := self.inventory.param(n, "weight")) is not None}

    def at_or_offer(self, have: Iterable[str], kind: str) -> str | None:
        """Return the activation asked for (the kind's default if none was) if it is there, else note what is."""
        wanted = self.at or AT[kind][0]
        found = list(have)
        if wanted in found:
            return wanted
        self.offered.extend(a for a in found if a and a not in self.offered)
        return None

    def named(self, short: str) -> bool:
        """Say whether a parameter of that short name is asked for, and note that it is there."""
        if short not in self.offered:
            self.offered.append(short)
        return self.at in (None, short)

    def untied(self, site: Site) -> Site:
        """Return the site; without `writes` if one of those numbers is at work in another module too.

        A tied weight at zero silences more than the tap does.
        """
        for i in site.writes:
            owners = self.inventory.owners(site.parts[i].param)
            if len({id(self.inventory.get(o)) for o in owners}) > 1:
                return replace(site, writes=())
        return site


def label(module: str, kind: str, at: str = "", *, default: str = "") -> str:
    """Return a site's name."""
    return f"{module}/{kind}" + (f"@{at}" if at and at != default else "")


def tap(slot: Slot, side: str) -> Tap | None:
    """Return where the units of a slot pass; None if one number cannot say it."""
    span = slot.span
    if len(span.units) > 1:
        return None
    stride = span.units[0][1]
    return Tap(slot.module, side, span.start, span.width, stride, slot.matrix.dim)


def parts_of(slots: Iterable[Slot]) -> list[Part]:
    """Return the weights and biases that make the units of some slots."""
    return [part for s in slots for part in (s.matrix.rows(s.span), *s.matrix.shifts(s.span))]


def inside(reading: Reading, module: str) -> list[str]:
    """Return the parameters of a module and all it holds, each once."""
    held = (n for n in reading.inventory.modules if n == module or n.startswith(f"{module}.") or not module)
    return list(dict.fromkeys(p for n in held for _, p in reading.inventory.own(n)))


def whole(reading: Reading, param: str) -> Part:
    """Return a parameter as one unit."""
    return Part.whole(param, reading.inventory.parameters.by_name[param].numel())
