"""The graft: a small change to a known base, as a value."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.choose import check_options
from neurograft.core.errors import RequestError, one_of
from neurograft.core.fingerprint import digest
from neurograft.core.grafts.coordinates import coordinates, everything, holders
from neurograft.core.grafts.delta import Delta, LowRank, New, Shut, Slice, merged
from neurograft.core.grafts.fits import named
from neurograft.core.grafts.operation import Operation
from neurograft.core.grafts.replay import Home, Replay
from neurograft.core.grafts.stack import Stack
from neurograft.core.region import as_matrix, positions, union
from neurograft.core.resolve import resolve
from neurograft.core.untie import Apart, Untie

EXPORTS = ("lora", "supertuning", "merged", "patch")


@dataclass(frozen=True)
class Graft:
    """Changes in the coordinates of a checkpoint, the digests of the tensors they touch, and a card.

    Args:
        deltas: checkpoint tensor -> its change.
        operations: payloads that are no weight change.
        base: checkpoint tensor -> digest of it in the base; covers every delta but the `New` ones.
        card: plain data: base, recipe, selection, data digests, seeds, versions, citations, audit.
        strength: s in original + s * (value - original).
        originals: the base's numbers under each slice, if known; never saved.
        home: the model a log of seeds was made on, held weakly; never saved.

    Example:
        >>> from neurograft.core.region import Region
        >>> net = nn.Linear(2, 2, bias=False)
        >>> before = net.weight.detach().clone()
        >>> row = Slice(Region.of((2, 2), "rows", [0]), torch.zeros(1, 2))
        >>> graft = Graft.made(net, {"weight": row})
        >>> with graft.on(net):
        ...     net.weight[0].tolist()
        [0.0, 0.0]
        >>> bool((net.weight == before).all())
        True
    """

    deltas: Mapping[str, Delta] = field(default_factory=dict)
    operations: tuple[Operation, ...] = ()
    base: Mapping[str, str] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)
    strength: float = 1.0
    originals: Mapping[str, Tensor] = field(default_factory=dict)
    home: Home | None = field(default=None, repr=False, compare=False)

    @staticmethod
    def made(
        model: nn.Module,
        deltas: Mapping[str, Delta],
        *,
        operations: tuple[Operation, ...] = (),
        card: Mapping[str, Any] | None = None,
        stack: Stack | None = None,
    ) -> Graft:
        """Make a graft from changes in checkpoint coordinates and the base they belong to.

        `stack` remembers digests between calls on one unchanged base.
        """
        where, stack = coordinates(model), stack or Stack.of(model)
        known = {n: d for n, d in deltas.items() if not isinstance(d, New)}
        base = {name: stack.digest(name, model, where) for name in known}
        apart = [n for n in Apart.of(model).held if n not in {m for o in operations for m in getattr(o, "names", ())}]
        if apart:
            operations = (*operations, Untie(apart))
        slices, weights = {n: d for n, d in known.items() if isinstance(d, Slice)}, holders(model)
        originals = {n: stack.numbers(n, d.region, model, where, weights) for n, d in slices.items()}
        known_as = {name: where.modules(name) for name in known}
        known_as = {name: modules for name, modules in known_as.items() if modules != [name]}
        facts = {"base": describe(model), "versions": versions(), "modules": known_as, **(card or {})}
        home = Home(model) if any(isinstance(d, Replay) for d in deltas.values()) else None
        return Graft(deltas, operations, base, facts, 1.0, originals, home)

    @cached_property
    def identity(self) -> str:
        """Digest of what the graft changes, whatever its strength and card."""
        deltas = {n: {"shape": list(d.shape), **d.tensors()} for n, d in self.deltas.items()}
        return digest(deltas, dict(self.base), [digest(o.meta(), o.tensors()) for o in self.operations])

    def __repr__(self) -> str:
        """Say how large the change is and of what model; the numbers themselves would fill pages."""
        base = self.card.get("base")
        of = f" of {base['name']}" if isinstance(base, Mapping) and base.get("name") else ""
        more = f", {len(self.operations)} operations" if self.operations else ""
        scaled = "" if self.strength == 1.0 else f", strength {self.strength:g}"
        return f"<Graft: {self.numel:,} numbers in {len(self.deltas)} tensors{of}{more}{scaled}>"

    @property
    def numel(self) -> int:
        """How many numbers the graft holds."""
        return sum(d.numel for d in self.deltas.values()) + sum(
            t.numel() for o in self.operations for t in o.tensors().values()
        )

    @property
    def empty(self) -> bool:
        """Whether it changes nothing at all."""
        return not self.deltas and not self.operations

    def apply(self, model: nn.Module) -> nn.Module:
        """Put the graft on the model, in place, and return the model; verified before anything is written.

        Raises:
            RequestError: another base, a second apply, an overlap that has no sum, a tensor the model lacks.
        """
        Stack.of(model).add(model, self)
        return model

    def remove(self, model: nn.Module) -> nn.Module:
        """Take the graft off, in any order, and return the model.

        Raises:
            RequestError: it is not on this model.
        """
        Stack.of(model).drop(model, self)
        return model

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[nn.Module]:
        """Apply the graft for the length of a `with` block."""
        self.apply(model)
        try:
            yield model
        finally:
            self.remove(model)

    def scale(self, s: float) -> Graft:
        """Return the graft at s times its strength.

        Raises:
            RequestError: s is no finite number, or the graft holds something that has no strength (a new head, a
                pinned or replaced activation).
        """
        if not isinstance(s, Real) or not math.isfinite(s):
            raise RequestError(f"a strength of {s!r}", expected="a finite number", do="1 is the graft as it is")
        fixed = [n for n, d in self.deltas.items() if isinstance(d, New)]
        fixed += [o.describe() for o in self.operations if not o.scalable]
        if fixed and s != 1.0:
            raise RequestError(
                f"a strength of {s} for {', '.join(fixed[:3])}",
                expected="changes relative to the base",
                do="scale only grafts of weight changes, or drop these parts first",
            )
        return replace(self, strength=self.strength * s)

    def __add__(self, other: Graft) -> Graft:
        """Return one graft that does what both do.

        Raises:
            RequestError: they belong to different bases, or overlap where the base's numbers are not known
                (`bind` them to the base first) or have no sum.
        """
        clash = [n for n in self.base.keys() & other.base.keys() if self.base[n] != other.base[n]]
        if clash:
            raise RequestError(
                f"grafts of different bases (tensor {clash[0]!r})",
                expected="grafts of one base",
                do="make both on the same base and revision",
            )
        for mine in self.operations:
            for theirs in other.operations:
                if mine.clashes(theirs):
                    raise RequestError(
                        f"the sum of {mine.describe()} and {theirs.describe()}",
                        expected="operations on different activations",
                        do="keep one of them",
                    )
        deltas: dict[str, Delta] = {}
        originals: dict[str, Tensor] = {}
        for name in self.deltas.keys() | other.deltas.keys():
            both = [g for g in (self, other) if name in g.deltas]
            deltas[name], original = _sum(name, both)
            if original is not None:
                originals[name] = original
        card = {**self.card, "sum_of": [self.identity, other.identity]}
        if asked := [r for g in (self, other) for r in g.card.get("requests", ())]:
            card["requests"] = asked  # later edits protect the keys of all of them
        operations = (*self._scaled_operations(), *other._scaled_operations())
        base, home = {**self.base, **other.base}, self.home or other.home
        return Graft(dict(sorted(deltas.items())), operations, base, card, 1.0, originals, home)

    def _scaled_operations(self) -> tuple[Operation, ...]:
        return tuple(o.scaled(self.strength) for o in self.operations)

    def bind(self, model: nn.Module) -> Graft:
        """Return the graft with the base's numbers under its changes, read from the model; sums need them."""
        where, stack, weights = coordinates(model), Stack.of(model), holders(model)
        found = {}
        for name, delta in self.deltas.items():
            if isinstance(delta, New):
                continue
            stack.check(name, self, model, where)
            whole = everything(delta.shape, as_matrix(delta.shape))
            region = delta.region if isinstance(delta, Slice) else whole
            found[name] = stack.numbers(named(name, self, where), region, model, where, weights)
        return replace(self, originals=found) if not self.logged else self.materialize(model)

    @property
    def logged(self) -> bool:
        """Whether some of it is a log of seeds, which replays only where it was made."""
        return any(isinstance(d, Replay) for d in self.deltas.values())

    def materialize(self, model: nn.Module | None = None) -> Graft:
        """Return the same change with the numbers that its logs of seeds replay to: the form that works anywhere.

        Args:
            model: the base; without it the model the log was made on, or the base named on the card.

        Raises:
            RequestError: another torch version or kind of device than the log's, another base, or none at hand.
        """
        if not self.logged:
            return self
        if model is not None or self.home is None:
            return self._replayed(model)
        with self.home.base() as base:
            return self._replayed(base)

    def _replayed(self, model: nn.Module | None) -> Graft:
        base: nn.Module = model or resolve("neurograft.export._changes.base_model")(self, None)
        where, stack = coordinates(base), Stack.of(base)
        deltas, originals = dict(self.deltas), dict(self.originals)
        for name, delta in self.deltas.items():
            if isinstance(delta, Replay):
                stack.check(name, self, base, where)
                originals[name] = stack.numbers(named(name, self, where), delta.region, base, where)
                deltas[name] = delta.replayed(originals[name])
        return replace(self, deltas=deltas, originals=originals, home=None)

    def save(self, folder: str | Path, *, portable: bool = True) -> Path:
        """Write `graft.json` and `graft.safetensors`, atomically; `save_pretrained` is the same.

        An older graft in the folder is replaced; other files there stay.

        Args:
            folder: where to write.
            portable: write the numbers that logs of seeds replay to; False writes the logs, a few bytes a step,
                which replay at the same torch version and kind of device only.

        Raises:
            RequestError: the path is a file, or a log has no base at hand to be replayed on.
        """
        from neurograft.core.grafts.store import save

        return save(self.materialize() if portable else self, Path(folder))

    save_pretrained = save

    @staticmethod
    def load(folder: str | Path, *, revision: str | None = None) -> Graft:
        """Read a graft from a folder or a Hub repository; `from_pretrained` is the same.

        Raises:
            RequestError: nothing is there, a file is truncated or was changed, or the format is newer.
        """
        from neurograft.core.grafts.store import load

        return load(folder, revision=revision)

    from_pretrained = load

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the graft's folder to the Hub and return its address."""
        from neurograft.core.grafts.store import push

        return push(self, repo_id, private=private, token=token)

    def export(self, folder: str | Path, *, to: str, model: nn.Module | None = None, **options: Any) -> Path:
        """Write the graft in another tool's format: "lora", "supertuning", "merged" or "patch".

        Args:
            folder: where to write.
            to: the format.
            model: the base; without it the base named on the card is loaded.
            **options: what that format offers.

        Raises:
            RequestError: an unknown format or option, or a change that the format cannot hold.
        """
        one_of(to, EXPORTS, what="export format")
        form = resolve(f"neurograft.export.{to}")
        check_options(form, options, f"the export to {to!r}")
        whole = self.materialize(model)
        written: Path = form(whole, Path(folder), model=model, **options)
        return written


def _sum(name: str, grafts: list[Graft]) -> tuple[Delta, Tensor | None]:
    """Return one delta for a tensor that one or two grafts change, and the base's numbers under it if known."""
    first = grafts[0]
    if len(grafts) == 1 and first.strength == 1.0:
        return first.deltas[name], first.originals.get(name)
    lows = [g.deltas[name] for g in grafts]
    if all(isinstance(d, LowRank) for d in lows):
        return _stacked([(d, g.strength) for d, g in zip(lows, grafts) if isinstance(d, LowRank)]), None
    slices = []
    for graft in grafts:
        delta = graft.deltas[name]
        if isinstance(delta, New):
            raise RequestError(
                f"two grafts that both bring {name!r}",
                expected="one of them",
                do="keep only one graft with this new parameter",
            )
        if name not in graft.originals and not isinstance(delta, Slice):
            raise _unbound(name)
        whole = delta if isinstance(delta, Slice) else delta.on(graft.originals[name].reshape(delta.shape))
        slices.append((whole, graft.strength))
    overlap = len(slices) == 2 and union(s.region for s, _ in slices).numel < sum(s.region.numel for s, _ in slices)
    shut = all(isinstance(change, Shut) for change, _ in slices)
    if (shut or not overlap) and all(s == 1.0 for _, s in slices):
        return merged(slices, None), _originals(name, grafts, slices)
    original = _originals(name, grafts, slices)
    if original is None:
        raise _unbound(name)
    ordered = [s for _, s in sorted(zip([g.identity for g in grafts], slices), key=lambda pair: pair[0])]
    return merged(ordered, original), original


def _stacked(changes: list[tuple[LowRank, float]]) -> LowRank:
    """Return low-rank changes of one tensor as one, with the ranks side by side."""
    first = changes[0][0]
    A = torch.cat([low.A if low.transposed == first.transposed else low.B.t() for low, _ in changes])
    B = [low.B if low.transposed == first.transposed else low.A.t() for low, _ in changes]
    scaled = [b * (low.scale * s) for b, (low, s) in zip(B, changes)]
    return LowRank(first.shape, A, torch.cat(scaled, 1), 1.0, first.transposed)


def _originals(name: str, grafts: list[Graft], slices: list[tuple[Slice, float]]) -> Tensor | None:
    if any(name not in g.originals for g in grafts):
        return None
    region = union(s.region for s, _ in slices)
    known = [(Slice(s.region, g.originals[name]), 1.0) for (s, _), g in zip(slices, grafts)]
    # Both grafts read the same base, so wherever they overlap either one's original will do.
    found = torch.zeros(region.values_shape, dtype=grafts[0].originals[name].dtype).reshape(-1)
    for part, _ in known:
        found[positions(part.region, region)] = part.values.reshape(-1).cpu()
    return found.reshape(region.values_shape)


def _unbound(name: str) -> RequestError:
    return RequestError(
        f"a sum or scale that needs the base's numbers of {name!r}",
        expected="grafts that know them",
        do="bind them first: graft.bind(model)",
    )


def describe(model: nn.Module) -> dict[str, Any]:
    """Return what a card says of a base: class, name, revision, dtype."""
    config = getattr(model, "config", None)
    name = getattr(config, "name_or_path", None) or getattr(config, "_name_or_path", None) or None
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    return {
        "class": type(model).__name__,
        "name": name,
        "revision": getattr(config, "_commit_hash", None),
        "dtype": str(first.dtype).removeprefix("torch.") if first is not None else None,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def versions() -> dict[str, str]:
    """Return the versions of what a graft is made with, for its card."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("neurograft", "torch", "transformers", "peft", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
