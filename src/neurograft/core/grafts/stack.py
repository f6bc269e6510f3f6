"""The stack of grafts on a model: originals once, and a state that is a function of the base and the set of grafts.

After any change every touched number is rewritten from its original (see `delta.combined`), so the order of
applying and removing never matters and an empty stack is the base bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.errors import RequestError, RunError
from neurograft.core.fingerprint import same_bits, tensor_digest
from neurograft.core.grafts.combined import patched
from neurograft.core.grafts.contents import Contents
from neurograft.core.grafts.coordinates import Coordinates, coordinates, everything, holders
from neurograft.core.grafts.delta import LowRank, New, Shift
from neurograft.core.grafts.fits import check_room, check_writable, named, other_base, refuse_overlaps, wrong_shape
from neurograft.core.grafts.ledger import Change, Ledger, aligned
from neurograft.core.grafts.replay import Replay
from neurograft.core.region import Region, as_matrix, union
from neurograft.core.tokens import beside, grown
from neurograft.core.units import Parameters
from neurograft.core.untie import Apart, Untie

ATTRIBUTE = "_neurograft_stack"


@dataclass
class Stack:
    """The grafts on one model.

    Memory: the originals of the touched entries, once, on the CPU; the grafts' own tensors are shared with
    them, and a low-rank change stays its factors. Verifying reads one tensor at a time.

    Args:
        ledgers: parameter name -> what happened to it.
        grafts: graft identity -> the graft.
        digests: checkpoint tensor -> its digest in the base.
        mounted: graft identity -> handles of its operations.
        guard: handle of the hook that watches `load_state_dict`.
    """

    ledgers: dict[str, Ledger] = field(default_factory=dict)
    grafts: dict[str, Contents] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
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

    def original(self, parameter: str, weight: Tensor, region: Region) -> Tensor:
        """Return the base's numbers of a region, whatever lies on top of them, in its dtype, on the CPU."""
        ledger, found = self.ledgers.get(parameter), region.read(weight).cpu()
        return found if ledger is None else patched(region, found, ledger.region, ledger.original)

    def unrounded(self, parameter: str, weight: Tensor, region: Region) -> Tensor:
        """Return the current numbers of a region before their rounding to the parameter's dtype, float32 or 64."""
        ledger, found = self.ledgers[parameter], region.read(weight).cpu()
        wide = found if found.dtype == torch.float64 else found.float()
        return patched(region, wide, ledger.region, ledger.numbers())

    def numbers(
        self,
        tensor: str,
        region: Region,
        model: nn.Module,
        where: Coordinates,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the base's numbers of a checkpoint tensor's region, on the CPU.

        `weights` are the model's `holders`, which who asks for many tensors looks up once: a bank of experts is
        thousands of them.
        """
        weights, found = holders(model) if weights is None else weights, None
        for piece in where.to_module(tensor, region):
            values = self.original(piece.name, weights[piece.name], piece.region)
            if piece.order is None:
                return values.reshape(region.values_shape)
            found = torch.empty(region.numel, dtype=values.dtype) if found is None else found
            piece.give(values, found)
        assert found is not None
        return found.reshape(region.values_shape)

    def base(self, tensor: str, model: nn.Module, where: Coordinates) -> Tensor:
        """Return a checkpoint tensor as the base has it; the model's own storage where nothing lies on it."""
        shape = where.shape(tensor)
        whole = everything(shape, as_matrix(shape))
        # Only a stack with grafts has to look where the tensor lies.
        if self.ledgers and any(p.name in self.ledgers for p in where.to_module(tensor, whole)):
            return self.numbers(tensor, whole, model, where)
        return where.read(tensor)

    def digest(self, tensor: str, model: nn.Module, where: Coordinates) -> str:
        """Return the digest of a checkpoint tensor in the base."""
        if tensor not in self.digests:
            self.digests[tensor] = tensor_digest(self.base(tensor, model, where))
        return self.digests[tensor]

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
        self.digests.clear()  # of a base that somebody may have written into since
        handles: list[Any] = []
        try:
            self._make_room(model, graft, handles)
            where, weights = coordinates(model), holders(model)
            changes = self.translated(model, graft, where, weights)
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
                self._enter(name, weights[name], graft.identity, [(change, graft.strength) for change in found])
            for name in changes:
                self.ledgers[name].region.write_(weights[name], self.ledgers[name].numbers())
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
            if name not in weights or weights[name].shape != ledger.region.shape:
                raise RunError(
                    f"{name} was resized or replaced while the graft {graft.identity[:12]} was on; its originals "
                    "no longer fit. Load the base again, and remove grafts before such changes"
                )
        for name, ledger in touched.items():  # interrupted anywhere, a second call ends it
            ledger.region.write_(weights[name], ledger.original)
            members = {identity: held for identity, held in ledger.members.items() if identity != graft.identity}
            if members:
                region = union(change.region for changes in members.values() for change, _ in changes)
                left = Ledger(region, region.read(weights[name]).cpu(), members)
                region.write_(weights[name], left.numbers())
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
                self.check(tensor, graft, model, where)
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

    def check(self, tensor: str, graft: Contents, model: nn.Module, where: Coordinates) -> None:
        """Raise unless a tensor of the base is the one a graft was made on.

        Raises:
            RequestError: another shape or other numbers.
        """
        name = named(tensor, graft, where)
        shape = where.shape(name)
        if shape != graft.deltas[tensor].shape:
            raise wrong_shape(tensor, graft.deltas[tensor].shape, shape, graft)
        if self.digest(name, model, where) != graft.base.get(tensor):
            raise other_base(tensor, graft)

    def _enter(self, name: str, weight: Tensor, identity: str, changes: list[tuple[Change, float]]) -> None:
        ledger = self.ledgers.get(name)
        if ledger is not None:
            changes = [(aligned(change, ledger.region), s) for change, s in changes]
        region = union([change.region for change, _ in changes] + ([ledger.region] if ledger else []))
        original = self.original(name, weight, region)
        members = ledger.members if ledger else {}
        members[identity] = changes
        self.ledgers[name] = Ledger(region, original, members)


def refuse_foreign_state(model: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Hook of a model with grafts on: `load_state_dict` may bring the grafted numbers, but no others under them.

    Raises:
        RunError: the state holds other numbers where a graft lies; removing it later would spoil them.
    """
    for name, ledger in Stack.of(model).ledgers.items():
        coming = state.get(prefix + name)
        if coming is None:
            continue
        if coming.shape == ledger.region.shape:
            here = ledger.region.read(coming.contiguous()).cpu()
            if same_bits(here, ledger.numbers().to(ledger.original.dtype).to(here.dtype)):
                continue
        raise RunError(f"load_state_dict of other numbers into {name}, which a graft changes; remove the graft first")
