"""Probing a network of unknown structure: what of one linear layer's input depends on another's output?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.anatomy.inventory import Inventory, taps_itself
from neurograft.anatomy.matrix import Matrix
from neurograft.core.seeds import generator

NOISE = 1e-5  # a change below this share of the largest one is rounding


class _Enough(Exception):
    """Ends a forward pass early: what was wanted has been seen."""


class Probe:
    """A model, a batch and the order in which its linear layers run.

    Args:
        inventory: the model's modules.
        batch: inputs.

    Attributes:
        order: linear layers and pointwise convolutions in the order of their first call.
        leading: shape of their output then, without its features.
        read: which tensor they read then.
    """

    def __init__(self, inventory: Inventory, batch: Mapping[str, Any]) -> None:
        self.inventory, self.batch = inventory, batch
        self.matrices: dict[str, Matrix] = {
            name: matrix
            for name, module in inventory.modules.items()
            if taps_itself(module)
            and (matrix := inventory.find_matrix(name)) is not None
            and matrix.kernel == 1
            and not matrix.grouped
        }
        self.order: list[str] = []
        self.leading: dict[str, tuple[int, ...]] = {}
        self.kept: tuple[str, dict[str, Tensor | None]] = ("", {})
        self.read: dict[str, tuple[int, ...]] = {}
        self._run(dict.fromkeys(self.matrices, self._note), dict.fromkeys(self.matrices, self._note_input))

    def _note(self, name: str, y: Tensor) -> None:
        if name not in self.leading:
            self.order.append(name)
            self.leading[name] = tuple(self._last(name, y).shape[:-1])

    def _note_input(self, name: str, x: Tensor) -> None:
        self.read.setdefault(name, (x.data_ptr(), *x.shape))

    def _last(self, name: str, x: Tensor) -> Tensor:
        """Bring the feature axis of a module's tensor to the end."""
        return x.movedim(self.matrices[name].dim, -1)

    def _run(self, after: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> None:
        modules, handles = self.inventory.modules, []
        for name, see in after.items():
            handles.append(modules[name].register_forward_hook(lambda m, a, y, n=name, s=see: s(n, y)))
        for name, see in (before or {}).items():
            handles.append(modules[name].register_forward_pre_hook(_first_argument(name, see), with_kwargs=True))
        model: nn.Module = self.inventory.model
        try:
            with torch.no_grad():
                model(**self.batch)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def input_of(
        self,
        reader: str,
        source: str | None = None,
        features: Sequence[int] = (),
        *,
        times: float = 1.0,
        first: bool = False,
    ) -> Tensor | None:
        """Return the input of `reader`, features last, with some output features of `source` moved.

        Args:
            reader: a linear layer; its first call after the source's first one counts.
            source: the linear layer whose output is moved, or None.
            features: which of its features.
            times: how far.
            first: move them at the first position only.
        """
        seen: list[Tensor] = []
        fired: list[bool] = []

        def move(name: str, y: Tensor) -> Tensor | None:
            if fired:
                return None
            fired.append(True)
            moved = y.clone()
            view = self._last(name, moved)
            size = float(y.abs().max()) + 1.0
            noise = 1 + torch.rand(view.shape[:-1], generator=generator(0, "probe")).to(y)
            if first:
                at = torch.zeros(view.shape[:-1], dtype=torch.bool, device=y.device)
                at.view(len(at), -1)[slice(None) if at.dim() > 1 else slice(1), 0] = True
                noise = noise * at
            for feature in features:
                view[..., feature] += times * size * noise
            return moved

        def keep(name: str, x: Tensor) -> None:
            if source is None or fired:
                seen.append(self._last(name, x).clone())
                raise _Enough

        if source is None:
            self._run({}, {reader: keep})
        else:
            self._run({source: move if features else _mark(fired)}, {reader: keep})
        return seen[0] if seen else None

    def base(self, reader: str, source: str) -> Tensor | None:
        """Return the reader's input as it is; the last reader's are kept."""
        if self.kept[0] != reader:
            self.kept = (reader, {})
        if source not in self.kept[1]:
            self.kept[1][source] = self.input_of(reader, source)
        return self.kept[1][source]

    def changed(self, reader: str, source: str, features: Sequence[int], *, first: bool = False) -> Tensor | None:
        """Return which entries of the reader's input depend on these features of the source, bool [..., F].

        None if the reader does not run after the source, or its input has another shape then.
        """
        base = self.base(reader, source)
        moved = self.input_of(reader, source, features, first=first)
        if base is None or moved is None or base.shape != moved.shape:
            return None
        difference = (moved - base).abs()
        return difference > NOISE * float(difference.max().clamp(min=1e-30))

    def firsts(self, source: str) -> int:
        """Return how many positions of a layer's output are moved by `first`: one for each row of the batch."""
        leading = self.leading[source]
        return leading[0] if len(leading) > 1 else 1

    def reached(self, reader: str, source: str, feature: int) -> list[int]:
        """Return the input features of the reader that depend on one output feature of the source."""
        found = self.changed(reader, source, [feature])
        return [] if found is None else found.reshape(-1, found.shape[-1]).any(0).nonzero().reshape(-1).tolist()


def _mark(fired: list[bool]) -> Any:
    def see(name: str, y: Tensor) -> None:
        fired.append(True)

    return see


def _first_argument(name: str, see: Any) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(name, args[0] if args else next(iter(kwargs.values())))

    return hook
