"""The stack of grafts on a model: originals once, and a state that is a function of the base and the set of grafts.

A graft that comes or goes rewrites the numbers it touches from their originals (see `combined.combined`), so the order
of applying and removing never matters and an empty stack is the base bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from neurograft.core.errors import RequestError, RunError
from neurograft.core.fingerprint import same_bits
from neurograft.core.grafts.below import Below
from neurograft.core.grafts.combined import Change
from neurograft.core.grafts.contents import Contents
from neurograft.core.grafts.coordinates import Coordinates, coordinates, everything, holders
from neurograft.core.grafts.delta import LowRank, New, Shift
from neurograft.core.grafts.fits import check_room, check_writable, named, refuse_overlaps, wrong_shape
from neurograft.core.grafts.ledger import Ledger
from neurograft.core.grafts.replay import Replay
from neurograft.core.region import Region, as_matrix
from neurograft.core.tokens import beside, grown
from neurograft.core.units import Parameters
from neurograft.core.untie import Apart, Untie

ATTRIBUTE = "_neurograft_stack"


@dataclass
class Stack(Below):
    """The grafts on one model, and the base below them.

    Time: what a graft touches that comes or goes, at every other graft there; a low-rank change touches all of its
    tensor. The base is read whole once for every tensor of a graft that comes, to verify it.

    Memory: the originals of the touched entries, once, on the CPU; the grafts' own tensors are shared with
    them, and a low-rank change stays its factors. Verifying reads one tensor at a time.

    Args:
        grafts: graft identity -> the graft.
        mounted: graft identity -> handles of its operations.
        guard: handle of the hook that watches `load_state_dict`.
    """

    grafts: dict[str, Contents] = field(default_factory=dict)
    mounted: dict[str, list[Any]] = field(default_factory=dict)
    guard: Any = None

    @staticmethod
    def of(model: nn.Module) -> Stack:
        """Return the model's stack, an empty one if it has none.

        Raises:
            RequestError: it is no model.
        """
        if not isinstance(model, nn.Module):
            raise RequestError(f"a model of type {type(model).__name__}", expected="a live model", do="load it first")
        found: Stack = model.__dict__.get(ATTRIBUTE) or Stack()
        return found

    def add(self, model: nn.Module, graft: Contents) -> None:
        """Verify a graft against the base, then put it on.

        Raises:
            RequestError: it is on already, belongs to another base, or overlaps what cannot be added to.
        """
        if graft.identity in self.grafts:
            raise RequestError(
                f"a second apply of the graft {graft.identity[:12]}",
                expected="a graft that is not on this model",
                do="remove it first, or apply graft.scale(...) after removing it",
            )
        self.digests.clear()  # somebody may have written into the base since
        handles: list[Any] = []
        try:
            self._make_room(model, graft, handles)
            where, weights = coordinates(model), holders(model)
            changes = self.translated(model, graft, where, weights)
            self.remember(model, where, weights)
            refuse_overlaps(graft, self.grafts.values())
            for operation in graft.operations:
                if not isinstance(operation, Untie):
                    handles.append(operation.scaled(graft.strength).mount(model))
        except BaseException:
            for handle in reversed(handles):
                handle.remove()
            raise
        if not self.grafts:
            model.__dict__[ATTRIBUTE] = self
            self.guard = model.register_load_state_dict_pre_hook(refuse_foreign_state)
        self.grafts[graft.identity], self.mounted[graft.identity] = graft, handles
        try:
            for name, found in changes.items():
                made = [(change, graft.strength) for change in found]
                ledger, (region, original) = self.ledgers.get(name, Ledger()).entered(
                    graft.identity, made, weights[name]
                )
                self.ledgers[name] = ledger
                region.write_(weights[name], ledger.rounded(region, original))
        except BaseException:  # out of memory, an interrupt: the model must not stay half changed
            self.drop(model, graft)
            raise

    def _make_room(self, model: nn.Module, graft: Contents, handles: list[Any]) -> None:
        """Untie weights and append rows before anything is looked up; what undoes it goes to `handles`."""
        alias = Parameters.of(model).alias
        untied = {n for o in graft.operations if isinstance(o, Untie) for n in o.names} - Apart.of(model).held.keys()
        longer = {n: d.after for n, d in graft.deltas.items() if isinstance(d, New) and d.after}
        reshaped = {alias[n] for n in untied & alias.keys()}
        for name in self._parameters(model, graft, longer):
            reshaped |= {name, *beside(model, name)}
        check_room(graft, reshaped, self.ledgers, self.grafts.values())
        for operation in graft.operations:
            if isinstance(operation, Untie):
                handles.append(operation.mount(model))
        for name, tensor in self._parameters(model, graft, longer).items():
            handles += grown(model, name, longer[tensor], graft.deltas[tensor].shape[0])

    @staticmethod
    def _parameters(model: nn.Module, graft: Contents, longer: Mapping[str, int]) -> dict[str, str]:
        """Return the parameters that tensors with appended rows stand for, and those tensors."""
        if not longer:
            return {}
        where = coordinates(model)
        return {parameter: tensor for tensor in longer for parameter in where.modules(named(tensor, graft, where))}

    def drop(self, model: nn.Module, graft: Contents) -> None:
        """Take a graft off; the model is then what the remaining ones make of the base.

        Raises:
            RequestError: it is not on this model.
        """
        if graft.identity not in self.grafts:
            raise RequestError(
                f"the graft {graft.identity[:12]}, which is not on this model",
                expected=f"one of {[g[:12] for g in self.grafts] or 'none: the model carries no graft'}",
                do="apply it first",
            )
        weights = holders(model)
        touched = {n: held for n, held in self.ledgers.items() if graft.identity in held.members}
        for name, ledger in touched.items():
            shape = ledger.members[graft.identity].region.shape
            if name not in weights or weights[name].shape != shape:
                raise RunError(
                    f"{name} was resized or replaced while the graft {graft.identity[:12]} was on; its originals "
                    "no longer fit. Load the base again, and remove grafts before such changes"
                )
        for name, ledger in touched.items():  # interrupted anywhere, a second call ends it
            left, (region, original) = ledger.left(graft.identity, weights[name])
            region.write_(weights[name], left.rounded(region, original))
            if left.members:
                self.ledgers[name] = left
            else:
                del self.ledgers[name]
        for handle in reversed(self.mounted.pop(graft.identity)):
            handle.remove()
        del self.grafts[graft.identity]
        if not self.grafts:
            model.__dict__.pop(ATTRIBUTE, None)
            if self.guard is not None:
                self.guard.remove()

    def translated(
        self, model: nn.Module, graft: Contents, where: Coordinates, weights: dict[str, Tensor]
    ) -> dict[str, list[Change]]:
        """Check every tensor of a graft against the base and return its changes by parameter."""
        changes: dict[str, list[Change]] = {}
        apart = {id(old): name for name, (old, _) in Apart.of(model).held.items()}
        untying = {n for o in graft.operations if isinstance(o, Untie) for n in o.names}
        for tensor, delta in graft.deltas.items():
            name = named(tensor, graft, where)
            for holder in where.modules(name):
                check_writable(holder, weights[holder])
            if not isinstance(delta, New):
                self.check(tensor, graft, model, where, weights)
            whole = delta.on() if isinstance(delta, New) else delta
            if isinstance(whole, Replay):
                whole = whole.replayed(self.numbers(name, whole.region, model, where, weights))
            region = everything(whole.shape, as_matrix(whole.shape)) if isinstance(whole, LowRank) else whole.region
            for piece in where.to_module(name, region):
                weight = weights[piece.name]
                if apart.get(id(weight), piece.name) not in {piece.name, *untying}:
                    raise RequestError(
                        f"a graft of {piece.name}, made while {apart[id(weight)]} was tied with it",
                        expected="tied weights; another graft has untied them",
                        do="remove the graft that unties them first",
                    )
                if tuple(weight.shape) != piece.region.shape:
                    raise wrong_shape(tensor, piece.region.shape, tuple(weight.shape), graft)
                change = Shift(whole, piece) if isinstance(whole, LowRank) else whole.at(piece)
                changes.setdefault(piece.name, []).append(change)
        return changes


def refuse_foreign_state(model: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Hook of a model with grafts on: `load_state_dict` may bring the grafted numbers, but no others under them.

    Raises:
        RunError: the state holds other numbers where a graft lies; removing it later would spoil them.
    """
    for name, ledger in Stack.of(model).ledgers.items():
        coming = state.get(prefix + name)
        if coming is None:
            continue
        if all(_agrees(coming, ledger, region, original) for region, original in ledger.originals()):
            continue
        raise RunError(f"load_state_dict of other numbers into {name}, which a graft changes; remove the graft first")


def _agrees(coming: Tensor, ledger: Ledger, region: Region, original: Tensor) -> bool:
    """Say whether numbers to be loaded are those that the grafts have made of some originals."""
    if coming.shape != region.shape:
        return False
    here = region.read(coming.contiguous()).cpu()
    return same_bits(here, ledger.rounded(region, original).to(here.dtype))
