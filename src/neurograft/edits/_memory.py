"""FFNs as key-value memories: where keys enter, where values leave, and what the stream holds behind.

Shape letters: n requests, r rows (prompts), k neurons of an FFN, d features of the stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neurograft.anatomy.describe import anatomy
from neurograft.anatomy.sites import sites
from neurograft.core.context import Context
from neurograft.core.errors import RequestError
from neurograft.core.grafts.coordinates import coordinates, everything
from neurograft.core.grafts.delta import LowRank
from neurograft.core.linears import transposed
from neurograft.core.prompts.requests import Rows
from neurograft.core.region import as_matrix
from neurograft.core.taps.look import look
from neurograft.core.taps.tap import Reader, change, watch
from neurograft.core.units import Parameters, Site, Tap

AT_ONCE = 64  # rows of a pass
NEAR = 0.05  # of a vector that arrives as it is: bfloat16 rounds a stream of large channels to half a percent


@dataclass(frozen=True)
class Memory:
    """The second matrix of an FFN.

    Args:
        keys: the neurons, tapped where they enter it.
        values: what leaves it.
        stream: the output of its layer.
        weight: its parameter.
        transposed: whether it is stored [k, d].
    """

    keys: Site
    values: Site
    stream: Site
    weight: str
    transposed: bool

    @property
    def layer(self) -> int:
        """Its layer."""
        assert self.keys.layer is not None
        return self.keys.layer

    def change(self, model: nn.Module, answers: Tensor, residuals: Tensor) -> dict[str, LowRank]:
        """Return sum_i residual_i answer_i^T, one rank for each request, by checkpoint tensor."""
        shape = tuple(Parameters.of(model).by_name[self.weight].shape)
        a, b = answers.detach().cpu().float(), residuals.detach().cpu().float()
        low = LowRank(shape, a, b.t().contiguous(), 1.0, self.transposed)
        return {tensor_of(model, self.weight): low}


def tensor_of(model: nn.Module, weight: str) -> str:
    """Return the checkpoint's tensor of a matrix.

    Raises:
        RequestError: the checkpoint cuts, joins or turns it.
    """
    shape = tuple(Parameters.of(model).by_name[weight].shape)
    pieces = coordinates(model).to_checkpoint(weight, everything(shape, as_matrix(shape)))
    if len(pieces) != 1 or pieces[0].region.shape != shape or pieces[0].order is not None:
        raise RequestError(
            f"an edit of {weight}, which lies in {len(pieces)} tensors of the checkpoint",
            expected="a matrix that is one tensor there",
            do="edit another layer or model",
        )
    return pieces[0].name


def memories(context: Context, layers: Sequence[int] | None, share: tuple[float, float]) -> list[Memory]:
    """Return the FFNs of the layers, in order; of a share of the depth if no layers are named.

    Raises:
        RequestError: no such layer, or FFNs whose matrix does not stand alone (banks of experts).
    """
    model = context.model
    keys = {s.layer: s for s in sites(model, "neuron").values() if s.layer is not None}
    known = sorted(keys)
    if layers is None:
        low, high = (int(f * len(known)) for f in share)
        layers = known[low : high + 1]
    blocks, written = anatomy(model).layers, sites(model, "channel")
    found = []
    for layer in sorted(set(layers)):
        if layer not in keys:
            raise RequestError(
                f"layer {layer}", expected=f"layers from {known[0]} to {known[-1]}", do="name layers that have an FFN"
            )
        found.append(_memory(model, keys[layer], written, blocks[layer]))
    if not found:
        raise RequestError("an edit of no layer", expected="at least one layer", do="name some, or leave layers out")
    return found


def _memory(model: nn.Module, keys: Site, written: Mapping[str, Site], block: str) -> Memory:
    tap = keys.tap
    assert tap is not None
    values = next(
        (s for s in written.values() if s.tap and s.tap.module == tap.module and s.tap.side == "output"), None
    )
    if tap.expert is not None or values is None or (tap.side, tap.start, tap.width) != ("input", 0, 1):
        raise RequestError(
            f"an edit of {keys.name}",
            expected="an FFN whose neurons are multiplied with a matrix of their own",
            do="edit a layer without experts",
        )
    parameters, module = Parameters.of(model), model.get_submodule(tap.module)
    weight = parameters.alias[f"{tap.module}.weight"]
    flipped = transposed(module)
    shape = tuple(parameters.by_name[weight].shape)
    assert shape == ((keys.n, values.n) if flipped else (values.n, keys.n)), (keys.name, shape)
    stream = Site(f"{block}/stream", "channel", values.n, (), Tap(block, "output"), keys.layer)
    return Memory(keys, values, stream, weight, flipped)


@torch.no_grad()
def at_subjects(model: nn.Module, found: Mapping[str, Site], rows: Rows) -> dict[str, Tensor]:
    """Return the activations of sites at each row's subject, float32 [r, units]."""
    return picked(model, found, rows, rows.at)


@torch.no_grad()
def picked(model: nn.Module, found: Mapping[str, Site], rows: Rows, at: Tensor) -> dict[str, Tensor]:
    """Return the activations of sites at one position of each row, float32 [r, units]."""
    taken: dict[str, list[Tensor]] = {name: [] for name in found}
    flags = torch.arange(rows.batch["input_ids"].shape[1], device=at.device) == at[:, None]
    read(model, found, rows, flags, lambda name, x: taken[name].append(x.float().clone()))
    return {name: torch.cat(parts) for name, parts in taken.items()}


@torch.no_grad()
def read(model: nn.Module, found: Mapping[str, Site], rows: Rows, flags: Tensor, reader: Reader) -> None:
    """Call the reader with the activations at the flagged positions, some rows at a time: logits are large."""
    for i in range(0, len(flags), AT_ONCE):
        here = flags[i : i + AT_ONCE]
        if bool(here.any()):
            with watch(model, found, reader, mask=lambda _, here=here: here):  # type: ignore[misc]
                look(model, {k: v[i : i + AT_ONCE] for k, v in rows.batch.items()})


@torch.no_grad()
def reaches(model: nn.Module, found: Sequence[Memory], rows: Rows) -> None:
    """Raise unless what each memory writes is added to the stream as it is.

    A vector added behind the memory at the first row's subject must arrive in the stream unchanged. Where a norm, a
    gate or a factor stands between, no change of the memory by a residual of the stream would bring the stream there.

    Raises:
        RequestError: something stands between.
    """
    one = Rows({k: v[:1] for k, v in rows.batch.items()}, rows.at[:1], rows.last[:1], rows.owner[:1])
    streams = {m.stream.name: m.stream for m in found}
    before = at_subjects(model, streams, one)
    for memory in found:
        name, start = memory.stream.name, before[memory.stream.name][0]
        vector = start.pow(2).mean().sqrt() * torch.arange(len(start), device=start.device).float().cos()

        def moved(_: str, x: Tensor, vector: Tensor = vector) -> Tensor:
            flat = x.reshape(-1, x.shape[-1])  # some families have no batch axis here
            return flat.index_put((one.at.to(x.device),), vector.to(x)[None], accumulate=True).reshape(x.shape)

        with change(model, {memory.values.name: memory.values}, moved):
            after = at_subjects(model, {name: memory.stream}, one)[name][0]
        if not float((after - start - vector).norm()) < NEAR * float(vector.norm()):
            raise RequestError(
                f"an edit of {memory.keys.name}, whose output does not reach the stream as it is",
                expected="an FFN whose output is added to the stream, without a norm, a gate or a factor between",
                do="edit another family, or by fine-tuning: by='locft_bf'",
            )
