"""Interventions: activations of chosen units replaced while the model runs, and their weight changes where exact.

| kind | new activation | folds into weights |
|---|---|---|
| zero | 0 | wherever the unit has write parts |
| scale | value * a | the same |
| pin, replace | value | where the tapped module has a bias to put it into |
| add | a + value | the same |
| rotate | a @ value | where the module is a linear map |
| remove | a - (a @ value.T) @ value | never: it stays an operation |

Shape letters: k chosen units, w features of a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.batches import POSITIONS
from neurograft.core.errors import RequestError, RunError, one_of
from neurograft.core.fingerprint import digest
from neurograft.core.grafts.delta import Slice
from neurograft.core.prompts.passing import Seen
from neurograft.core.taps.amounts import applied, checked
from neurograft.core.taps.board import Board, Guest, features
from neurograft.core.taps.folding import folded
from neurograft.core.units import Site

KINDS = ("zero", "scale", "pin", "add", "replace", "rotate", "remove")
PLACES = (*POSITIONS, "generated")
Places = str | tuple[int, ...] | Callable[[dict[str, Any]], Tensor]


@dataclass(frozen=True, eq=False)
class Intervention:
    """A change of some units' activations at one site; an `Operation` of grafts.

    Args:
        site: where; it needs a tap.
        ids: sorted unit numbers, int64 [k].
        kind: one of `KINDS`.
        value: scale, pin, add: a number, [k] or [k, w]. replace: [k] or [k, w], or [B, T, k] or [B, T, k, w] aligned
            with the batch's rows (B = 1: the same for all) and positions; past its end nothing is replaced.
            rotate: an orthogonal matrix, [w, w] for all units, [k, w, w] for each, or [k, k] among units of one
            feature. remove: orthonormal directions [m, w], for units of several features.
        positions: "all" (padding too), "last", "answer", "prompt", "generated", positions counted from 0 (negative
            ones from the end of the first pass), or a callable batch -> bool [B, T], which cannot be saved.
        rows: batch elements, or None for all.

    Raises:
        RequestError: an unknown kind or position, a value of the wrong shape, a site without a tap.
    """

    site: Site
    ids: Tensor
    kind: str
    value: Tensor | None = None
    positions: Places = "all"
    rows: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        one_of(self.kind, KINDS, what="kind of intervention")
        if isinstance(self.positions, str):
            one_of(self.positions, PLACES, what="positions")
        if self.site.tap is None:
            raise RequestError(
                f"an intervention at {self.site.name!r}, whose units have no activations",
                expected="a site with a tap",
                do="choose another kind of unit, or another `at`",
            )
        ids = self.ids.detach().to("cpu", torch.int64).reshape(-1).clone()
        if not len(ids) or ids.min() < 0 or ids.max() >= self.site.n or len(ids.unique()) != len(ids):
            raise RequestError(
                f"the units {ids.tolist()[:6]} of {self.site.name!r}",
                expected=f"distinct numbers from 0 to {self.site.n - 1}, at least one",
                do="take the units from a selection made on this model",
            )
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "value", checked(self.kind, self.value, len(ids), self.width))

    @property
    def width(self) -> int:
        """Features of a unit."""
        assert self.site.tap is not None
        return self.site.tap.width

    @property
    def aligned(self) -> bool:
        """Whether the value stands at batch rows and positions."""
        return self.kind == "replace" and self.value is not None and self.value.dim() > (1 if self.width == 1 else 2)

    @property
    def scalable(self) -> bool:
        """Whether it has a strength."""
        return self.kind in ("zero", "scale", "add")

    def scaled(self, s: float) -> Intervention:
        """Return it at strength s: activations move s times as far; itself at 1.

        Raises:
            RequestError: it has no strength.
        """
        if s == 1.0:
            return self
        if not self.scalable:
            raise RequestError(
                f"a strength of {s} for {self.describe()}", expected="zero, scale or add", do="leave it at strength 1"
            )
        if self.kind == "add":
            assert self.value is not None
            return replace(self, value=s * self.value)
        factor = torch.zeros(()) if self.value is None else self.value
        return replace(self, kind="scale", value=1 + s * (factor - 1))

    def meta(self) -> dict[str, Any]:
        """Return plain data.

        Raises:
            RequestError: the positions are a callable.
        """
        if callable(self.positions):
            raise RequestError(
                "an intervention at positions given by a callable, in a file",
                expected="positions by name or number",
                do="use it live, or name the positions",
            )
        return {"type": "neurograft.core.intervene.Intervention", **self._meta(), "positions": self.positions}

    def _meta(self) -> dict[str, Any]:
        return {"site": self.site.as_dict(), "kind": self.kind, "rows": self.rows}

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors."""
        return {"ids": self.ids} | ({} if self.value is None else {"value": self.value})

    @staticmethod
    def from_parts(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Intervention:
        """Read what `meta` and `tensors` wrote."""
        site = Site.from_dict(meta["site"])
        return Intervention(site, tensors["ids"], meta["kind"], tensors.get("value"), **aimed(meta))

    @cached_property
    def key(self) -> str:
        """Order among operations on one activation, whoever came first."""
        return digest(self._meta(), str(self.positions), self.tensors())

    def mount(self, model: nn.Module) -> Mounted:
        """Put it on.

        Raises:
            RequestError: the model has no such tap.
        """
        board = Board.of(model)
        guest = Guest({self.site.name: self.site}, self.visit, key=self.key, again=True)
        board.join(guest)
        return Mounted(board, guest)

    def fold(self, model: nn.Module) -> dict[str, Slice]:
        """Return it as weight changes by parameter.

        Raises:
            RequestError: there are no such weights, with the reason.
        """
        if self.positions != "all" or self.rows is not None or self.aligned:
            raise RequestError(
                f"{self.describe()} at chosen positions or rows, as a weight change",
                expected="an intervention at every token",
                do="keep it as an operation of the graft",
            )
        return folded(model, self.site, self.ids, self.kind, self.value)

    def clashes(self, other: object) -> bool:
        """Say whether both meet at an activation and their order would matter."""
        if not isinstance(other, Intervention) or not self._meets(other):
            return False
        kinds = {self.kind, other.kind}
        return not (kinds <= {"zero", "scale"} or kinds == {"add"})

    def _meets(self, other: Intervention) -> bool:
        mine, theirs = self.site.tap, other.site.tap
        assert mine is not None
        assert theirs is not None
        if any(getattr(mine, f) != getattr(theirs, f) for f in ("module", "side", "index", "expert")):
            return False
        if self.rows is not None and other.rows is not None and not set(self.rows) & set(other.rows):
            return False
        a, b = features(mine, self.site.n)[self.ids], features(theirs, other.site.n)[other.ids]
        return bool(torch.isin(a, b).any())

    def describe(self) -> str:
        """Return a few words for messages."""
        return f"{self.kind} of {len(self.ids)} units at {self.site.name}"

    def visit(self, name: str, x: Tensor, seen: Seen) -> Tensor:
        """Return the activations [..., n] or [..., n, w] with those of the chosen units changed."""
        axis = len(seen.lead)
        ids = self.ids.to(x.device)
        old = x.index_select(axis, ids)
        new = applied(self.kind, self.value, old, self.width, seen.place() if self.aligned else None)
        flags = self._where(seen)
        if flags is not None:
            new = torch.where(flags.to(x.device).reshape(*seen.lead, *[1] * (x.dim() - axis)), new, old)
        return x.index_copy(axis, ids, new.to(x.dtype))

    def _where(self, seen: Seen) -> Tensor | None:
        """Return which activations change, bool shaped like their leading axes; None for all.

        Places are on the CPU, as positions and rows are; a mask of the batch is where the batch is.
        """
        flags: Tensor | None = None
        if isinstance(self.positions, tuple):
            wanted = [p if p >= 0 else p + seen.first for p in self.positions]
            flags = torch.isin(seen.place()[1], torch.tensor(wanted, device="cpu"))
        elif self.positions != "all":
            flags = seen.mask(self.positions)
        if self.rows is not None:
            mine = torch.isin(seen.place()[0], torch.tensor(self.rows, device="cpu"))
            flags = mine if flags is None else flags.cpu() & mine
        if self.aligned:
            assert self.value is not None
            rows, at = seen.place()
            if self.value.shape[0] > 1 and int(rows.max()) >= self.value.shape[0]:
                raise RunError(
                    f"{self.describe()} from {self.value.shape[0]} rows met a batch of {int(rows.max()) + 1}; "
                    "give as many rows, or one for all"
                )
            inside = at < self.value.shape[1]
            flags = inside if flags is None else flags.cpu() & inside
        return flags


def aimed(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return the positions and rows that an intervention's `meta` wrote."""
    rows, positions = meta["rows"], meta["positions"]
    return {
        "positions": positions if isinstance(positions, str) else tuple(positions),
        "rows": None if rows is None else tuple(rows),
    }


@dataclass(eq=False)
class Mounted:
    """An intervention on a model.

    Args:
        board: the model's taps.
        guest: its seat.
    """

    board: Board
    guest: Guest

    @property
    def fired(self) -> int:
        """How often it changed something."""
        return sum(self.guest.fired.values())

    def remove(self) -> None:
        """Take it off without a trace."""
        self.board.leave(self.guest)


def interventions(
    sites: Mapping[str, Site], ids: Mapping[str, Tensor], kind: str, values: Mapping[str, Tensor] | None, **how: Any
) -> tuple[Intervention, ...]:
    """Return one intervention for each site that has chosen units.

    Raises:
        RequestError: nothing is chosen.
    """
    found = tuple(
        Intervention(sites[n], chosen, kind, None if values is None else values[n], **how)
        for n, chosen in ids.items()
        if len(chosen)
    )
    if not found:
        raise RequestError("an intervention on no unit", expected="at least one unit", do="select some units")
    return found
