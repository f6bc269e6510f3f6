"""The graft: a small change to a known base, as a value."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn

from neurograft.core.choose import check_options
from neurograft.core.errors import RequestError, one_of
from neurograft.core.grafts import store
from neurograft.core.grafts.contents import Contents
from neurograft.core.grafts.coordinates import coordinates, everything, holders
from neurograft.core.grafts.delta import Delta, New, Slice
from neurograft.core.grafts.fits import named
from neurograft.core.grafts.operation import Operation
from neurograft.core.grafts.origin import describe, versions
from neurograft.core.grafts.replay import Home, Replay
from neurograft.core.grafts.stack import Stack
from neurograft.core.grafts.sums import refuse_strangers, summed
from neurograft.core.region import as_matrix
from neurograft.core.resolve import resolve
from neurograft.core.untie import Apart, Untie

EXPORTS = ("lora", "supertuning", "merged", "patch")


@dataclass(frozen=True, eq=False)
class Graft(Contents):
    """Changes in the coordinates of a checkpoint, the digests of the tensors they touch, and a card.

    Its fields, `deltas`, `operations`, `base`, `card`, `strength`, `originals` and `home`, stand in `Contents`.

    Example:
        >>> import torch
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

    def __repr__(self) -> str:
        """Say how large the change is and of what model; the numbers themselves would fill pages."""
        base = self.card.get("base")
        of = f" of {base['name']}" if isinstance(base, Mapping) and base.get("name") else ""
        more = f", {len(self.operations)} operations" if self.operations else ""
        scaled = "" if self.strength == 1.0 else f", strength {self.strength:g}"
        return f"<Graft: {self.numel:,} numbers in {len(self.deltas)} tensors{of}{more}{scaled}>"

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
        made = replace(self, strength=self.strength * s)
        if "identity" in vars(self):  # it is the same at any strength, and costs a hash of every number
            vars(made)["identity"] = self.identity
        return made

    def __add__(self, other: Graft) -> Graft:
        """Return one graft that does what both do.

        Raises:
            RequestError: they belong to different bases, or overlap where the base's numbers are not known
                (`bind` them to the base first) or have no sum.
        """
        refuse_strangers(self, other)
        deltas, originals = summed(self, other)
        card = {**self.card, "sum_of": [self.identity, other.identity]}
        if asked := [r for g in (self, other) for r in g.card.get("requests", ())]:
            card["requests"] = asked  # later edits protect the keys of all of them
        operations = (*self.scaled_operations(), *other.scaled_operations())
        base, home = {**self.base, **other.base}, self.home or other.home
        return Graft(deltas, operations, base, card, 1.0, originals, home)

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
        return store.save(self.materialize() if portable else self, Path(folder))

    save_pretrained = save

    @staticmethod
    def load(folder: str | Path, *, revision: str | None = None) -> Graft:
        """Read a graft from a folder or a Hub repository; `from_pretrained` is the same.

        Raises:
            RequestError: nothing is there, a file is truncated or was changed, or the format is newer.
        """
        found = store.load(folder, revision=revision)
        return Graft(found.deltas, found.operations, found.base, found.card, found.strength)

    from_pretrained = load

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the graft's folder to the Hub and return its address."""
        return store.push(self, repo_id, private=private, token=token)

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
