"""Vectors that stand for an instruction, added where a prompt ends.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from neurograft.core.batches import Batch, shifts
from neurograft.core.errors import RequestError, RunError
from neurograft.core.grafts.graft import Graft
from neurograft.core.intervene import Intervention, Mounted
from neurograft.core.prompts.candidates import first_answers


def prompt_end(batch: Batch) -> Tensor:
    """Return the last prompt token of each row, where its answer is predicted first, bool [B, T].

    Raises:
        RequestError: a row without a labelled answer behind a prompt.

    Example:
        >>> labels = torch.tensor([[-100, -100, 7, 3], [-100, 5, -100, -100]])
        >>> prompt_end({"labels": labels}).int().tolist()
        [[0, 1, 0, 0], [1, 0, 0, 0]]
    """
    at, _ = first_answers(batch)
    width: int = batch["labels"].shape[1]
    return torch.arange(width, device=at.device) == at[:, None] - 1


def need_ahead(model: nn.Module) -> None:
    """Raise if a model does not predict the token ahead, so that no answer begins where a prompt ends."""
    if not shifts(model):
        raise RequestError(
            f"a {type(model).__name__}, which does not predict the token ahead",
            expected="a causal language model",
            do="choose another method for this model",
        )


def additions(vector: Graft | None) -> tuple[Intervention, ...]:
    """Return the operations of a graft that only adds to activations; none for None.

    Raises:
        RequestError: it holds anything else, or nothing.
    """
    if vector is None:
        return ()
    operations = vector.operations if isinstance(vector, Graft) and not vector.deltas else ()
    found = tuple(o for o in operations if isinstance(o, Intervention) and o.kind == "add")
    if not found or len(found) != len(operations):
        raise RequestError(
            f"a vector ({type(vector).__name__}) that is no set of additions",
            expected="a graft of `add` operations alone",
            do="make it with ng.intervene(model, where, 'add', value=...).graft()",
        )
    return tuple(o.scaled(vector.strength) for o in found)


@contextmanager
def at_prompt_end(
    model: nn.Module, operations: Sequence[Intervention], where: Tensor | None, strength: float = 1.0
) -> Iterator[None]:
    """Put additions on at the given tokens alone for the length of a block, whatever positions they name.

    Args:
        model: the root that will be called.
        operations: of kind "add".
        where: bool [B, T], of the one batch that will be run; None for `prompt_end` of every labelled batch.
        strength: their factor; at 0 nothing is mounted.

    Raises:
        RunError: one of them never changed anything, as where the model was not called in the block.
    """
    places = prompt_end if where is None else lambda batch: where
    mounted: list[Mounted] = []
    try:
        for operation in operations if strength else ():
            mounted.append(replace(operation.scaled(strength), positions=places).mount(model))
        yield
        silent = [m for m in mounted if not m.fired]
        if silent:
            raise RunError(
                f"the vector at {next(iter(silent[0].guest.sites))} never fired: the model was not called under it, "
                "or a compiled or fused kernel bypasses the module"
            )
    finally:
        for one in reversed(mounted):
            one.remove()
