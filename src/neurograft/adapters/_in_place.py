"""Live weights on a model: values trained in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from neurograft.core.compact.convolutions import filters
from neurograft.core.compact.live import Live
from neurograft.core.compact.mount import Mount
from neurograft.core.compact.uses import LiveWeight, tag, untag
from neurograft.core.compact.values import register_values, unregister_values
from neurograft.core.context import Trained
from neurograft.core.errors import RequestError, RunError
from neurograft.core.grafts.coordinates import everything
from neurograft.core.grafts.delta import Slice
from neurograft.core.linears import transposed
from neurograft.core.region import Region, as_matrix


class InPlaceMount(Mount):
    """Live weights on a model: values trained in place."""

    def __init__(
        self,
        model: nn.Module,
        regions: Mapping[str, Region],
        *,
        new: Iterable[str] | Mapping[str, int] = (),
        allow_dense: bool = False,
    ) -> None:
        named = dict(model.named_parameters(remove_duplicate=False))
        weights = {n: self._checked(n, named[n]) for n in regions}
        super().__init__(model, new=new)
        self.allow_dense, self.lives, self.handles = allow_dense, list[Live](), list[Any]()
        self.heads: list[Live] = []
        self.idle: list[Live] = []  # what stands beside a weight and is not trained any more
        self.start: dict[str, torch.Tensor] = {}
        narrow = (torch.bfloat16, torch.float16)
        self.heads = [self._head(n, p) for n, p in self.whole().items() if p.dtype in narrow]
        self._attach([self._live(n, weights[n], r) for n, r in regions.items() if n not in self.whole()])

    def undo(self) -> None:
        """Take back what an attachment did that failed half way."""
        self.detach()

    def _attach(self, lives: list[Live]) -> None:
        self.lives = lives
        for live in lives:
            if live.name in self.stack.ledgers:
                self.start[live.name] = self.stack.unrounded(live.name, live.weight, live.region)
                live.theta.data.copy_(self.start[live.name])
        self._tag(self.lives)
        self.handles = [
            register_optimizer_step_post_hook(self._stepped),
            self.model.register_forward_pre_hook(_Guard(self)),
        ]

    def _live(self, name: str, weight: nn.Parameter, region: Region) -> Live:
        """Return the trainable side of a weight."""
        return Live(name, weight, region, allow_dense=self.allow_dense)

    def _head(self, name: str, weight: nn.Parameter) -> Live:
        """Return the float32 side of a new parameter: in a narrow dtype small steps would round to nothing."""
        weight.requires_grad_(False)
        shape = tuple(weight.shape)
        return Live(name, self._checked(name, weight), everything(shape, as_matrix(shape)), allow_dense=True)

    def _prepare(self, live: Live) -> None:
        """Choose the routes of the plain cases now, so that a compiler meets no search for them."""
        for name, key in self.found.alias.items():
            if key != live.name or live.region.matrix[0] != 1:
                continue
            owner = self.model.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, nn.modules.conv._ConvNd) and len(live.region.shape) > 2:
                filters(live)
            elif len(live.region.shape) == 2:
                if isinstance(owner, nn.Embedding):
                    live.looked_up()
                else:
                    live.local(0, "row" if transposed(owner) else "column")

    @staticmethod
    def _checked(name: str, weight: nn.Parameter) -> nn.Parameter:
        if isinstance(weight, LiveWeight):
            raise RequestError(
                f"{name}, which is live already",
                expected="a weight that nothing trains",
                do="leave the other `attach` block first, or attach both selections at once: a | b",
            )
        usual = type(weight) is nn.Parameter and weight.is_floating_point() and weight.device.type != "meta"
        if not usual or not weight.is_contiguous():
            raise RequestError(
                f"{name}, a {type(weight).__name__} of {weight.dtype} on {weight.device}, "
                f"contiguous: {weight.is_contiguous()}",
                expected="a plain, contiguous floating-point parameter in memory",
                do="use adapter='slice' with route='side' and without tie",
            )
        return weight

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the values by the names of the weights they belong to."""
        return {live.name: live.theta for live in self.lives}

    def fresh(self) -> dict[str, nn.Parameter]:
        """Return the new parameters; of a narrow dtype, the float32 values they follow."""
        return {**super().fresh(), **{head.name: head.theta for head in self.heads}}

    def write(self) -> None:
        """Write every value into its weight."""
        for live in (*self.lives, *self.heads):
            live.write()
            live.epoch += 1

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                live = self.by_theta.get(id(parameter))
                if live is not None:
                    live.stepped()

    def deltas(self) -> dict[str, Slice]:
        """Return the trained values; on top of other grafts, relative to the base below them."""
        found = {}
        for live in self.lives:
            region, values = self.regions()[live.name].to("cpu"), live.theta.detach().cpu().clone()
            if live.name in self.start:
                now = self.start[live.name]
                base = self.stack.original(live.name, self._at_rest(live), region).to(values.dtype)
                values = torch.where(now == base, values, base + (values - now))
            found[live.name] = Slice(region, values)
        return found

    @staticmethod
    def _at_rest(live: Live) -> torch.Tensor:
        whole = live.weight.detach().cpu().clone()
        live.region.to("cpu").write_(whole, live.original)
        return whole

    def held(self) -> dict[str, Trained]:
        """Return what is trained of each parameter."""
        return {live.name: Trained(live.source(), live.region, live.original) for live in self.lives}

    def rest(self) -> Callable[[], None]:
        """Put the numbers from before the attachment back for a moment."""
        if not self.attached:
            return lambda: None
        lives = (*self.lives, *self.idle)
        for live in lives:
            live.resting = True  # neither a forward pass nor reading the state may write the values back
            live.restore()

        def ended() -> None:
            for live in lives:
                live.resting = False
                live.write()

        return ended

    def regions(self) -> dict[str, Region]:
        """Return which entries of which weights are trained."""
        return {live.name: live.region for live in self.lives}

    def _untag(self) -> None:
        for live in (*self.lives, *self.heads, *self.idle):
            live.write()
            self._off(live)
        unregister_values(self.model)

    def _tag(self, lives: list[Live]) -> None:
        every = [*lives, *self.heads, *self.idle]
        self.lives, self.by_theta = lives, {id(live.theta): live for live in every}
        register_values(self.model, every)
        for live in every:
            self._prepare(live)
            self._on(live)

    def _on(self, live: Live) -> None:
        tag(live)

    def _off(self, live: Live) -> None:
        if isinstance(live.weight, LiveWeight):
            untag(live)

    def unmount(self) -> None:
        """Make every weight plain again, with its original numbers."""
        for handle in self.handles:
            handle.remove()
        for live in (*self.lives, *self.heads, *self.idle):
            live.restore()
            self._off(live)
        unregister_values(self.model)

    def check(self) -> None:
        """Raise if something took a live weight out of the model behind our back.

        `.to("meta")`, offloading, sharding and `load_state_dict(assign=True)` rebuild parameters.
        """
        for live in (*self.lives, *self.heads, *self.idle):
            if self._lost(live):
                raise RunError(
                    f"{live.name} was replaced after it was attached (moved, offloaded, sharded or assigned); "
                    "attach after such changes"
                )

    def _lost(self, live: Live) -> bool:
        owner, _, leaf = live.name.rpartition(".")
        return self.model.get_submodule(owner)._parameters.get(leaf) is not live.weight


class _Guard:
    """Root hook that checks the mount before a forward pass; a copy of it does nothing."""

    def __init__(self, mount: InPlaceMount | None) -> None:
        self.mount = mount

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.mount is not None and not torch.compiler.is_compiling():
            self.mount.check()

    def __deepcopy__(self, memo: Any) -> _Guard:
        return _Guard(None)
