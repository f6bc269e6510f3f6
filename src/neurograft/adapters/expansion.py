"""Block expansion: copies of some layers, inserted behind them, that start as the identity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from neurograft.adapters._operations import Held, OperationMount
from neurograft.anatomy.describe import anatomy
from neurograft.core.card import method
from neurograft.core.compact.mount import Mount
from neurograft.core.errors import RequestError
from neurograft.core.inserted import Inserted, Running
from neurograft.core.selection import Selection


@method(
    paper="block-expansion",
    claims={"undo", "zero_graft", "resume"},
    departs="The inserted blocks are no children of the model, so that its own layers keep their names.",
)
def expansion(
    model: nn.Module,
    where: Selection | None = None,
    *,
    new: Iterable[str] | Mapping[str, int] = (),
    protect: Selection | None = None,
    blocks: int = 1,
) -> Mount:
    """Insert behind some layers a copy of each whose sub-layers write zeros, and train the copies whole.

    A pre-norm block that contributes nothing passes the stream on bit for bit. No weight of the model moves: the graft
    holds the blocks, and what is protected stays as it is anyway.

    Args:
        model: a pre-norm model of repeated layers.
        where: units of kind "layer" behind which blocks are inserted; None for `blocks` evenly spread.
        new: parameters the base's checkpoint lacks, trained whole.
        protect: units whose numbers must not move.
        blocks: how many, behind every (layers / blocks)-th layer.

    Raises:
        RequestError: units of another kind, a number that does not divide the layers, no such layers; at the first
            forward pass, a block that does not pass the stream on (post-norm).
    """
    known = anatomy(model)
    layers = known.layers
    if where is None:
        if not layers or blocks < 1 or len(layers) % blocks:
            raise RequestError(
                f"blocks={blocks} for a model of {len(layers)} layers",
                expected="a number that divides the layers",
                do="choose another, or select the layers (units='layer')",
            )
        each = len(layers) // blocks
        names = layers[each - 1 :: each]
    else:
        chosen = [where.sites[n] for n, ids in where.ids.items() if len(ids)]
        odd = [s.name for s in chosen if s.kind != "layer" or s.layer is None or s.layer >= len(layers)]
        if odd or not chosen:
            raise RequestError(
                f"units of {odd[0]!r} for adapter='expansion'" if odd else "a selection of no layer",
                expected="units of kind 'layer'",
                do="locate(units='layer', ...), or leave the selection out",
            )
        names = [layers[i] for i in sorted({s.layer for s in chosen if s.layer is not None})]
    silent = {b.name: {m for c in b.branches for m in c.writers} for b in known.blocks}
    banks = {
        b.name: {p for c in b.branches for k in c.banks for p in (k.first.param, k.first.bias)} for b in known.blocks
    }

    def place() -> Iterator[LiveBlock]:
        return (LiveBlock(model, n, len(layers) + layers.index(n), silent[n], banks[n]) for n in names)

    mount = OperationMount(model, place, new=new)
    mount.declared = False  # a block is asked for and not its tensors: some (a key's bias) no objective reaches
    return mount


class LiveBlock:
    """An inserted block under training.

    Args:
        model: the model.
        behind: the layer it stands behind.
        index: see `Inserted`.
        writers: modules of the layer that write to the stream; the copy's are zero.
        banks: parameters that do.
    """

    def __init__(self, model: nn.Module, behind: str, index: int, writers: set[str], banks: set[str | None]) -> None:
        self.behind, self.index = behind, index
        self.tensors, silent = dict[str, Held](), list[str]()
        for leaf, p in model.get_submodule(behind).named_parameters():
            name = f"{behind}.{leaf}"
            writes = name in banks or any(name.startswith(f"{w}.") for w in writers)
            self.tensors[leaf] = Held(name, torch.zeros_like(p) if writes else p)
            silent += [leaf] if writes else []
        values = {leaf: held.theta for leaf, held in self.tensors.items()}
        self.running = Running(model, behind, index, values, silent=silent)

    @property
    def resting(self) -> bool:
        """Whether it is passed by."""
        return self.running.resting

    @resting.setter
    def resting(self, value: bool) -> None:
        self.running.resting = value

    def held(self) -> dict[str, Held]:
        """Return its tensors."""
        return {f"{held.name}.inserted": held for held in self.tensors.values()}

    def operation(self) -> Inserted:
        """Return the block as it is now."""
        values = {leaf: held.theta.detach().cpu().clone() for leaf, held in self.tensors.items()}
        return Inserted(self.behind, self.index, values)

    def remove(self) -> None:
        """Take it off."""
        self.running.remove()
