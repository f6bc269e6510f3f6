"""An intervention for the length of a block, and as a graft."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import nn

from neurograft.core.errors import RequestError, RunError
from neurograft.core.grafts.graft import Graft
from neurograft.core.intervene import Intervention
from neurograft.core.selection import Selection
from neurograft.core.taps.board import Board
from neurograft.core.taps.folding import as_deltas
from neurograft.pipeline._follow import Follow, fired


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
