"""Compact training of the chosen entries, in place or beside the frozen weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from neurograft.adapters._settled import Settled, packed, unpacked
from neurograft.adapters._side import SideMount
from neurograft.core.card import method
from neurograft.core.delta import Slice
from neurograft.core.errors import RequestError, RunError, one_of
from neurograft.core.live import Live, Plain
from neurograft.core.mount import Mount, matrix_of, regions_of
from neurograft.core.region import Region
from neurograft.core.selection import Selection
from neurograft.core.uses import LiveWeight, tag, untag
from neurograft.core.values import register_values, unregister_values


@method(claims={"undo", "only_the_selection", "compact", "zero_graft", "live_model", "resume", "coordinates"})
def slice(
    model: nn.Module,
    where: Selection,
    *,
    new: Iterable[str] | Mapping[str, int] = (),
    protect: Selection | None = None,
    tied: Literal["refuse", "both"] = "refuse",
    route: Literal["in-place", "side"] = "in-place",
    allow_dense: bool = False,
) -> Mount:
    """Make the numbers that the selected units own trainable, as small float32 tensors of values.

    Args:
        model: any module; everything else in it is frozen meanwhile.
        where: the units.
        new: parameters the base's checkpoint lacks, trained whole (patterns), or name -> rows the base has.
        protect: units whose numbers must not move; their overlap with `where` is left out.
        tied: what to do with a parameter that has two names: "refuse", or train it for "both".
        route: "in-place" writes the values into the base's weight; "side" leaves it alone and adds
            x @ (values - base).T beside it, for quantized or sharded bases.
        allow_dense: accept a dense gradient where an operation on a selected weight is not known.

    Weight decay pulls the values themselves towards 0, as in full fine-tuning, on both routes.

    Raises:
        RequestError: the selection touches nothing, or a tied parameter.
    """
    one_of(route, ("in-place", "side"), what="route")
    regions = regions_of(model, where, protect=protect, tied=tied)
    appended = dict(new) if isinstance(new, Mapping) else {}
    for name, rows in appended.items():
        weight = model.get_parameter(name)
        grown = Region.of(weight.shape, "rows", torch.arange(rows, weight.shape[0]))
        if name in regions:
            raise RequestError(
                f"a selection in {name}, to which new rows are added",
                expected="one or the other",
                do="leave its units out of the selection",
            )
        regions[name] = grown
    if route == "side":
        return SideMount(model, regions, new=new)
    rules = {"protect": protect, "tied": tied}
    return SliceMount(model, regions, new=new, allow_dense=allow_dense, rules=rules)


class SliceMount(Mount):
    """Live weights on a model: values trained in place."""

    def __init__(
        self,
        model: nn.Module,
        regions: Mapping[str, Region],
        *,
        new: Iterable[str] | Mapping[str, int] = (),
        allow_dense: bool = False,
        rules: Mapping[str, Any] | None = None,
    ) -> None:
        names = {n: self._checked(n, dict(model.named_parameters(remove_duplicate=False))[n]) for n in regions}
        super().__init__(model, new=new)
        self.lives = [Live(n, names[n], r, allow_dense=allow_dense) for n, r in regions.items() if n not in self.whole]
        self.start = {}
        for live in self.lives:
            if live.name in self.stack.ledgers:
                self.start[live.name] = self.stack.unrounded(live.name, live.weight, live.region)
                live.theta.data.copy_(self.start[live.name])
        self.allow_dense, self.rules = allow_dense, dict(rules or {})
        self.first, self.turned = self.lives, False
        self.past: dict[str, Settled] = {}
        self._tag(self.lives)
        self.handles = [
            register_optimizer_step_post_hook(self._stepped),
            model.register_forward_pre_hook(_Guard(self)),
        ]

    def _prepare(self, live: Live) -> None:
        """Choose the routes of the plain cases now, so that a compiler meets no search for them."""
        for name, key in self.found.alias.items():
            if key == live.name and live.region.matrix[0] == 1 and len(live.region.shape) == 2:
                owner = self.model.get_submodule(name.rpartition(".")[0])
                if isinstance(owner, nn.Embedding):
                    live.looked_up()
                else:
                    live.local(0, "row" if type(owner).__name__ == "Conv1D" else "column")

    @property
    def whole(self) -> set[str]:
        """Names of parameters that are trained whole because the base lacks them."""
        return {n for n in self.new if n not in self.appended}

    @staticmethod
    def _checked(name: str, weight: nn.Parameter) -> nn.Parameter:
        if isinstance(weight, LiveWeight):
            raise RequestError(
                f"{name}, which is live already",
                expected="a weight that nothing trains",
                do="leave the other `attach` block first, or attach both selections at once: a | b",
            )
        if type(weight) is not nn.Parameter or not weight.is_contiguous() or not weight.is_floating_point():
            raise RequestError(
                f"{name}, a {type(weight).__name__} of {weight.dtype}, contiguous: {weight.is_contiguous()}",
                expected="a plain, contiguous floating-point parameter",
                do="use route='side'",
            )
        return weight

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the values by the names of the weights they belong to."""
        return {live.name: live.theta for live in self.lives}

    def write(self) -> None:
        """Write every value into its weight."""
        for live in self.lives:
            live.write()
            live.epoch += 1

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                live = self.by_theta.get(id(parameter))
                if live is not None:
                    live.write()
                    live.epoch += 1

    def deltas(self) -> dict[str, Slice]:
        """Return the trained values; on top of other grafts, relative to the base below them."""
        found = {}
        for live in self.lives:
            values = live.theta.detach().cpu().clone()
            if live.name in self.start:
                now = self.start[live.name]
                base = self.stack.original(live.name, self._at_rest(live), live.region.to("cpu")).to(values.dtype)
                values = torch.where(now == base, values, base + (values - now))
            found[live.name] = Slice(live.region.to("cpu"), values)
        for name, past in self.past.items():
            mine = next((v for v in self.lives if v.name == name), None)
            whole = past if mine is None else past.joined(Settled.of(mine))
            found[name] = Slice(whole.region, whole.values)
        return found

    @staticmethod
    def _at_rest(live: Live) -> torch.Tensor:
        whole = live.weight.detach().cpu().clone()
        live.region.to("cpu").write_(whole, live.original)
        return whole

    def rest(self) -> Callable[[], None]:
        """Put the numbers from before the attachment back for a moment."""
        if not self.attached:
            return lambda: None
        for live in self.lives:
            live.resting = True  # neither a forward pass nor reading the state may write the values back
            live.restore()
        self._leave(base=True)

        def ended() -> None:
            self._leave(base=False)
            for live in self.lives:
                live.resting = False
                live.write()

        return ended

    def regions(self) -> dict[str, Region]:
        """Return which entries of which weights are trained."""
        return {live.name: live.region for live in self.lives}

    def reselect(self, ask: Callable[[], Selection]) -> dict[str, nn.Parameter]:
        """Turn to other units: the values of those left behind stay in the model and stop moving.

        Args:
            ask: names the units; called while the model is plain, with the values trained so far.

        Returns:
            The trainable tensors from before, by name, for carrying an optimizer's state over.

        Raises:
            RequestError: the model carries grafts or new parameters, or the selection touches nothing.
        """
        if self.start or self.new:
            raise RequestError(
                "another selection on a model with grafts or new parameters",
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
            now = Settled.of(live)
            self.past[live.name] = self.past[live.name].joined(now) if live.name in self.past else now
        self._tag([Live(n, weights[n], r, allow_dense=self.allow_dense) for n, r in regions.items()])
        self.turned = True
        return before

    def _untag(self) -> None:
        for live in self.lives:
            live.write()
            untag(live)
        unregister_values(self.model)

    def _tag(self, lives: list[Live]) -> None:
        self.lives, self.by_theta = lives, {id(live.theta): live for live in lives}
        for live in lives:
            if live.name in self.past:
                self.past[live.name].overlay(live)
        register_values(self.model, lives)
        for live in lives:
            self._prepare(live)
            tag(live)

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
        if any(key.startswith("live::") for key in state) or self.turned:
            shapes = {n: (tuple(p.shape), self._matrix(n)) for n, p in self.found.by_name.items()}
            regions, left = unpacked(state, shapes)
            self._untag()
            for live in self.lives:
                live.restore()
            self._leave(base=True)
            self.past = {n: Settled(r, r.read(self.found.by_name[n]).cpu(), v) for n, (r, v) in left.items()}
            regions = regions or {v.name: v.region for v in self.first}
            lives = [Live(n, self.found.by_name[n], r, allow_dense=self.allow_dense) for n, r in regions.items()]
            self._leave(base=False)
            self._tag(lives)
            self.turned = bool(left)
            state = {k: v for k, v in state.items() if k.partition("::")[0] not in ("live", "left", "values")}
        super().load_state_dict(state)

    def _matrix(self, name: str) -> tuple[int, int, int]:
        return matrix_of(self.model, name, tuple(self.found.by_name[name].shape))

    def unmount(self) -> None:
        """Make every weight plain again, with its original numbers."""
        for handle in self.handles:
            handle.remove()
        for live in self.lives:
            live.restore()
            untag(live)
        unregister_values(self.model)
        self._leave(base=True)

    def check(self) -> None:
        """Raise if something took a live weight out of the model behind our back.

        `.to("meta")`, offloading, sharding and `load_state_dict(assign=True)` rebuild parameters.
        """
        for live in self.lives:
            owner, _, leaf = live.name.rpartition(".")
            if self.model.get_submodule(owner)._parameters.get(leaf) is not live.weight:
                raise RunError(
                    f"{live.name} was replaced after it was attached (moved, offloaded, sharded or assigned); "
                    "attach after such changes, or use route='side'"
                )


class _Guard:
    """Root hook that checks the mount before a forward pass; a copy of it does nothing."""

    def __init__(self, mount: SliceMount | None) -> None:
        self.mount = mount

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.mount is not None and not torch.compiler.is_compiling():
            self.mount.check()

    def __deepcopy__(self, memo: Any) -> _Guard:
        return _Guard(None)
