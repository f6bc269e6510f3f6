"""Compact training of the chosen entries, in place or beside the frozen weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from neurograft.adapters._in_place import InPlaceMount
from neurograft.adapters._settled import Settled, packed, unpacked
from neurograft.adapters._side import SideMount
from neurograft.adapters._tied import TiedMount
from neurograft.core.card import method
from neurograft.core.compact.live import Live, Plain
from neurograft.core.compact.mount import Mount, matrix_of, regions_of, untied
from neurograft.core.errors import RequestError, one_of
from neurograft.core.grafts.delta import Slice
from neurograft.core.region import Region
from neurograft.core.selection import Selection


@method(claims={"undo", "only_the_selection", "compact", "zero_graft", "live_model", "resume", "coordinates"})
def slice(
    model: nn.Module,
    where: Selection,
    *,
    new: Iterable[str] | Mapping[str, int] = (),
    protect: Selection | None = None,
    tied: Literal["refuse", "both", "untie"] = "refuse",
    route: Literal["in-place", "side"] = "in-place",
    tie: Literal["site"] | None = None,
    allow_dense: bool = False,
) -> Mount:
    """Make the numbers that the selected units own trainable, as small float32 tensors of values.

    Args:
        model: any module; everything else in it is frozen meanwhile.
        where: the units.
        new: parameters the base's checkpoint lacks, trained whole (patterns), or name -> rows the base has.
        protect: units whose numbers must not move; their overlap with `where` is left out.
        tied: what to do with a parameter that has two names: "refuse", train it for "both", or "untie" it, so that
            only the selected use changes; the graft then unties it wherever it is put on.
        route: "in-place" writes the values into the base's weight; "side" never writes it, and every use computes as
            if the weight were base + (values - base): for bases that others share, quantized or sharded ones.
        tie: "site" gives all chosen units of a site one shared update vector for each of their parts: row i becomes
            W0[i] + delta of its site, and the tensors trained are the deltas, at 0 first, one row a site. Units in
            several groups stand in several sites, as `pipeline.clustered` makes them. The graft holds the deltas and
            0/1 membership as low-rank factors, so K groups export as a LoRA of rank K; weight decay pulls deltas to 0.
        allow_dense: accept a dense gradient where an operation on a selected weight is not known.

    Weight decay pulls the values themselves towards 0, as in full fine-tuning, on both routes.

    Raises:
        RequestError: the selection touches nothing, or a tied parameter.
    """
    one_of(route, ("in-place", "side"), what="route")
    one_of(tied, ("refuse", "both", "untie"), what="rule for tied weights")
    if tie is not None and (one_of(tie, ("site",), what="tie") and (route == "side" or isinstance(new, Mapping))):
        raise RequestError(
            f"tie={tie!r} with route={route!r}, new={new!r}",
            expected="values written in place, no appended rows",
            do="leave one of them out",
        )
    ties = untied(model, where) if tied == "untie" else None
    try:
        mount = _mounted(
            model, where, new=new, protect=protect, tied=tied, route=route, allow_dense=allow_dense, tie=tie
        )
    except BaseException:
        if ties is not None:
            ties.remove()
        raise
    mount.ties = ties
    return mount


def _mounted(
    model: nn.Module,
    where: Selection,
    *,
    new: Iterable[str] | Mapping[str, int],
    protect: Selection | None,
    tied: str,
    route: str,
    allow_dense: bool,
    tie: str | None,
) -> Mount:
    regions = regions_of(model, where, protect=protect, tied=tied)
    if tie is not None:
        return TiedMount(model, regions, where, new=new, allow_dense=allow_dense)
    appended = dict(new) if isinstance(new, Mapping) else {}
    for name, rows in appended.items():
        known = dict(model.named_parameters())
        weight = known[one_of(name, known, what="parameter to add rows to")]
        if not isinstance(rows, int) or not 0 < rows < len(weight):
            raise RequestError(
                f"new={{{name!r}: {rows!r}}}, of {len(weight)} rows",
                expected=f"how many of them the base has, 1 to {len(weight) - 1}",
                do="resize the model's vocabulary first, then give the number of rows it had",
            )
        grown = Region.of(weight.shape, "rows", torch.arange(rows, weight.shape[0]))
        if name in regions:
            raise RequestError(
                f"a selection in {name}, to which new rows are added",
                expected="one or the other",
                do="leave its units out of the selection",
            )
        regions[name] = grown
    if route == "side":
        return SideMount(model, regions, new=new, allow_dense=allow_dense)
    rules = {"protect": protect, "tied": "both" if tied == "both" else "refuse"}  # of a turn to other units
    return SliceMount(model, regions, new=new, allow_dense=allow_dense, rules=rules)


class SliceMount(InPlaceMount):
    """Values trained in place; the training may turn to other units, and then leaves the old values where they are."""

    appends = True

    def __init__(
        self,
        model: nn.Module,
        regions: Mapping[str, Region],
        *,
        new: Iterable[str] | Mapping[str, int] = (),
        allow_dense: bool = False,
        rules: Mapping[str, Any] | None = None,
    ) -> None:
        self.rules, self.turned = dict(rules or {}), False
        self.past: dict[str, Settled] = {}
        super().__init__(model, regions, new=new, allow_dense=allow_dense)
        self.first = self.regions()

    def reselect(self, ask: Callable[[], Selection], *, rewind: bool = False) -> dict[str, nn.Parameter]:
        """Turn to other units: the values of those left behind stay in the model and stop moving.

        Args:
            ask: names the units; called while the model is plain, with the values trained so far.
            rewind: put the base's numbers back afterwards: the new units start from there, and nothing else is changed.

        Returns:
            The trainable tensors from before, by name, for carrying an optimizer's state over.

        Raises:
            RequestError: the model carries grafts or new rows, or the selection touches nothing.
        """
        if self.start or self.appended:
            raise RequestError(
                "another selection on a model with grafts or new rows",
                expected="a plain base",
                do="merge the grafts into a base of their own first",
            )
        before, old = self.trained(), self.lives
        self._untag()
        try:
            regions = regions_of(self.model, ask(), **self.rules)
            weights = {n: self._checked(n, self.found.by_name[n]) for n in regions}
        except Exception:
            self._tag(old)
            raise
        for live in old:
            if rewind:
                live.restore()
                continue
            now = Settled.of(live)
            self.past[live.name] = self.past[live.name].joined(now) if live.name in self.past else now
        if rewind:
            self._leave(base=True)
            self.past = {}
        self._tag([self._live(n, weights[n], r) for n, r in regions.items()])
        self.turned = True
        return before

    def deltas(self) -> dict[str, Slice]:
        """Return the trained values, those left behind too."""
        found = super().deltas()
        for name, past in self.past.items():
            mine = next((v for v in self.lives if v.name == name), None)
            whole = past if mine is None else past.joined(Settled.of(mine))
            found[name] = Slice(whole.region, whole.values)
        return found

    def replayable(self, name: str, region: Region) -> bool:
        """Say whether a log on the base gives a tensor's values: not if the training turned to other units."""
        return not self.turned and super().replayable(name, region)

    def rest(self) -> Callable[[], None]:
        """Put the numbers from before the attachment back for a moment."""
        if not self.attached:
            return lambda: None
        ended = super().rest()
        self._leave(base=True)

        def over() -> None:
            self._leave(base=False)
            ended()

        return over

    def unmount(self) -> None:
        """Make every weight plain again, with its original numbers."""
        super().unmount()
        self._leave(base=True)

    def _tag(self, lives: list[Live]) -> None:
        for live in lives:
            if live.name in self.past:
                self.past[live.name].overlay(live)
        super()._tag(lives)

    def _leave(self, *, base: bool) -> None:
        """Write the entries left behind: the base's numbers, or the values they were left with."""
        for name, past in self.past.items():
            with Plain():
                past.region.write_(self.found.by_name[name], past.original if base else past.values)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the trainable tensors, and after a turn to other units what was left behind."""
        found = super().state_dict()
        return found | packed(self.past, self.regions()) if self.turned else found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a checkpoint's tensors, also of other units if the training had turned to them."""
        turned = any(key.startswith("live::") for key in state)
        if turned or self.turned:
            shapes = {n: (tuple(p.shape), self._matrix(n)) for n, p in self.found.by_name.items()}
            regions, left = unpacked(state, shapes)
            self._untag()
            for live in self.lives:
                live.restore()
            self._leave(base=True)
            self.past = {n: Settled(r, r.read(self.found.by_name[n]).cpu(), v) for n, (r, v) in left.items()}
            regions = regions or self.first
            lives = [self._live(n, p, regions[n]) for n, p in self.found.by_name.items() if n in regions]
            self._leave(base=False)
            self._tag(lives)
            self.turned = turned
            state = {k: v for k, v in state.items() if k.partition("::")[0] not in ("live", "left", "values")}
        super().load_state_dict(state)

    def _matrix(self, name: str) -> tuple[int, int, int]:
        return matrix_of(self.model, name, tuple(self.found.by_name[name].shape))
