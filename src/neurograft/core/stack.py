"""The stack of grafts on a model: originals once, and a state that is a function of the base and the set of grafts.

After any change every touched number is rewritten from its original (see `delta.combined`), so the order of
applying and removing never matters and an empty stack is the base bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from neurograft.core.coordinates import Coordinates, Piece, coordinates, everything
from neurograft.core.delta import New, Slice, combined
from neurograft.core.errors import RequestError
from neurograft.core.fingerprint import tensor_digest
from neurograft.core.live import Watched
from neurograft.core.region import Region, as_matrix, union
from neurograft.core.tokens import grown
from neurograft.core.units import Parameters

if TYPE_CHECKING:
    from neurograft.core.graft import Graft

ATTRIBUTE = "_neurograft_stack"


@dataclass
class Ledger:
    """What happened to one parameter.

    Args:
        region: every touched entry.
        original: their numbers in the base, in the parameter's dtype, on the CPU.
        members: graft identity -> its changes here, with their strength.
    """

    region: Region
    original: Tensor
    members: dict[str, list[tuple[Slice, float]]] = field(default_factory=dict)

    def ordered(self) -> list[tuple[Slice, float]]:
        """Return the changes in the order of their grafts' identities."""
        return [change for identity in sorted(self.members) for change in self.members[identity]]


@dataclass
class Stack:
    """The grafts on one model.

    Args:
        ledgers: parameter name -> what happened to it.
        grafts: graft identity -> the graft.
        digests: checkpoint tensor -> its digest in the base.
        mounted: graft identity -> handles of its operations.
    """

    ledgers: dict[str, Ledger] = field(default_factory=dict)
    grafts: dict[str, Graft] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    mounted: dict[str, list[Any]] = field(default_factory=dict)

    @staticmethod
    def of(model: nn.Module) -> Stack:
        """Return the model's stack, an empty one if it has none."""
        found: Stack = model.__dict__.get(ATTRIBUTE) or Stack()
        return found

    def original(self, parameter: str, weight: Tensor, region: Region) -> Tensor:
        """Return the base's numbers of a region, whatever lies on top of them."""
        ledger, found = self.ledgers.get(parameter), region.read(weight).cpu()
        if ledger is None:
            return found
        whole = _scattered(weight, ledger)
        return region.read(whole)

    def unrounded(self, parameter: str, weight: Tensor, region: Region) -> Tensor:
        """Return the current numbers of a region before their rounding to the parameter's dtype, float32 or 64."""
        ledger = self.ledgers[parameter]
        whole = weight.detach().cpu()
        whole = whole.clone() if whole.dtype == torch.float64 else whole.float()
        ledger.region.to("cpu").write_(whole, combined(ledger.region, ledger.original, ledger.ordered()))
        return region.to("cpu").read(whole)

    def base(self, tensor: str, model: nn.Module, where: Coordinates) -> Tensor:
        """Return a checkpoint tensor as the base has it."""
        names = {p.name for p in _pieces_of(tensor, where)}
        under = {n: ledger for n, ledger in self.ledgers.items() if n in names}
        if not under:
            return where.read(tensor)
        parameters = Parameters.of(model).by_name
        for name, ledger in under.items():
            ledger.region.write_(parameters[name], ledger.original)
        try:
            return where.read(tensor).clone()
        finally:
            self._rewrite(parameters, under)

    def digest(self, tensor: str, model: nn.Module, where: Coordinates) -> str:
        """Return the digest of a checkpoint tensor in the base."""
        if tensor not in self.digests:
            self.digests[tensor] = tensor_digest(self.base(tensor, model, where))
        return self.digests[tensor]

    def add(self, model: nn.Module, graft: Graft) -> None:
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
        handles: list[Any] = self._grow(model, graft)
        try:
            where, parameters = coordinates(model), Parameters.of(model).by_name
            changes = self._translated(model, graft, where, parameters)
            self._refuse_overlaps(graft)
            for operation in graft.operations:
                handles.append(operation.scaled(graft.strength).mount(model))
        except Exception:
            for handle in reversed(handles):
                handle.remove()
            raise
        for name, slices in changes.items():
            self._enter(name, parameters[name], graft.identity, [(s, graft.strength) for s in slices])
        self.grafts[graft.identity], self.mounted[graft.identity] = graft, handles
        self._rewrite(parameters, {n: self.ledgers[n] for n in changes})
        model.__dict__[ATTRIBUTE] = self

    @staticmethod
    def _grow(model: nn.Module, graft: Graft) -> list[Any]:
        """Make room for appended rows; returns what takes it away again."""
        made: list[Any] = []
        for name, delta in graft.deltas.items():
            other = next((g for g in Stack.of(model).grafts.values() if isinstance(g.deltas.get(name), New)), None)
            if isinstance(delta, New) and other is not None:
                raise RequestError(
                    f"{name!r}, which the graft {other.identity[:12]} on this model brings too",
                    expected="one graft with this new parameter",
                    do="remove the other graft first",
                )
            if isinstance(delta, New) and delta.after is not None and name in Parameters.of(model).alias:
                growth = grown(model, name, delta.after, delta.shape[0])
                made += [growth] if growth else []
        return made

    def drop(self, model: nn.Module, graft: Graft) -> None:
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
        handles = self.mounted.pop(graft.identity)
        parameters = Parameters.of(model).by_name
        for name in [n for n, held in self.ledgers.items() if graft.identity in held.members]:
            ledger = self.ledgers[name]
            ledger.region.write_(parameters[name], ledger.original)
            del ledger.members[graft.identity]
            if ledger.members:
                region = union(s.region for slices in ledger.members.values() for s, _ in slices)
                ledger.region, ledger.original = region, region.read(parameters[name]).cpu()
                self._rewrite(parameters, {name: ledger})
            else:
                del self.ledgers[name]
        for handle in reversed(handles):
            handle.remove()
        del self.grafts[graft.identity]
        if not self.grafts:
            model.__dict__.pop(ATTRIBUTE, None)

    def _translated(
        self, model: nn.Module, graft: Graft, where: Coordinates, parameters: dict[str, nn.Parameter]
    ) -> dict[str, list[Slice]]:
        """Check every tensor of a graft against the base and return its changes by parameter."""
        changes: dict[str, list[Slice]] = {}
        for tensor, delta in graft.deltas.items():
            if not isinstance(delta, New):
                self._check(tensor, graft, model, where)
            whole = delta.on(where.read(tensor) if isinstance(delta, New) else self.base(tensor, model, where))
            for piece in where.to_module(tensor, whole.region):
                weight = parameters[piece.name]
                _check_writable(piece.name, weight)
                if tuple(weight.shape) != piece.region.shape:
                    raise _wrong_shape(tensor, piece.region.shape, tuple(weight.shape), graft)
                changes.setdefault(piece.name, []).append(Slice(piece.region, piece.take(whole.values)))
        return changes

    def _check(self, tensor: str, graft: Graft, model: nn.Module, where: Coordinates) -> None:
        shape = tuple(where.read(tensor).shape)
        if shape != graft.deltas[tensor].shape:
            raise _wrong_shape(tensor, graft.deltas[tensor].shape, shape, graft)
        if self.digest(tensor, model, where) != graft.base[tensor]:
            origin = graft.card.get("base", {})
            name, revision = origin.get("name") or "it was made on", origin.get("revision") or "any"
            raise RequestError(
                f"a base whose tensor {tensor!r} holds other numbers than the one this graft was made on",
                expected=f"the base {name}, revision {revision}, loaded as {origin.get('dtype') or 'it was'} or wider",
                do="load that base; a tuned, merged or re-quantized copy is another base",
            )

    def _refuse_overlaps(self, graft: Graft) -> None:
        for operation in graft.operations:
            for other in self.grafts.values():
                for theirs in other.operations:
                    if operation.clashes(theirs):
                        raise RequestError(
                            f"{operation.describe()} over {theirs.describe()} of the graft {other.identity[:12]}",
                            expected="operations that do not replace the same activations",
                            do="remove the other graft first",
                        )

    def _enter(self, name: str, weight: Tensor, identity: str, changes: list[tuple[Slice, float]]) -> None:
        ledger = self.ledgers.get(name)
        regions = [s.region for s, _ in changes] + ([ledger.region] if ledger else [])
        region = union(regions)
        original = self.original(name, weight, region)
        members = ledger.members if ledger else {}
        members[identity] = changes
        self.ledgers[name] = Ledger(region, original, members)

    def _rewrite(self, parameters: dict[str, nn.Parameter], ledgers: dict[str, Ledger]) -> None:
        for name, ledger in ledgers.items():
            ledger.region.write_(parameters[name], combined(ledger.region, ledger.original, ledger.ordered()))


def _scattered(weight: Tensor, ledger: Ledger) -> Tensor:
    """Return a copy of the parameter with its original numbers back in place."""
    whole = weight.detach().cpu().clone()
    ledger.region.to("cpu").write_(whole, ledger.original)
    return whole


def _pieces_of(tensor: str, where: Coordinates) -> list[Piece]:
    shape = tuple(where.read(tensor).shape)
    return where.to_module(tensor, everything(shape, as_matrix(shape)))


def _check_writable(name: str, weight: Tensor) -> None:
    if isinstance(weight, Watched):
        raise RequestError(
            f"a graft on {name}, whose entries are being trained",
            expected="a model at rest",
            do="leave the `attach` block, or detach, before applying or removing grafts",
        )
    if not weight.is_floating_point() or not weight.is_contiguous() or weight.device.type == "meta":
        raise RequestError(
            f"the parameter {name} ({weight.dtype}, {weight.device}, contiguous: {weight.is_contiguous()})",
            expected="a contiguous floating-point weight in memory",
            do="load the base unquantized and not offloaded, or attach the graft with route='side'",
        )


def _wrong_shape(tensor: str, made_for: tuple[int, ...], found: tuple[int, ...], graft: Graft) -> RequestError:
    architecture = graft.card.get("base", {}).get("class")
    return RequestError(
        f"a model whose tensor {tensor!r} has shape {found}",
        expected=f"shape {made_for}, as the graft was made for",
        do="load the base the graft was made on" + (f", as {architecture}" if architecture else ""),
    )
