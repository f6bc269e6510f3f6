"""What is audited, in one shape: a graft, several grafts, or a tuned model of the same base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from neurograft.core.errors import RequestError
from neurograft.core.grafts.coordinates import coordinates, everything
from neurograft.core.grafts.delta import New
from neurograft.core.grafts.depth import same_depth
from neurograft.core.grafts.graft import Graft
from neurograft.core.grafts.stack import Stack
from neurograft.core.region import Region, as_matrix, union
from neurograft.core.seeds import generator
from neurograft.core.units import Parameters

Read = TypeVar("Read")


@dataclass(frozen=True)
class Touched:
    """The touched numbers of one parameter.

    Args:
        region: which they are, in the module's coordinates.
        before: in the base, shaped `region.values_shape`.
        after: under the change, as rounded to the parameter's dtype.
    """

    region: Region
    before: Tensor
    after: Tensor

    @property
    def delta(self) -> Tensor:
        """The difference, float32, or float64 for a float64 parameter."""
        work = torch.float64 if self.before.dtype == torch.float64 else torch.float32
        return self.after.to("cpu", work) - self.before.to("cpu", work)


@dataclass
class Change:
    """A change to a model, ready to be switched on and off many times.

    The first switch goes through `Graft.on`, which verifies base and digests; the numbers it wrote are kept, and
    later switches copy them in and out, so that a hundred switches cost a hundred copies of the touched numbers.

    Args:
        model: the base, with whatever lies on it already.
        grafts: what is put on.
        tuned: or another model of the same architecture.
        weights: parameter -> its touched numbers.
        new: parameters the base lacks.
        operations: descriptions of payloads that are no weight change.
    """

    model: nn.Module
    grafts: tuple[Graft, ...] = ()
    tuned: nn.Module | None = None
    weights: dict[str, Touched] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)
    split = False

    @property
    def empty(self) -> bool:
        """Whether it cannot change anything."""
        moved = any(not torch.equal(t.before, t.after) for t in self.weights.values())
        return not (moved or self.new or self.operations or (self.tuned is not None and not self.weights))

    @contextmanager
    def on(self) -> Iterator[nn.Module]:
        """Switch the change on and give the model to run."""
        with ExitStack() as undo:
            if self.tuned is not None:
                yield self.tuned
                return
            if self.new or self.operations:
                for graft in self.grafts:
                    undo.enter_context(graft.on(self.model))
            else:
                undo.enter_context(written(self.model, {n: (t.region, t.after) for n, t in self.weights.items()}))
            yield self.model

    def both(self, read: Callable[[nn.Module], Read]) -> tuple[Read, Read]:
        """Return what is read from the base and from the changed model, evaluating and without gradients."""
        with evaluating(self.model, self.tuned):
            before = read(self.model)
            with self.on() as changed:
                return before, read(changed)

    @contextmanager
    def without(self, names: Iterable[str]) -> Iterator[nn.Module]:
        """Switch the change on, but for these parameters, which stay as in the base."""
        back = {n: (self.weights[n].region, self.weights[n].before) for n in names}
        with self.on() as changed, written(changed, back):
            yield changed


@dataclass
class Null:
    """A change of the same size that knows nothing: random numbers in as many random places.

    In every touched parameter as many random rows, columns, blocks or entries as the change touches get
    Gaussian noise of the same Frobenius norm. New parameters and operations have no such twin and are left out.

    Args:
        change: whose size is copied.
        seed: names the draw.
    """

    change: Change
    seed: int
    split = False

    def weights(self) -> dict[str, tuple[Region, Tensor]]:
        """Return the new numbers by parameter, the same at every call."""
        found, parameters = {}, Parameters.of(self.change.model).by_name
        for name, touched in self.change.weights.items():
            rng, region = generator(self.seed, "null", name), touched.region
            if region.layout != "all":
                ids = torch.randperm(region.total, generator=rng)[: len(region.ids)]
                region = Region.of(region.shape, region.layout, ids, matrix=region.matrix, block=region.block)
            noise = torch.randn(region.values_shape, generator=rng)
            noise *= touched.delta.norm() / noise.norm().clamp(min=1e-30)
            base = region.read(parameters[name]).cpu()
            found[name] = (region, base + noise.to(torch.promote_types(base.dtype, torch.float32)))
        return found

    @contextmanager
    def on(self) -> Iterator[nn.Module]:
        """Switch the random change on and give the model to run."""
        with written(self.change.model, self.weights()):
            yield self.change.model


@dataclass
class Rerun:
    """No change at all: the base once more, with every batch cut in two where its tensors allow it."""

    model: nn.Module
    split = True

    @contextmanager
    def on(self) -> Iterator[nn.Module]:
        """Give the base."""
        yield self.model


def as_change(model: nn.Module, change: object) -> Change:
    """Return a graft, grafts or a tuned model as a `Change`; verified, and the model left as it was found.

    Raises:
        RequestError: it is nothing of the kind, or belongs to another base.
    """
    if isinstance(change, Change):
        return change
    if isinstance(change, nn.Module):
        return _of_tuned(model, change)
    if isinstance(change, Graft):
        return _of_grafts(model, (change,))
    if isinstance(change, Sequence) and all(isinstance(c, Graft) for c in change):
        return _of_grafts(model, tuple(change))
    raise RequestError(
        f"a change of type {type(change).__name__}",
        expected="a Graft, a list of Grafts, or a tuned model of the same base",
        do="load a graft folder with Graft.load, or give the tuned model",
    )


def _of_grafts(model: nn.Module, grafts: tuple[Graft, ...]) -> Change:
    found = Change(model, grafts, operations=[o.describe() for g in grafts for o in g.operations])
    regions, after = {}, {}
    with ExitStack() as undo:
        for graft in grafts:
            undo.enter_context(graft.on(model))
        stack, where = Stack.of(model), coordinates(model)
        parameters = Parameters.of(model).by_name
        for graft in grafts:
            for tensor, delta in graft.deltas.items():
                if isinstance(delta, New):
                    shape = tuple(where.read(tensor).shape)
                    found.new += [p.name for p in where.to_module(tensor, everything(shape, as_matrix(shape)))]
        for name, ledger in stack.ledgers.items():
            mine = [ledger.members[g.identity].region for g in grafts if g.identity in ledger.members]
            if mine and name not in found.new:
                regions[name] = union(mine)
                after[name] = regions[name].read(parameters[name]).cpu()
    parameters = Parameters.of(model).by_name
    for name, region in regions.items():
        found.weights[name] = Touched(region, region.read(parameters[name]).cpu(), after[name])
    return found


def _of_tuned(model: nn.Module, tuned: nn.Module) -> Change:
    found = Change(model, tuned=tuned)
    mine, theirs = Parameters.of(model).by_name, Parameters.of(tuned).by_name
    if not hasattr(tuned, "peft_config"):  # an adapter's model keeps the base inside, under other names
        _check_tuned(model, tuned)
    for name, parameter in theirs.items():
        if name not in mine or mine[name].shape != parameter.shape:
            found.new.append(name)
        elif not torch.equal(mine[name].to(parameter.device), parameter):
            shape = tuple(parameter.shape)
            found.weights[name] = Touched(
                everything(shape, as_matrix(shape)), mine[name].detach(), parameter.detach().to(mine[name].dtype)
            )
    return found


def _check_tuned(model: nn.Module, tuned: nn.Module) -> None:
    """Raise unless a model can have been tuned from the base: its blocks and shapes, but for rows added at the end."""
    mine, theirs = dict(model.named_parameters()), dict(tuned.named_parameters(remove_duplicate=False))
    shared = len(mine.keys() & theirs.keys())
    if 2 * shared < len(mine):  # a head may have the name that another family gives it
        raise RequestError(
            f"a {type(tuned).__name__} that has {shared} of the {len(mine)} parameters of the base, "
            f"a {type(model).__name__}",
            expected="a tuned model of the same base",
            do="give the base that this model was tuned from",
        )
    same_depth(mine, theirs)
    for name in (name for name in mine if name in theirs):
        before, after = mine[name].shape, theirs[name].shape
        longer = len(before) == len(after) and before[1:] == after[1:] and after[:1] > before[:1]
        if before != after and not longer:
            raise RequestError(
                f"a tuned model whose {name!r} has shape {tuple(after)}, where the base's has {tuple(before)}",
                expected="the base's shapes, or rows added at the end",
                do="give the base that this model was tuned from",
            )


@contextmanager
def written(model: nn.Module, values: Mapping[str, tuple[Region, Tensor]]) -> Iterator[None]:
    """Write numbers into parameters for the length of a `with` block and put the old ones back bit for bit."""
    parameters = Parameters.of(model).by_name
    old = {name: region.read(parameters[name]) for name, (region, _) in values.items()}
    try:
        for name, (region, new) in values.items():
            region.write_(parameters[name], new)
        yield
    finally:
        for name, (region, _) in values.items():
            region.write_(parameters[name], old[name])


@contextmanager
def evaluating(*models: nn.Module | None) -> Iterator[None]:
    """Run models in evaluation mode without gradients, every module's own mode put back afterwards."""
    modes = [(m, m.training) for model in models if model is not None for m in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
