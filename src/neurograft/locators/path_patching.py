"""Which heads reach the answer, or other heads' queries, keys or values, along a path of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from neurograft.anatomy.projections import projections
from neurograft.anatomy.sites import sites as sites_of
from neurograft.core.card import method
from neurograft.core.context import Batch, Context
from neurograft.core.errors import RequestError, one_of
from neurograft.core.prompts.answering import both, paired, said
from neurograft.core.prompts.places import Placed, answers, ends, on_tokens, place
from neurograft.core.selection import Scores, Selection
from neurograft.core.taps.capture import capture
from neurograft.core.taps.tap import change
from neurograft.core.units import Site
from neurograft.locators._common import scored

INTO = ("logits", "queries", "keys", "values")


@method(
    paper="entity-tracking",
    kinds={"head"},
    needs={"batches", "contrast", "labels", "taps", "per_token"},
    claims={"finite", "length"},
    departs="The sign is turned, so that the highest scores matter most. A corrupt prompt has no earlier mention of "
    "its query: where one is asked for, the place of another row's mention is read, drawn by seed, which among prompts "
    "of one form is the reference's random label. Rows that lack the place are left out and counted. Where queries "
    "share keys or values, a receiver's shared one is replaced.",
)
def path_patching(
    context: Context, *, receivers: Selection | None = None, into: str = "logits", at: str = "end", query: str = "end-2"
) -> Scores:
    """Score each head by how much its corrupt output lowers the answer's probability along paths to the receivers.

    With every head frozen at what it does on the clean prompt, except the sender at its place, which does what it does
    on the corrupt one, and FFNs computed anew, the receivers' inputs at that place are recorded; then the clean prompt
    is run with these inputs alone replaced. The score is the mean over prompts of (p - p_patched) / p, p being the
    answer's probability; 0 for heads from which no path leads to a receiver.

    Args:
        context: model, sites of kind "head", batches with answers, and as contrast a corrupt prompt for each.
        receivers: the heads that are reached; none for "logits".
        into: what of them: "logits", "queries", "keys" or "values".
        at: the place of senders and of the receivers' inputs; see `core.prompts.places`.
        query: the place whose token "mention" is like.

    Returns:
        Scores; the card holds how many `rows` have the place.

    Raises:
        RequestError: receivers without `into` or the other way round, prompts that do not come in pairs, or no prompt
            that has the place.
    """
    one_of(into, INTO, what="end of a path")
    if (receivers is not None and len(receivers) > 0) != (into != "logits"):
        raise RequestError(
            f"into={into!r} with {0 if receivers is None else len(receivers)} receivers",
            expected="receivers for queries, keys and values, none for logits",
            do="path_patching(receivers=heads, into='queries')",
        )
    run = _Run(context, receivers, into)
    total = {n: torch.zeros(s.n, dtype=torch.float64) for n, s in context.sites.items()}
    rows = 0
    rng = context.generator("path_patching", at)
    prompts = list(paired(context.batches, context.contrast))
    places = [place(clean, at, query=query) for clean, _ in prompts]
    if at.startswith("mention"):
        others = _drawn(prompts, places, rng)
    else:
        others = [place(corrupt, at) for _, corrupt in prompts]
    for (clean, corrupt), here, there in zip(prompts, places, others):
        pair = both(clean, corrupt, here, there)
        if len(pair[2]):
            rows += len(pair[2])
            for name, drops in run.drops(*pair).items():
                total[name] += drops
    if not rows:
        raise RequestError(
            f"prompts none of which has the place {at!r}", expected="some that do", do="choose another at= or query="
        )
    card = {"into": into, "at": at, "query": query, "rows": rows, "receivers": receivers and receivers.digest}
    return scored(context, {n: v / rows for n, v in total.items()}, card)


def _drawn(prompts: Sequence[tuple[Batch, Batch]], places: Sequence[Placed], rng: torch.Generator) -> list[Placed]:
    """Return in each corrupt prompt the place of some row's mention, counted from the end: of any row of the data, so
    that the draw does not depend on how rows are batched."""
    far = torch.cat([(ends(clean) - here.at)[here.found].cpu() for (clean, _), here in zip(prompts, places)])
    if not len(far):
        return list(places)
    counts = [len(here.at) for here in places]
    picks = far[torch.randint(len(far), (sum(counts),), generator=rng)].split(counts)
    return [
        Placed(on_tokens(corrupt, ends(corrupt) - pick.to(here.at.device)))
        for (_, corrupt), here, pick in zip(prompts, places, picks)
    ]


class _Run:
    """Path patching on one model."""

    def __init__(self, context: Context, receivers: Selection | None, into: str) -> None:
        self.model, self.senders = context.model, context.sites
        # Heads that are not asked about are frozen all the same.
        self.heads = sites_of(context.model, "head")
        odd = next((name for name in context.sites if name not in self.heads), None)
        if odd is not None:
            raise RequestError(f"the site {odd!r}", expected="heads, tapped at their outputs", do="units='head', no at")
        self.reached: dict[str, Site] = {}
        self.ids: dict[str, Tensor] = {}
        order = {name: i for i, name in enumerate(self.heads)}
        self.ahead = len(order)
        if receivers is not None and into != "logits":
            made = projections(context.model, into)
            chosen = {n: ids for n, ids in receivers.ids.items() if len(ids)}
            for name, ids in chosen.items():
                site = made[name]
                self.reached[site.name] = site
                self.ids[site.name] = (ids // (self.heads[name].n // site.n)).unique()
            self.ahead = max(order[n] for n in chosen)
        self.order = order

    def drops(self, clean: Batch, corrupt: Batch, here: Tensor, there: Tensor) -> dict[str, Tensor]:
        """Return the sum over rows of (p - p_patched) / p for each head, float64 [n]."""
        before, after = capture(self.model, self.heads, clean), capture(self.model, self.heads, corrupt)
        rows, answer = torch.arange(len(here)), answers(clean)
        here, there = here.cpu(), there.cpu()
        p = self._logp(clean, answer)
        found = {}
        for name, site in self.senders.items():
            drops = torch.zeros(site.n, dtype=torch.float64)
            for h in range(site.n) if self.order[name] < self.ahead else ():
                frozen = before[name].clone()
                frozen[rows, here, h] = after[name][rows, there, h]
                patched = self._patched(clean, {**before, name: frozen}, here, answer)
                drops[h] = -torch.expm1(patched - p).sum()
            found[name] = drops
        return found

    def _patched(self, clean: Batch, frozen: Mapping[str, Tensor], here: Tensor, answer: Tensor) -> Tensor:
        """Return the answers' log-probabilities with one sender corrupt along its paths to the receivers."""
        inputs: dict[str, Tensor] = {}

        def keep(name: str, x: Tensor) -> Tensor | None:
            inputs[name] = x.detach().clone()
            return None

        recording: Any = change(self.model, self.reached, keep) if self.reached else nullcontext()
        with change(self.model, self.heads, lambda name, x: frozen[name].to(x)), recording:
            direct = self._logp(clean, answer)
        if not self.reached:
            return direct
        rows = torch.arange(len(here))

        def put(name: str, x: Tensor) -> Tensor:
            made = x.clone()
            for h in self.ids[name].tolist():
                made[rows, here, h] = inputs[name][rows, here, h]
            return made

        with change(self.model, self.reached, put):
            return self._logp(clean, answer)

    def _logp(self, batch: Batch, answer: Tensor) -> Tensor:
        return said(self.model, batch).gather(1, answer[:, None])[:, 0].cpu()
