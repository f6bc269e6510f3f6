"""Which groups of heads carry what a change gained: activations patched from the changed model into the base (CMAP)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.anatomy.projections import projections
from neurograft.anatomy.sites import sites as sites_of
from neurograft.audits._changes import as_change, evaluating
from neurograft.audits._circuits import need_circuit
from neurograft.core.card import method
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError, one_of
from neurograft.core.prompts.answering import credit
from neurograft.core.prompts.places import place
from neurograft.core.taps.capture import capture
from neurograft.core.taps.circuit import Circuit, Group
from neurograft.core.taps.tap import change as changing
from neurograft.core.units import Site

WAYS: Mapping[str, tuple[str, ...]] = {
    "out": (),
    "q": ("queries",),
    "k": ("keys",),
    "v": ("values",),
    "qk": ("queries", "keys"),
    "qkv": ("queries", "keys", "values"),
    "all": (),
}


@method(
    paper="entity-tracking",
    needs={"batches"},
    departs="Keys and values are patched up to the place itself, so that queries, keys and values together are the "
    "changed head's output; `itself=False` stops one token before, as the reference does. Where they are patched, the "
    "group's heads are held at the base's outputs away from their place and all other heads run freely; the reference "
    "holds every head at every token but the last, under which groups at work earlier cannot act.",
)
def cross_model(
    model: nn.Module,
    change: object,
    batches: Sequence[Batch],
    *,
    circuit: Circuit | None = None,
    ways: Sequence[str] = ("out", "q", "k", "v"),
    query: str = "end-2",
    metric: str = "accuracy",
    itself: bool = True,
) -> dict[str, Any]:
    """Run the base with each group's activations taken from the changed model on the same prompt.

    recovered = (F(patched) - F(base)) / (F(changed) - F(base)). A head's output is what enters the output projection,
    which stays the base's.

    Args:
        model: the base; left as found.
        change: a graft, grafts, or a tuned model of the same shape.
        batches: prompts with answers.
        circuit: groups of heads by name; "circuit" is all of them together, "everything" what every attention and
            FFN adds to the residual stream, which is the changed model unless embeddings, last norm or head moved.
        ways: what of a group's heads is patched: "out", their outputs; "q", "k", "v", "qk" or "qkv", what goes in.
        query: the place whose token "mention" is like.
        metric: F: "accuracy" or "probability".
        itself: whether keys and values of the place itself are patched too.

    Returns:
        `base`, `changed`, `patched`: group -> way -> F, and `recovered`: the same shares of the gain: 0 where
        patching changes nothing, None where there is no gain to recover.

    Raises:
        RequestError: no circuit, or an unknown way.
    """
    chosen, made = need_circuit(circuit), as_change(model, change)
    for way in ways:
        one_of(way, [w for w in WAYS if w != "all"], what="way of patching")
    if not batches:
        raise RequestError("no prompts", expected="prompts with answers", do="give data")
    runs = [(name, way, {name: group}) for name, group in chosen.items() for way in ways]
    runs += [("circuit", "out", dict(chosen)), ("everything", "all", {})]
    total = dict.fromkeys(["base", "changed", *((n, w) for n, w, _ in runs)], 0.0)
    patch, count = _Patch(model, query, itself), 0
    with evaluating(model, made.tuned):
        for batch in batches:
            count += len(batch["input_ids"])
            with made.on() as net:
                total["changed"] += float(credit(net, batch, metric).sum())
                donor = capture(net, patch.every, batch)
            total["base"] += float(credit(model, batch, metric).sum())
            own = capture(model, patch.heads, batch)
            for name, way, groups in runs:
                with changing(model, *patch.plan(groups, way, batch, donor, own)):
                    total[name, way] += float(credit(model, batch, metric).sum())
    score = {key: value / count for key, value in total.items()}
    gain = score["changed"] - score["base"]
    patched: dict[str, dict[str, float]] = {}
    recovered: dict[str, dict[str, float | None]] = {}
    for name, way, _ in runs:
        moved = score[name, way] - score["base"]
        patched.setdefault(name, {})[way] = score[name, way]
        recovered.setdefault(name, {})[way] = moved / gain if gain else None if moved else 0.0
    return {"base": score["base"], "changed": score["changed"], "patched": patched, "recovered": recovered}


class _Patch:
    """What is patched where, on one model."""

    def __init__(self, model: nn.Module, query: str, itself: bool) -> None:
        self.query, self.itself = query, itself
        self.heads = sites_of(model, "head")
        self.into = {of: projections(model, of) for of in ("queries", "keys", "values")}
        self.layers = sites_of(model, "channel")
        made = {site.name: site for found in self.into.values() for site in found.values()}
        self.every: dict[str, Site] = {**self.heads, **made, **self.layers}

    def plan(
        self,
        groups: Mapping[str, Group],
        way: str,
        batch: Batch,
        donor: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
    ) -> tuple[dict[str, Site], Any]:
        """Return the sites to change, and how, for a batch."""
        if way == "all":
            return self.layers, lambda name, x: donor[name].to(x)
        shape = tuple(batch["input_ids"].shape)
        flags: dict[str, Tensor] = {}
        hold: dict[str, Tensor] = {}
        for group in groups.values():
            here = place(batch, group.at, query=self.query)
            at, index = here.flags(shape[1]).cpu(), torch.arange(shape[1])
            last = here.at.cpu()[:, None]
            before = index <= last if self.itself else index < last
            for name, ids in group.where.ids.items():
                if len(ids) and way == "out":
                    _set(flags, name, (*shape, self.heads[name].n), at, ids)
                elif len(ids):
                    self._into(way, name, ids, at, before, flags, hold)
        if not flags:
            raise RequestError("groups without a head", expected="at least one", do="take more heads into them")

        def fn(name: str, x: Tensor) -> Tensor:
            for chosen, values in ((flags, donor), (hold, own)):
                if name in chosen:
                    keep = chosen[name].to(x.device)
                    x = torch.where(keep.reshape(*keep.shape, *[1] * (x.dim() - 3)), values[name].to(x), x)
            return x

        return {name: self.every[name] for name in (*flags, *hold)}, fn

    def _into(
        self,
        way: str,
        name: str,
        ids: Tensor,
        at: Tensor,
        before: Tensor,
        flags: dict[str, Tensor],
        hold: dict[str, Tensor],
    ) -> None:
        """Mark queries at the place, keys and values up to it, and the outputs that must not answer to these."""
        n = self.heads[name].n
        for of in WAYS[way]:
            site = self.into[of][name]
            group = n // site.n
            shared = (ids // group).unique()
            _set(flags, site.name, (*at.shape, site.n), at if of == "queries" else before, shared)
            if of != "queries":  # heads that share a key or value with one of the group answer to it too
                users = torch.arange(n)[torch.isin(torch.arange(n) // group, shared)]
                _set(hold, name, (*at.shape, n), torch.ones_like(at), users)
        if name in hold:
            hold[name][..., ids] &= ~at[..., None]


def _set(flags: dict[str, Tensor], name: str, shape: tuple[int, ...], at: Tensor, ids: Tensor) -> None:
    flags.setdefault(name, torch.zeros(shape, dtype=torch.bool))[..., ids] |= at[..., None]
