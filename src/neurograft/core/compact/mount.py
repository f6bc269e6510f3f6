"""Mounts: a model with something trainable in it, until it is taken out again."""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.compact.forward import ForwardOnly
from neurograft.core.compact.values import check_free, claim, disclaim
from neurograft.core.errors import RequestError, near
from neurograft.core.fingerprint import tensor_digest
from neurograft.core.grafts.combined import merged
from neurograft.core.grafts.coordinates import coordinates
from neurograft.core.grafts.delta import Delta, New, Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.grafts.operation import Operation
from neurograft.core.grafts.replay import Home, Log, Replay
from neurograft.core.grafts.stack import Stack
from neurograft.core.numerics.noise import Stream
from neurograft.core.region import Region, as_matrix, region_of, union
from neurograft.core.selection import Selection
from neurograft.core.step import Trained
from neurograft.core.tokens import beside
from neurograft.core.units import Parameters
from neurograft.core.untie import Untie, Untied


class _Whole(ABCMeta):
    """Makes a mount, or leaves the model as it was: a mount freezes it before it knows whether all can be had."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made: Any = object.__new__(cls)  # type: ignore[arg-type]
        try:
            made.__init__(*args, **kwargs)
        except BaseException:  # out of memory or an interrupt, too
            if made.attached:
                made.undo()
            raise
        return made


class Mount(metaclass=_Whole):
    """What `attach` gives: the trainable tensors, the graft they make, and the way back.

    Everything else in the model is frozen for the length of the mount; `detach` puts the base back bit for bit.

    Args:
        model: the model.
        new: parameters the base's checkpoint lacks (name patterns), trained whole; or name -> number of rows
            the base has, for tokens appended to an embedding.
        within: the mount this one is a part of, or None.

    Raises:
        RunError: the model is being trained by another attachment.
    """

    attached = False
    appends = False  # whether the adapter can train rows appended to a parameter

    def __init__(
        self, model: nn.Module, *, new: Iterable[str] | Mapping[str, int] = (), within: Mount | None = None
    ) -> None:
        if isinstance(new, Mapping) and new and not self.appends:
            raise RequestError(
                f"new={dict(new)}, rows appended to a parameter, for {type(self).__name__}",
                expected="whole new parameters, by name or pattern",
                do="use adapter='slice' for new tokens",
            )
        check_free(model, within)  # before anything is frozen: the other attachment's tensors would be too
        self.model = model
        self.declared = True  # False if nobody said what to train, so that a part may stay unreached
        self.ties: Untied | None = None
        self.driver: ForwardOnly | None = None  # a loop's gradient-free optimizer, whose log the graft may be
        self.log: Log | None = None
        self.where, self.stack = coordinates(model), Stack.of(model)
        self.found = Parameters.of(model)
        self.flags = {n: p.requires_grad for n, p in self.found.by_name.items()}
        self.appended = dict(new) if isinstance(new, Mapping) else {}
        self.new = self._match(new)
        self.longer = self._longer()
        self.new_originals = {n: p.detach().clone() for n, p in self.whole().items()}
        self.ended_new: dict[str, Tensor] = {}  # what whole new parameters held when they were taken out
        self.attached = True
        for name, parameter in self.found.by_name.items():
            parameter.requires_grad_(name in self.new and name not in self.appended)
        if within is None:
            claim(model, self)

    @abstractmethod
    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trainable tensors of the adapter itself, by name."""

    @abstractmethod
    def deltas(self) -> dict[str, Slice] | dict[str, Delta]:
        """Return the adapter's changes by parameter, in module coordinates."""

    @abstractmethod
    def unmount(self) -> None:
        """Take the adapter out and put the touched numbers back."""

    def operations(self) -> tuple[Operation, ...]:
        """Return what the adapter changes or trains that is no change of a weight, as it is now."""
        return ()

    def write(self) -> None:
        """Bring the weights up to date; needed only after optimizers outside of `torch.optim`."""

    @contextmanager
    def shifted(self, terms: Sequence[tuple[int, float]]) -> Iterator[set[str]]:
        """Add the sum of scale * z(seed) to the driver's awake tensors for a moment; yields the names it reached."""
        assert self.driver is not None
        awake = self.driver.awake()
        held = {n: p.detach().clone() for n, p in awake.items()}
        try:
            for name, tensor in awake.items():
                Stream(name, tuple(tensor.shape), self.driver.grain).advance_(tensor.detach().view(-1), terms)
            self.write()
            yield set(awake)
        finally:
            for name, tensor in awake.items():
                tensor.detach().copy_(held[name])
            self.write()

    def mark(self) -> Mapping[str, Tensor]:
        """Return the trainable tensors as they are now, to see later what has moved."""
        return {n: p.detach().clone() for n, p in self.named_parameters().items()}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return every trainable tensor by name: the adapter's and the new parameters."""
        return {**self.trained(), **self.fresh()}

    def whole(self) -> dict[str, nn.Parameter]:
        """Return the model's parameters that are trained whole because the base lacks them, by name."""
        return {n: self.found.by_name[n] for n in self.new if n not in self.appended}

    def fresh(self) -> dict[str, nn.Parameter]:
        """Return what an optimizer is given for them: themselves, or float32 values that they follow."""
        return self.whole()

    def parameters(self) -> list[nn.Parameter]:
        """Return every trainable tensor, for an optimizer."""
        return list(self.named_parameters().values())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the trainable tensors, for a checkpoint of the training."""
        return {n: p.detach().clone() for n, p in self.named_parameters().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a checkpoint's tensors.

        Raises:
            RequestError: names or shapes differ.
        """
        mine = self.named_parameters()
        if state.keys() != mine.keys():
            odd = sorted(state.keys() ^ mine.keys())
            raise RequestError(
                f"a checkpoint that differs in {odd[:4]}",
                expected="the tensors of this attachment",
                do="attach the same selection with the same adapter before resuming",
            )
        for name, value in state.items():
            if value.shape != mine[name].shape:
                raise RequestError(
                    f"{name} of shape {tuple(value.shape)}",
                    expected=str(tuple(mine[name].shape)),
                    do="resume with the selection the checkpoint was made with",
                )
            mine[name].data.copy_(value)
        self.write()

    def graft(self, *, card: Mapping[str, Any] | None = None) -> Graft:
        """Return what has been trained so far as a graft, inside the block or after it."""
        pieces: dict[str, list[Slice]] = {}
        found: dict[str, Delta] = {}
        for name, delta in self.deltas().items():
            if isinstance(delta, Slice) and self.replayable(name, delta.region):
                delta = self.replay(name, delta.region, delta.values.dtype, tensor_digest(delta.values))
            if isinstance(delta, Replay):
                (piece,) = self.where.to_checkpoint(name, delta.region)
                found[piece.name] = replace(delta, region=piece.region)
                continue
            if not isinstance(delta, Slice):
                (piece,) = self.where.to_checkpoint(name, _all(self.found.by_name[name]))
                found[piece.name] = delta
                continue
            for piece in self.where.to_checkpoint(name, delta.region):
                pieces.setdefault(piece.name, []).append(delta.at(piece))
        for name, slices in pieces.items():
            found[name] = slices[0] if len(slices) == 1 else merged([(s, 1.0) for s in slices], None)
        for name, rows in self.longer.items():
            held = self.found.by_name[name].detach()
            (piece,) = self.where.to_checkpoint(name, _all(held))
            wide = torch.promote_types(held.dtype, torch.float32)
            found[piece.name] = New(held[rows:].to("cpu", wide, copy=True), rows)
        for name in self.new:
            (piece,) = self.where.to_checkpoint(name, _all(self.found.by_name[name]))
            if name in self.appended:
                grown = found.pop(piece.name)
                assert isinstance(grown, Slice)
                found[piece.name] = New(grown.values, self.appended[name])
            else:
                held = (self.fresh() if self.attached else self.ended_new)[name].detach().cpu()
                work = torch.float64 if held.dtype == torch.float64 else torch.float32
                found[piece.name] = New(held.to(work, copy=True))
        resting = self.rest()
        try:
            apart = () if self.ties is None else (Untie(self.ties.names),)
            deltas, operations = dict(sorted(found.items())), (*apart, *self.operations())
            made = Graft.made(self.model, deltas, operations=operations, card=card, stack=self.stack)
            return replace(made, home=Home(self.model, self.rest)) if made.logged else made
        finally:
            resting()

    def held(self) -> dict[str, Trained]:
        """Return what is trained of each parameter, for penalties; nothing where the change is of another shape."""
        return {}

    def replayable(self, name: str, region: Region) -> bool:
        """Say whether the driver's log, replayed on the base's tensor in the checkpoint, gives a tensor's values."""
        if self.driver is None or name not in self.driver.track or name in self.stack.ledgers or name in self.new:
            return False
        weight = self.found.by_name.get(name)
        if weight is None or not weight.is_floating_point():
            return False
        first, *more = self.where.to_checkpoint(name, region)
        return not more and first.order is None and first.region.values_shape == region.values_shape

    def replay(self, name: str, region: Region, held: torch.dtype, result: str) -> Replay:
        """Return a tensor's change as the driver's log."""
        assert self.driver is not None
        if self.log is None or len(self.log) != len(self.driver.seeds):
            self.log = self.driver.log()
        return Replay(region, name, held, self.log, self.driver.track[name], result)

    def rest(self) -> Any:
        """Put the base's numbers back for a moment; returns the function that ends it."""
        return lambda: None

    def detach(self) -> None:
        """Take everything out again; the model is then bit for bit what it was."""
        if not self.attached:
            return
        self.unmount()
        with torch.no_grad():
            self.ended_new = {n: p.detach().clone() for n, p in self.fresh().items()}
            for name, value in self.new_originals.items():
                self.found.by_name[name].copy_(value)
        self.release()
        if self.ties is not None:
            self.ties.remove()
        self.attached = False

    def undo(self) -> None:
        """Take back what an attachment did that failed half way; here, that it froze the model."""
        self.release()
        self.attached = False

    def release(self) -> None:
        """Let the parameters require gradients again as they did."""
        for name, flag in self.flags.items():
            parameter = self.found.by_name[name]
            parameter.requires_grad_(flag)
            parameter.grad = None
        disclaim(self.model, self)

    def __enter__(self) -> Mount:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _longer(self) -> dict[str, int]:
        """Return what else has grown with the appended rows, a head or its bias; it stays as it is and is shipped.

        Raises:
            RequestError: a buffer has grown by other numbers than the zeros it gets wherever the graft is put on.
        """
        found: dict[str, int] = {}
        for name, rows in self.appended.items():
            for other, tensor in beside(self.model, name).items():
                if isinstance(tensor, nn.Parameter):
                    found |= {other: rows} if other not in self.appended else {}
                elif bool(tensor[..., rows:].any()):
                    raise RequestError(
                        f"the buffer {other} with other numbers than 0 for the new tokens of {name}",
                        expected="zeros, as resize_token_embeddings leaves them",
                        do=f"set {other}[..., {rows}:] to 0",
                    )
        return found

    def _match(self, new: Iterable[str] | Mapping[str, int]) -> list[str]:
        matched: list[str] = []
        for pattern in new:
            hits = [n for n in self.found.by_name if fnmatchcase(n, pattern) or fnmatchcase(n, pattern + ".*")]
            if not hits:
                raise RequestError(
                    f"new={pattern!r}, which is no parameter here",
                    expected="names or patterns",
                    do=near(pattern, self.found.by_name),
                )
            matched += [h for h in hits if h not in matched]
        return matched


def _all(parameter: Tensor) -> Region:
    shape = tuple(parameter.shape)
    return Region(shape, as_matrix(shape), "all", torch.empty(0, dtype=torch.int64))


def matrix_of(model: nn.Module, name: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return how a parameter is read as matrices: a 3-D one is a bank unless its owner is a convolution."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return as_matrix(shape, bank=not isinstance(owner, nn.modules.conv._ConvNd))


def regions_of(
    model: nn.Module, selection: Selection, *, protect: Selection | None = None, tied: str = "refuse"
) -> dict[str, Region]:
    """Return which entries of which parameters a selection means, less the protected ones, in the model's order.

    The order is the optimizer's too, whose state a resumed training finds by place.

    Raises:
        RequestError: nothing remains, a parameter is not in this model, or it is tied and `tied` is "refuse".
    """
    found = Parameters.of(model)
    regions = _gathered(model, selection, found)
    for name in regions:
        if found.tied(name) and tied == "refuse":
            raise RequestError(
                f"a selection in {name}, which is tied with {', '.join(found.tied(name))}",
                expected="units of an untied parameter",
                do="pass tied='both' to change both uses, or tied='untie' to change this one alone",
            )
    if protect is not None:
        shielded = _gathered(model, protect, found)
        regions = {n: minus(r, shielded[n]) if n in shielded else r for n, r in regions.items()}
        regions = {n: r for n, r in regions.items() if r.numel}
    if not regions:
        raise RequestError(
            "a selection that touches no parameter" + (" outside of the protected one" if protect is not None else ""),
            expected="at least one unit that owns weights",
            do="select more units, or units of a kind that owns weights",
        )
    place = {n: i for i, n in enumerate(found.by_name)}
    return {n: regions[n] for n in sorted(regions, key=place.__getitem__)}


def untied(model: nn.Module, selection: Selection) -> Untied | None:
    """Take apart the tied parameters that a selection touches; None if it touches none."""
    found = Parameters.of(model)
    chosen = {p.param for name, ids in selection.ids.items() if len(ids) for p in selection.sites[name].parts}
    names = sorted(n for n in chosen if n in found.alias and found.tied(n))
    return Untie.of(model, names).mount(model) if names else None


def _gathered(model: nn.Module, selection: Selection, found: Parameters) -> dict[str, Region]:
    parts: dict[str, list[Region]] = {}
    for site_name, ids in selection.ids.items():
        for part in selection.sites[site_name].parts if len(ids) else ():
            if part.param not in found.alias:
                raise RequestError(
                    f"a selection in {part.param!r}",
                    expected="a parameter of this model",
                    do=f"select on this model ({near(part.param, found.alias)})",
                )
            name = found.alias[part.param]
            shape = tuple(found.by_name[name].shape)
            parts.setdefault(name, []).append(region_of(part, ids, shape, matrix_of(model, part.param, shape)))
    return {name: union(regions) for name, regions in parts.items()}


def minus(region: Region, other: Region) -> Region:
    """Return the entries of `region` that are not in `other`.

    Example:
        >>> minus(Region.of((4, 3), "rows", [0, 2]), Region.of((4, 3), "rows", [2, 3])).ids.tolist()
        [0]
    """
    same = region.layout == other.layout and region.block == other.block
    mine, theirs = (region.ids, other.ids) if same and region.layout != "all" else (region.flat(), other.flat())
    left = mine[~torch.isin(mine, theirs)]
    if len(left) == len(mine):
        return region
    layout = region.layout if same and region.layout != "all" else "flat"
    return Region.of(
        region.shape, layout, left, matrix=region.matrix, block=region.block if layout == "block" else None
    )
