"""The side path: weights that are never written, beside which every use adds what the trained values differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from neurograft.adapters._in_place import InPlaceMount
from neurograft.adapters._packed import Packed, packs, plain, resharded, sharding
from neurograft.adapters._settled import Settled
from neurograft.adapters._turning import SliceMount
from neurograft.core.compact.beside import Beside, Left, Onward
from neurograft.core.compact.live import Live
from neurograft.core.compact.uses import LiveWeight
from neurograft.core.context import Trained
from neurograft.core.errors import RequestError
from neurograft.core.grafts.coordinates import coordinates
from neurograft.core.grafts.graft import Graft
from neurograft.core.region import Region


class SideMount(SliceMount):
    """Values trained beside frozen weights.

    The trainable tensor of a weight holds values, as on the in-place route, so that weight decay means the
    same; every use of the weight adds what they differ from the base. Plain weights are live ones that are not
    written; a linear layer that is quantized, offloaded or sharded gets a hook. Parameters the base lacks are trained
    in place. What a turn to other units leaves behind goes on being added, at the price of a product with as many
    numbers. Where the base is sharded (FSDP2, before attaching), every process holds all values, and their gradients
    are averaged over the processes as they come: each backward pass adds to a mean, so that accumulated ones add up.
    """

    def __init__(
        self,
        model: nn.Module,
        regions: Mapping[str, Region],
        *,
        new: Iterable[str] | Mapping[str, int] = (),
        allow_dense: bool = False,
        rules: Mapping[str, Any] | None = None,
    ) -> None:
        resharded(model)
        self.processes: Any = None  # among which the base is sharded
        self.averaging: list[Any] = []
        super().__init__(model, regions, new=new, allow_dense=allow_dense, rules=rules)

    def _live(self, name: str, weight: nn.Parameter, region: Region) -> Live:
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if plain(weight) and not packs(module):
            return Beside(name, weight, region, allow_dense=self.allow_dense)
        if self.found.tied(name):
            raise RequestError(
                f"{name} on the side path, packed and tied with {', '.join(self.found.tied(name))}",
                expected="a packed weight with one use",
                do="leave it out of the selection, or load the base unquantized",
            )
        self.processes = sharding(self.model, name, weight) or self.processes
        return Packed(name, module, leaf, region)

    def _onward(self, name: str, weight: nn.Parameter, region: Region) -> Live:
        past = self.past.get(name)
        if past is None:
            return self._live(name, weight, region)
        return Onward(name, weight, region, past.region, past.values, allow_dense=self.allow_dense)

    def _tag(self, lives: list[Live]) -> None:
        trained, weights = {live.name for live in lives}, self.found.by_name
        idle = {n: past for n, past in self.past.items() if n not in trained}
        self.idle = [Left(n, weights[n], past.region, past.values) for n, past in idle.items()]
        super()._tag(lives)
        for handle in self.averaging:
            handle.remove()
        if self.processes is not None:
            self.averaging = [live.theta.register_post_accumulate_grad_hook(self._averaged) for live in lives]

    def _averaged(self, theta: Tensor) -> None:
        assert theta.grad is not None
        dist.all_reduce(theta.grad, group=self.processes)
        theta.grad.div_(dist.get_world_size(self.processes))

    def graft(self, *, card: Mapping[str, Any] | None = None) -> Graft:
        """Return what has been trained so far as a graft.

        It belongs to the base as it is unpacked: whole, in memory, dequantized. The touched weights are unpacked for it
        together, in the CPU's memory; every process has to ask at the same time where they are sharded.
        """
        where = self.where
        with ExitStack() as stack:
            for live in self.lives:
                if isinstance(live, Packed):
                    stack.enter_context(live.whole())
            self.where = coordinates(self.model)
            try:
                return super().graft(card=card)
            finally:
                self.where = where

    def _settled(self, live: Live) -> Settled:
        assert isinstance(live, Beside)
        return Settled.of(*live.trained, live.theta)

    def regions(self) -> dict[str, Region]:
        """Return which entries of which weights are trained."""
        return {live.name: live.trained[0] for live in self.lives if isinstance(live, Beside)}

    def held(self) -> dict[str, Trained]:
        """Return what is trained of each parameter."""
        return {live.name: Trained(live.theta, *live.trained) for live in self.lives if isinstance(live, Beside)}

    def _leave(self, *, base: bool) -> None:
        """Nothing to write: what was left behind is added at every use."""

    @contextmanager
    def _shown(self, lives: list[Live]) -> Iterator[None]:
        """Let the weights be copies with the values in them for a moment; the base itself is not written.

        Raises:
            RequestError: a weight is packed, offloaded or sharded.
        """
        packed = next((live.name for live in lives if isinstance(live, Packed)), None)
        if packed is not None:
            raise RequestError(
                f"another selection on a model whose {packed} is trained beside packed numbers",
                expected="plain weights, in which a locator can be shown the values trained so far",
                do="load the base unquantized, or take a schedule that does not select anew",
            )
        weights = [(live.weight, live.weight.data, live) for live in (*lives, *self.idle)]
        try:
            for weight, _, live in weights:
                weight.data = live.copied()
            yield
        finally:
            for weight, base, _ in weights:
                weight.data = base

    @staticmethod
    def _checked(name: str, weight: nn.Parameter) -> nn.Parameter:
        return InPlaceMount._checked(name, weight) if isinstance(weight, LiveWeight) else weight

    def _on(self, live: Live) -> None:
        if isinstance(live, Packed):
            live.hook()
        else:
            super()._on(live)

    def _off(self, live: Live) -> None:
        if isinstance(live, Packed):
            live.unhook()
        else:
            super()._off(live)

    def _lost(self, live: Live) -> bool:
        return not isinstance(live, Packed) and super()._lost(live)
