"""A step of recipes: a dendritic neuron stores codes, and how reliably it knows them again."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from neurograft.core.errors import RequestError
from neurograft.core.grafts.graft import Graft
from neurograft.core.seeds import generator
from neurograft.networks.dendritic_neuron import DendriticNeuron
from neurograft.networks.recognition import any_of, false_negative, false_positive, recognition
from neurograft.pipeline.diff import diff
from neurograft.pipeline.rows import Row, read_rows


def recognised(
    state: Mapping[str, Any],
    *,
    nu: float = 0.3,
    theta: int | None = None,
    trials: int = 1000,
    of: str = "codes",
    name: str = "graft",
) -> dict[str, Any]:
    """Store codes in a `DendriticNeuron`, choose its threshold, and count its errors beside the expected ones.

    Rows have a code, 0 or 1 [n], and maybe a `label`: 1 for codes to store, 0 for foreign ones that should not be
    recognised. Without foreign ones, random codes with as many active cells are drawn.

    Args:
        state: what the recipe has made so far, its network and data.
        nu: chance that an active cell of a stored code fails.
        theta: the threshold; None for the one with the least sum of both errors by the closed forms.
        trials: stored codes with failing cells, and foreign codes where they are drawn.
        of: the column of the codes.
        name: of the graft, the change that storing made.

    Returns:
        The graft, and `recognition`: the threshold, `false_positive` and `false_negative`, each `seen` and `expected`
        for these codes and synapses, which is also on the graft's card. A stored code may be recognised by synapses
        of others too, so what is seen of false negatives is at most what is expected but for chance.

    Raises:
        RequestError: a model of another kind, rows without codes, codes of another width or too few active cells.
    """
    model = state["model"]
    if not isinstance(model, DendriticNeuron):
        raise RequestError(
            f"a {type(model).__name__}",
            expected="a dendritic neuron",
            do="name neurograft.networks.dendritic_neuron for the model",
        )
    seed = state.get("common", {}).get("seed", 0)
    codes, label = _codes(read_rows(state["data"]), of, model.n)
    mine, foreign = codes[label], codes[~label]
    net = copy.deepcopy(model)
    net.store(mine, generator(seed, "recognised", "store"))
    net.set_theta(theta if theta is not None else _best(net, mine, nu))
    if not len(foreign):
        active = mine.sum(1)[torch.arange(trials) % len(mine)]
        foreign = drawn(active, net.n, generator(seed, "recognised", "foreign"))
    numbers = _numbers(net, mine, foreign, failing(mine, nu, trials, generator(seed, "recognised", "failing")), nu)
    graft: Graft = diff(model, net)
    return {name: replace(graft, card={**graft.card, "recognition": numbers}), "recognition": numbers}


def _best(net: DendriticNeuron, codes: Tensor, nu: float) -> int:
    """Return the threshold with the least sum of errors for codes of this mean activity."""
    active, share = round(float(codes.sum(1).double().mean())), -(-len(codes) // len(net.segments))
    return recognition(net.n, active, net.s, nu=nu, M=share, segments=len(net.segments)).theta


def _numbers(net: DendriticNeuron, mine: Tensor, foreign: Tensor, failed: Tensor, nu: float) -> dict[str, Any]:
    """Return what `recognised` reports of a neuron that has stored its codes."""
    sizes, theta = [int(segment.synapses.sum()) for segment in net.each()], int(net.each()[0].theta)
    return {
        "theta": theta,
        "stored": len(mine),
        "synapses": sizes,
        "false_positive": {"seen": share_of(net, foreign), "expected": _expected(net.n, foreign, sizes, theta)},
        "false_negative": {"seen": 1.0 - share_of(net, failed), "expected": false_negative(net.s, theta, nu)},
    }


def drawn(active: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """Return random codes, bool [Q, n], with so many active cells each, int64 [Q].

    Example:
        >>> drawn(torch.tensor([2, 0]), 5, torch.Generator().manual_seed(0)).sum(1).tolist()
        [2, 0]
    """
    order = torch.rand(len(active), n, generator=rng).argsort(1).argsort(1)
    return order < active[:, None]


def failing(codes: Tensor, nu: float, trials: int, rng: torch.Generator) -> Tensor:
    """Return so many codes, each in its turn, whose active cells fail with chance nu, bool [trials, n]."""
    again = codes[torch.arange(trials) % len(codes)]
    return again & (torch.rand(again.shape, generator=rng) >= nu)


def share_of(net: DendriticNeuron, codes: Tensor) -> float:
    """Return the share of codes that are recognised."""
    with torch.no_grad():
        return float((net(codes) > 0).double().mean())


def _expected(n: int, codes: Tensor, sizes: Sequence[int], theta: int) -> float:
    """Return the mean chance that random codes of these activities meet theta synapses of some segment."""
    each = {a: any_of([false_positive(n, a, size, theta) for size in sizes]) for a in set(codes.sum(1).tolist())}
    return sum(each[a] for a in codes.sum(1).tolist()) / len(codes)


def _codes(rows: list[Row], of: str, n: int) -> tuple[Tensor, Tensor]:
    """Return codes, bool [N, n], and which of them are to be stored, bool [N]."""
    if any(of not in row for row in rows):
        raise RequestError(
            f"rows with {', '.join(rows[0])}", expected=f"a column {of!r} of codes", do="name it: recognised.of=COLUMN"
        )
    made = [torch.as_tensor(row[of]).reshape(-1) for row in rows]
    odd = next((c for c in made if len(c) != n or not bool(((c == 0) | (c == 1)).all())), None)
    if odd is not None:
        raise RequestError(
            f"a code of {len(odd)} cells" + ("" if len(odd) != n else " with other numbers than 0 and 1"),
            expected=f"{n} cells, each 0 or 1",
            do="make the network as wide as the codes: n=",
        )
    label = torch.tensor([bool(row.get("label", row.get("labels", 1))) for row in rows])
    if not bool(label.any()):
        raise RequestError("rows of which none is to be stored", expected="some with label 1", do="check the labels")
    return torch.stack(made).bool(), label
