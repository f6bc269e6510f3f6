"""Turns: rotations of units held as their angles, an intervention that ships a few numbers in the place of matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neurograft.core.errors import RequestError
from neurograft.core.intervene import Intervention, aimed
from neurograft.core.numerics.rotations import numbers_of, rotations
from neurograft.core.units import Site


@dataclass(frozen=True, eq=False)
class Turn(Intervention):
    """A rotation of units of several features, x' = x @ R(angles); folds where a rotation does.

    Args:
        site: where.
        ids: sorted unit numbers, int64 [k].
        kind: "rotate".
        value: made of the angles; leave it out.
        positions: as for an intervention.
        rows: as for an intervention.
        angles: float [k, m], radians.
        form: "rotary" or "givens".

    Raises:
        RequestError: another number of angles than the form takes; what an intervention refuses.

    Example:
        >>> from neurograft.anatomy.sites import sites
        >>> from neurograft.worlds.pico import pico
        >>> heads = next(iter(sites(pico("llama"), "head").values()))
        >>> turn = Turn.by(heads, torch.tensor([1]), torch.zeros(1, 4))
        >>> sorted(turn.tensors()), torch.equal(turn.value, torch.eye(8)[None])
        (['angles', 'ids'], True)
    """

    angles: Tensor | None = None
    form: str = "rotary"

    def __post_init__(self) -> None:
        assert self.angles is not None
        angles = self.angles.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
        tap = self.site.tap
        asked = (len(self.ids), numbers_of(self.form, tap.width if tap is not None else 1))
        if tuple(angles.shape) != asked:
            raise RequestError(
                f"{self.form} angles of shape {tuple(angles.shape)} for {len(self.ids)} units of {self.site.name}",
                expected=f"{asked}",
                do="give the angles of each unit in a row",
            )
        object.__setattr__(self, "angles", angles)
        object.__setattr__(self, "value", rotations(angles.double(), self.form).float())
        super().__post_init__()

    @staticmethod
    def by(site: Site, ids: Tensor, angles: Tensor, form: str = "rotary") -> Turn:
        """Return the turn of these units at every token."""
        return Turn(site, ids, "rotate", angles=angles, form=form)

    def meta(self) -> dict[str, Any]:
        """Return plain data.

        Raises:
            RequestError: the positions are a callable.
        """
        return {**super().meta(), "type": "neurograft.core.turn.Turn", "form": self.form}

    def tensors(self) -> dict[str, Tensor]:
        """Return the units and their angles."""
        assert self.angles is not None
        return {"ids": self.ids, "angles": self.angles}

    @staticmethod
    def from_parts(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Turn:
        """Read what `meta` and `tensors` wrote."""
        site, form = Site.from_dict(meta["site"]), meta["form"]
        return Turn(site, tensors["ids"], "rotate", angles=tensors["angles"], form=form, **aimed(meta))
