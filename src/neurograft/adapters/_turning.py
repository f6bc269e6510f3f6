"""Values trained in place by a training that may turn to other units."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from neurograft.adapters._in_place import InPlaceMount
from neurograft.adapters._settled import Settled, packed, unpacked
from neurograft.core.compact.live import Live, Plain
from neurograft.core.compact.mount import matrix_of, regions_of
from neurograft.core.errors import RequestError
from neurograft.core.grafts.delta import Slice
from neurograft.core.region import Region
from neurograft.core.selection import Selection


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
            with self._shown(old):
                selection = ask()
            regions = regions_of(self.model, selection, **self.rules)
            weights = {n: self._checked(n, self.found.by_name[n]) for n in regions}
        except BaseException:
            self._tag(old)
            raise
        for live in old:
            if rewind:
                live.restore()
                continue
            now = self._settled(live)
            self.past[live.name] = self.past[live.name].joined(now) if live.name in self.past else now
        if rewind:
            self._leave(base=True)
            self.past = {}
        self._tag([self._onward(n, weights[n], r) for n, r in regions.items()])
        self.turned = True
        return before

    def deltas(self) -> dict[str, Slice]:
        """Return the trained values, those left behind too."""
        found = super().deltas()
        for name, past in self.past.items():
            mine = next((v for v in self.lives if v.name == name), None)
            whole = past if mine is None else past.joined(self._settled(mine))
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

    def _onward(self, name: str, weight: nn.Parameter, region: Region) -> Live:
        """Return the trainable side of a weight, on top of what was left behind in it."""
        live = self._live(name, weight, region)
        if name in self.past:
            self.past[name].overlay(live)
        return live

    def _settled(self, live: Live) -> Settled:
        """Return what is trained of a weight, as it is now."""
        return Settled.of(live.region, live.original, live.theta)

    @contextmanager
    def _shown(self, lives: list[Live]) -> Iterator[None]:
        """Let whoever asks find the values in the weights, where they are anyway."""
        yield

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
            lives = [self._onward(n, p, regions[n]) for n, p in self.found.by_name.items() if n in regions]
            self._leave(base=False)
            self._tag(lives)
            self.turned = turned
            state = {k: v for k, v in state.items() if k.partition("::")[0] not in ("live", "left", "values")}
        super().load_state_dict(state)

    def _matrix(self, name: str) -> tuple[int, int, int]:
        return matrix_of(self.model, name, tuple(self.found.by_name[name].shape))
