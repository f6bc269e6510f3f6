"""Which heads carry a variable: a mask over activations, learned on pairs of prompts that differ in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neurograft.core.asking import asking
from neurograft.core.card import method
from neurograft.core.compact.mask import Mask
from neurograft.core.context import Batch, Context
from neurograft.core.errors import RequestError
from neurograft.core.prompts.answering import both, need_causal, paired
from neurograft.core.prompts.collate import rebatched
from neurograft.core.prompts.places import answers, ends, place
from neurograft.core.running import run
from neurograft.core.selection import Scores, Selection
from neurograft.core.taps.capture import capture
from neurograft.core.taps.tap import change
from neurograft.locators._common import scored

Pair = tuple[Batch, Batch, Tensor, Tensor]
Source = dict[str, Tensor]  # site name -> what its heads did on the counterfactual at its place, [rows, n, w]


@method(
    paper="entity-tracking",
    kinds={"head"},
    needs={"batches", "contrast", "labels", "taps", "per_token", "gradients"},
    claims={"finite", "length", "mask"},
    departs="The last mask is kept, where the reference keeps the one that did best on a quarter of the pairs. The "
    "first half of the pairs trains the mask, the rest tells its accuracy. Rows that lack the place are left out.",
)
def dcm(
    context: Context,
    *,
    heads: Selection | None = None,
    at: str = "end",
    query: str = "end-2",
    lam: float = 0.01,
    lr: float = 0.1,
    epochs: int = 2,
    batch_size: int = 32,
) -> Scores:
    """Score heads by 1 - w, w a mask learned so that patching from the other prompt brings the answer wanted.

    A head's output at its place is w * base + (1 - w) * counterfactual, w in [0, 1] and 1 at the start;
    loss = -logit(wanted) + lam * sum(1 - w), by Adam, w brought back into [0, 1] after every step. Heads whose score
    is above a half (w rounds to 0) carry the variable.

    Args:
        context: model, sites of kind "head", base prompts labelled with the answer that is wanted once the variable is
            patched, and as contrast the counterfactual prompt of each.
        heads: which heads may be patched, such as a group of a circuit; all if None.
        at: the place, in both prompts; see `core.prompts.places`.
        query: the place whose token "mention" is like.
        lam: price of a patched head.
        lr: learning rate.
        epochs: passes over the pairs.
        batch_size: pairs in a step, however the data are batched.

    Returns:
        Scores, 0 for heads outside `heads`; the card holds `accuracy`, the share of the second half of the pairs (of
        all, if there is one) whose wanted answer is the likeliest with the rounded mask.

    Raises:
        RequestError: no causal language model, prompts that do not come in pairs, or none that has the place.
    """
    need_causal(context.model)
    pairs = _placed(context, context.batches, context.contrast, 1, at, query)
    if not pairs:
        raise RequestError(
            f"pairs none of which has the place {at!r}", expected="some that do", do="choose another at= or query="
        )
    may = {n: heads.masks()[n] if heads is not None else torch.ones(s.n) > 0 for n, s in context.sites.items()}
    middle = -(-len(pairs) // 2)
    patch = _Patch(context, may)
    first, rest = (
        _placed(context, [p[0] for p in part], [p[1] for p in part], batch_size, at, query)
        for part in (pairs[:middle], pairs[middle:] or pairs)
    )
    held = patch.learned(first, lam=lam, lr=lr, epochs=epochs)
    accuracy = patch.accuracy(rest, patch.mask.hard(held).float())
    w = dict(zip(context.sites, held.split([s.n for s in context.sites.values()])))
    scores = {n: torch.where(may[n], 1 - w[n], torch.zeros(())) for n in w}
    return scored(context, scores, {"at": at, "query": query, "accuracy": accuracy, "lam": lam})


def _placed(
    context: Context, bases: Sequence[Batch], others: Sequence[Batch], batch_size: int, at: str, query: str
) -> list[Pair]:
    """Return pairs of batches of that size with the place in either, without the rows that lack it."""
    found = []
    for base, other in paired(*(rebatched(context.model, side, batch_size) for side in (bases, others))):
        pair = both(base, other, place(base, at, query=query), place(other, at, query=query))
        found += [pair] if len(pair[2]) else []
    return found


class _Patch:
    """Heads patched by a mask, on one model."""

    def __init__(self, context: Context, may: dict[str, Tensor]) -> None:
        self.model, self.sites, self.may = context.model, context.sites, may
        self.mask = Mask("clamp")

    def learned(self, pairs: list[Pair], *, lam: float, lr: float, epochs: int) -> Tensor:
        """Return the trained w of all heads, float32 [heads]."""
        s = self.mask.start(torch.empty(sum(x.n for x in self.sites.values())), torch.Generator()).requires_grad_(True)
        allowed = torch.cat(list(self.may.values()))
        optimizer, sources = torch.optim.Adam([s], lr=lr), [self._source(pair) for pair in pairs]
        for _ in range(epochs):
            for pair, source in zip(pairs, sources):
                w = self.mask.soft(s)
                with torch.enable_grad(), asking(self.model):
                    logits = self._logits(pair, source, w)
                    loss = lam * (1 - w)[allowed].sum() - logits.gather(1, answers(pair[0])[:, None]).mean().cpu()
                    (pull,) = torch.autograd.grad(loss, s)
                s.grad = pull * allowed
                optimizer.step()
                self.mask.hold_(s.data)
        return s.detach()

    @torch.no_grad()
    def accuracy(self, pairs: list[Pair], w: Tensor) -> float:
        """Return how often the wanted answer is the likeliest."""
        hits = [self._logits(p, self._source(p), w).argmax(1) == answers(p[0]) for p in pairs]
        return float(torch.cat(hits).float().mean())

    def _source(self, pair: Pair) -> Source:
        _, other, _, there = pair
        rows = torch.arange(len(there))
        return {name: x[rows, there.cpu()] for name, x in capture(self.model, self.sites, other).items()}

    def _logits(self, pair: Pair, source: Source, w: Tensor) -> Tensor:
        base, _, here, _ = pair
        rows = torch.arange(len(here))
        shares = dict(zip(self.sites, w.split([s.n for s in self.sites.values()])))

        def mixed(name: str, x: Tensor) -> Tensor:
            old, new = x[rows, here], source[name].to(x)
            share = torch.where(self.may[name], shares[name], torch.ones(())).to(x)
            share = share.reshape(-1, *[1] * (old.dim() - 2))
            made = x.clone()
            made[rows, here] = share * old + (1 - share) * new
            return made

        with change(self.model, self.sites, mixed):
            logits = run(self.model, base).logits
        found: Tensor = logits[rows, ends(base)]
        return found
