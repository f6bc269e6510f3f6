"""Between a transformers model's parameters and the tensors of its checkpoint.

The names, cuts and joins are transformers' own: its save conversion is run once on tensors without content
(`_recorder`), so that what we call a tensor is what `save_pretrained` calls it.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from neurograft.anatomy._rearranged import View, contiguous
from neurograft.anatomy._recorder import Recorder
from neurograft.core.errors import RequestError
from neurograft.core.grafts.coordinates import Piece, everything, holders, missing, narrowest
from neurograft.core.region import Region, as_matrix
from neurograft.core.units import Parameters


class CheckpointMap:
    """The translation of a transformers model, or of any model whose checkpoint is its own state.

    Args:
        model: the model; read, not changed.

    Example:
        >>> from neurograft.worlds.pico import pico
        >>> names = CheckpointMap(pico("mixtral")).names()
        >>> names["model.layers.0.block_sparse_moe.experts.3.w1.weight"]
        (48, 32)
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = Parameters.of(model)
        self.tensors = holders(model)
        self.views = _views(model, self.tensors, self.parameters)
        self.found_in: dict[str, list[str]] = {}
        for name, view in self.views.items():
            for leaf in view.leaves():
                self.found_in.setdefault(leaf, []).append(name)

    def names(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors that `save_pretrained` writes, with their shapes."""
        return {name: view.shape for name, view in self.views.items()}

    def read(self, tensor: str) -> Tensor:
        """Return a checkpoint tensor's current content; a view of the model's own weight where it can be one."""
        return self.views[self.resolve(tensor)].real(self.tensors)

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Return a checkpoint tensor's shape."""
        return self.views[self.resolve(tensor)].shape

    def modules(self, tensor: str) -> list[str]:
        """Return the parameters that hold a checkpoint tensor."""
        return self.views[self.resolve(tensor)].leaves()

    def to_checkpoint(self, parameter: str, region: Region) -> list[Piece]:
        """Return where entries of a parameter lie in the checkpoint.

        Raises:
            RequestError: the model does not save this parameter.
        """
        first = self.parameters.alias.get(parameter, parameter)
        if first not in self.found_in:
            raise RequestError(
                f"a change of {parameter}, which {type(self.model).__name__} does not save",
                expected="parameters that are in its checkpoint",
                do="select other units",
            )
        pieces, flat = [], None
        for name in self.found_in[first]:
            view = self.views[name]
            if _same(view, region.shape):
                return [Piece(name, region)]
            piece, known = _cut(name, view, region)
            if not known:
                flat = region.flat().cpu() if flat is None else flat
                entries, held = view.up(first, flat)
                there, order = narrowest(view.shape, entries)
                piece = Piece(name, there, held[order]) if len(entries) else None
            pieces += [piece] if piece else []
        return pieces

    def to_module(self, tensor: str, region: Region) -> list[Piece]:
        """Return where entries of a checkpoint tensor lie in the model.

        Raises:
            RequestError: the model has no such tensor.
        """
        view = self.views[self.resolve(tensor)]
        source = view.source
        if isinstance(source, str):
            shape = tuple(self.tensors[source].shape)
            if _same(view, shape):
                return [Piece(source, region)]
            placed = _paste(view, region, shape)
            if placed is not None:
                return [Piece(source, placed)]
        pieces = []
        for name, entries, held in view.down(region.flat().cpu()):
            if len(entries):
                here, order = narrowest(tuple(self.tensors[name].shape), entries)
                pieces.append(Piece(name, here, held[order]))
        return pieces

    def resolve(self, tensor: str) -> str:
        """Return the checkpoint's name of a tensor, also given as another head's or an older checkpoint names it.

        Raises:
            RequestError: the model has no such tensor.
        """
        if tensor in self.views:
            return tensor
        for candidate in self._other_names(tensor):
            first = self.parameters.alias.get(candidate, candidate)
            for name in [candidate, *self.found_in.get(first, [])]:
                view = self.views.get(name)
                if view is not None and (name == candidate or _same(view, tuple(self.tensors[first].shape))):
                    return name
        raise missing(tensor, self.views)

    @cached_property
    def _conversions(self) -> tuple[list[WeightRenaming], list[WeightConverter]]:
        """What transformers does to the names of a file, older ones included."""
        if not isinstance(self.model, PreTrainedModel):
            return [], []
        found = getattr(self.model, "_weight_conversions", None) or get_model_conversion_mapping(self.model)
        renamings = [c for c in found if isinstance(c, WeightRenaming)]
        return renamings, [c for c in found if isinstance(c, WeightConverter)]

    def _other_names(self, tensor: str) -> list[str]:
        """Return what a tensor may be called here if a model with another head, or an older version, named it."""
        found, prefix = [], str(getattr(self.model, "base_model_prefix", "") or "")
        if prefix:
            bare = tensor.removeprefix(prefix + ".")
            found += [bare] if bare != tensor else [f"{prefix}.{tensor}"]
        return [*found, rename_source_key(tensor, *self._conversions, prefix, self.tensors)[0]]


def _views(model: nn.Module, tensors: dict[str, Tensor], parameters: Parameters) -> dict[str, View]:
    """Return what every tensor of the checkpoint is made of."""
    if not isinstance(model, PreTrainedModel):
        return {n: View(n, tuple(t.shape), contiguous(tuple(t.shape))) for n, t in tensors.items()}
    # Not from `state_dict()`: its hooks would write into a model that is being trained.
    names = {n: n for n in tensors} | {n: first for n, first in parameters.alias.items() if first in tensors}
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    shapes = {n: tuple(tensors[first].shape) for n, first in names.items() if n not in ignored}
    with Recorder() as seen, torch.no_grad():
        empty: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            empty[name] = seen.parameter(names[name], shape)
        if len({names[n] for n in shapes}) < len(shapes):
            empty = remove_tied_weights_from_state_dict(empty, model)
        saved = revert_weight_conversion(model, empty)
        return {name: seen.view(tensor) for name, tensor in saved.items()}


def _same(view: View, shape: tuple[int, ...]) -> bool:
    return isinstance(view.source, str) and view.start == 0 and view.plain and view.shape == shape


def _rows(view: View, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Return (first row, number of rows) if the tensor is neighbouring whole rows of the parameter."""
    columns = as_matrix(shape)[2]
    if not isinstance(view.source, str) or not view.plain or len(view.shape) < 2 or len(shape) < 2:
        return None
    if as_matrix(view.shape)[2] != columns or view.start % columns:
        return None
    return view.start // columns, view.numel // columns


def _cut(name: str, view: View, region: Region) -> tuple[Piece | None, bool]:
    """Return the piece of a parameter's region in a tensor that is some of its rows; False if not that simple."""
    block = _rows(view, region.shape)
    _, rows, columns = region.matrix
    if block is None or region.matrix != as_matrix(region.shape) or region.layout == "block":
        return None, False
    first, count = block
    if region.layout == "all":
        at = slice(view.start, view.start + view.numel)
        return Piece(name, everything(view.shape, as_matrix(view.shape)), at), True
    if region.layout == "cols":
        if count != rows or first % rows or as_matrix(view.shape)[0] != 1:
            return None, False
        first, count, width = first // rows * columns, columns, rows
    else:
        width = columns if region.layout == "rows" else 1
        scale = 1 if region.layout == "rows" else columns
        first, count = first * scale, count * scale
    edges = torch.tensor([first, first + count], device=region.ids.device)
    low, high = torch.searchsorted(region.ids, edges).tolist()
    if low == high:
        return None, True
    there = Region.of(view.shape, region.layout, region.ids[low:high] - first)
    return Piece(name, there, slice(low * width, high * width)), True


def _paste(view: View, region: Region, shape: tuple[int, ...]) -> Region | None:
    """Return a tensor's region as a region of the parameter it is some rows of; None if not that simple."""
    block, matrix = _rows(view, shape), as_matrix(shape)
    if block is None or region.matrix != as_matrix(region.shape) or region.layout == "block":
        return None
    first, count = block
    bank, rows, columns = matrix
    if region.layout == "all":
        if count == bank * rows:
            return everything(shape, matrix)
        return Region.of(shape, "rows", torch.arange(first, first + count))
    if region.layout == "cols":
        if count != rows or first % rows or region.matrix[0] != 1:
            return None
        return Region.of(shape, "cols", region.ids + first // rows * columns)
    return Region.of(shape, region.layout, region.ids + first * (1 if region.layout == "rows" else columns))
