"""`diff`: what tuning changed, as a graft: a PEFT adapter or a full fine-tune against its base."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neurograft.anatomy.checkpoint import CheckpointMap
from neurograft.core.compact.mount import matrix_of
from neurograft.core.errors import RequestError
from neurograft.core.fingerprint import tensor_digest
from neurograft.core.grafts.coordinates import Coordinates, everything
from neurograft.core.grafts.delta import Delta, New
from neurograft.core.grafts.depth import same_depth
from neurograft.core.grafts.graft import Graft
from neurograft.core.grafts.operation import Operation
from neurograft.core.grafts.origin import versions
from neurograft.core.progress import Progress, quiet
from neurograft.core.region import as_matrix
from neurograft.core.untie import FLAG, Untie
from neurograft.pipeline._adapter_files import is_adapter
from neurograft.pipeline._adapters import adapter_graft
from neurograft.pipeline._narrow import narrow_change
from neurograft.pipeline._sources import Source, described, files, live, located, shell
from neurograft.pipeline.models import Model, model_name


def diff(
    base: Model,
    tuned: Model,
    *,
    revision: str | None = None,
    tuned_revision: str | None = None,
    progress: Progress | None = None,
) -> Graft:
    """Return the graft that turns a base into a tuned model.

    A LoRA adapter becomes low-rank changes, exactly; any other PEFT adapter is taken through its merged weights.
    Of a full fine-tune only what differs is kept, tensor by tensor in the narrowest form (rows, columns, entries,
    or the whole tensor); parameters the base lacks come as new ones. Folders and Hub ids are read from their
    safetensors files one tensor at a time.

    Args:
        base: the base: live, path or Hub id.
        tuned: a PeftModel or an adapter's folder; or the whole tuned model, live, path or Hub id.
        revision: of the base, if it is a Hub id.
        tuned_revision: of the tuned one, if it is a Hub id.
        progress: (items, what) -> items, to show a bar.

    Raises:
        RequestError: nothing is there, the models have nothing in common, or a change has no graft form
            (a prompt, a resized vocabulary whose old rows moved too).

    Example:
        >>> from neurograft.worlds.pico import pico
        >>> a, b = pico("llama"), pico("llama")
        >>> b.model.norm.weight.data[3] = 2.0
        >>> graft = diff(a, b)
        >>> {n: (d.region.layout, d.region.ids.tolist()) for n, d in graft.deltas.items()}
        {'model.norm.weight': ('flat', [3])}
    """
    folder, adapted = located(base, revision), is_adapter(tuned, tuned_revision)
    model = base if isinstance(base, nn.Module) else shell(_there(folder), str(base), revision)
    with ExitStack() as keep:
        if adapted:
            where: Coordinates = CheckpointMap(model)
            source = _source(model, folder, where, keep, below=True)
            return adapter_graft(model, source, where, tuned, tuned_revision, folder, described(model, source))
        other = located(tuned, tuned_revision)
        apart = _untied(model, tuned, other)
        home = _homes(model, apart)
        if apart is not None:
            keep.callback(apart.mount(model).remove)
        where = CheckpointMap(model)
        mine = _source(model, folder, where, keep, below=True)
        theirs = _source(tuned, other, where, keep, below=False)
        for name, shared in home.items():
            mine.known.setdefault(name, mine.known.get(shared, []))
        made = _compared(model, mine, theirs, where, progress)
        known_as = {n: where.modules(n) for n in made[1] if where.modules(n) != [n]}
        card: dict[str, Any] = {"base": described(model, mine), "versions": versions(), "modules": known_as}
        card |= {"made_by": "diff", "tuned": model_name(tuned), **made[2]}
        operations: tuple[Operation, ...] = () if apart is None else (apart,)
        return Graft(made[0], operations, made[1], card)


def _there(folder: Path | None) -> Path:
    assert folder is not None
    return folder


def _source(model: Model, folder: Path | None, where: Coordinates, keep: ExitStack, *, below: bool) -> Source:
    if folder is not None:
        return files(folder, where, keep)
    assert isinstance(model, nn.Module)
    return live(model, where, below=below)


def _untied(model: nn.Module, tuned: Model, folder: Path | None) -> Untie | None:
    """Return what unties the base's weights if only the tuned model has them apart."""
    ties = getattr(model, "all_tied_weights_keys", None)
    if not ties or not getattr(getattr(model, "config", None), FLAG, False):
        return None
    config = getattr(tuned, "config", None) if folder is None else shell(folder, "", None).config
    if getattr(config, FLAG, False):
        return None
    return Untie.of(model, [name for name in ties if name in dict(model.named_parameters(remove_duplicate=False))])


def _homes(model: nn.Module, apart: Untie | None) -> dict[str, str]:
    """Return where the base keeps the numbers of what is to be untied."""
    return {} if apart is None else {name: CheckpointMap(model).resolve(name) for name in apart.names}


def _compared(
    model: nn.Module,
    mine: Source,
    theirs: Source,
    where: Coordinates,
    progress: Progress | None,
) -> tuple[dict[str, Delta], dict[str, str], dict[str, Any]]:
    """Return the changes, the digests of what they touch, and what the card says of the rest."""
    shared = [name for name in where.names() if name in mine.known and name in theirs.known]
    if not shared:
        raise RequestError(
            "two models that share no tensor",
            expected="a base and what was tuned from it",
            do="check that both are of one architecture, and which is which",
        )
    same_depth([*mine.known, *(mine.unknown.keys() & theirs.unknown.keys())], [*theirs.known, *theirs.unknown])
    deltas: dict[str, Delta] = {}
    digests: dict[str, str] = {}
    skipped: list[str] = []
    for name in (progress or quiet)(shared, "tensors"):
        before, after = mine.known[name][0](), theirs.known[name][0]()
        _same_numbers(name, theirs, after)
        if not before.is_floating_point():
            skipped += [name] if not torch.equal(before, after) else []
            continue
        if before.shape != after.shape:
            if not _zeros_added(before, after):
                deltas[name] = _appended(name, before, after)
            continue
        change = narrow_change(before, after, _matrix(model, where, name, tuple(before.shape)))
        if change is not None:
            deltas[name], digests[name] = change, tensor_digest(before)
    for name, read in theirs.unknown.items():
        if name not in mine.unknown:
            deltas[name] = New(read().float())
    lacking = [name for name in where.names() if name in mine.known and name not in theirs.known]
    return deltas, digests, {"not_in_tuned": lacking, "integers_that_differ": skipped}


def _same_numbers(name: str, theirs: Source, first: torch.Tensor) -> None:
    for again in theirs.known[name][1:]:
        if not torch.equal(again(), first):
            raise RequestError(
                f"a tuned model with two different tensors for {name}, which the base ties",
                expected="tied weights, or a config that says they are not",
                do="set tie_word_embeddings to false in the tuned model's config.json",
            )


def _zeros_added(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether a [1, tokens] bias has only been given zeros for new tokens, as it is whenever their rows are."""
    tokens = before.shape[-1] if before.dim() else 0
    if before.shape != (1, tokens) or after.dim() != 2 or len(after) != 1 or after.shape[1] <= tokens:
        return False
    return torch.equal(before, after[:, :tokens]) and not after[:, tokens:].any()


def _appended(name: str, before: torch.Tensor, after: torch.Tensor) -> New:
    longer = before.dim() > 0 and after.shape[1:] == before.shape[1:] and len(after) > len(before)
    if not longer or narrow_change(before, after[: len(before)], as_matrix(tuple(before.shape))) is not None:
        raise RequestError(
            f"{name} of shape {tuple(before.shape)} in the base and {tuple(after.shape)} in the tuned model",
            expected="equal shapes, or new rows after unchanged ones",
            do="tune the new rows apart from the old ones: tune(..., new={name: rows of the base})",
        )
    return New(after[len(before) :].float(), len(before))


def _matrix(model: nn.Module, where: Coordinates, name: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return how a tensor is read: as its parameter is, if it is one as it stands."""
    if len(shape) == 3:
        for piece in where.to_module(name, everything(shape, as_matrix(shape))):
            if piece.region.shape == shape:
                return matrix_of(model, piece.name, shape)
    return as_matrix(shape)
