"""Which units a linear probe reads a label from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from neurograft.core.card import method
from neurograft.core.context import Batch, Context, token_mask
from neurograft.core.errors import RequestError, one_of
from neurograft.core.prompts.examples import size
from neurograft.core.selection import Scores
from neurograft.core.taps.cett import shares
from neurograft.core.taps.table import auroc, table
from neurograft.locators._common import need_two_sets, scored
from neurograft.locators._fits import CHUNK, adam, logistic

FITS, SCORES, STATISTICS = ("adam", "l1", "l2"), ("z", "weight"), ("activation", "cett")


@method(
    paper="neurostrike",
    needs={"batches", "contrast", "taps"},
    takes={"positions"},
    claims={"finite", "length", "permutes", "planted"},
    departs="Adam starts at 0, where one run is enough since the problem is convex; runs=k averages k random starts as "
    "published. Padding is left out of the pool; padding=True counts it as published. L1 is liblinear on a working "
    "set of columns, which ends where the whole problem's conditions hold.",
)
def probe(
    context: Context,
    *,
    fit: str = "adam",
    scope: str = "site",
    pool: str = "max",
    statistic: str = "activation",
    others: bool = False,
    padding: bool = False,
    standardize: bool = False,
    score: str = "z",
    epochs: int | None = None,
    lr: float = 1e-3,
    decay: float = 1e-3,
    runs: int = 0,
    C: float = 1.0,
    memory: float = 8.0,
) -> Scores:
    """Score each unit by its weight in a probe that tells `context.batches` (1) from `context.contrast` (0).

    Each example gives one pooled activation a unit; logit(x) = w . x + b. The table takes 4 * examples * units bytes,
    which is checked against `memory` before anything is run.

    Args:
        context: model, sites with taps, batches, contrast, positions (for "max" and "mean").
        fit: "adam" (`epochs` full-batch steps of size `lr` with weight decay `decay`), or logistic regression by
            liblinear with the "l1" or "l2" penalty and C.
        scope: one probe for each "site", or one over "all" units side by side.
        pool: over an example's tokens: "max", "mean", the "last", or the mean over the "answer".
        statistic: "activation", or "cett": a unit's share |a| * ||w_out|| / ||sum of all units' outputs|| of what its
            FFN writes.
        others: add the tokens outside of the answers, of both sets, as examples of 0, so that being an answer token
            tells nothing; with pool="answer".
        padding: let padding count, with "max" and "mean".
        standardize: divide each unit by its standard deviation over the examples first.
        score: "z": |z| with the sign of w, z over the units of a site, so that `above=3` means |z| > 3 and w > 0; or
            the "weight" itself.
        epochs: of the fit; 5000 for "adam", 1000 for liblinear.
        lr: of "adam".
        decay: of "adam".
        runs: random starts to average over; 0 starts once, at 0.
        C: weight of the data under a penalty.
        memory: GiB that the table may take.

    Raises:
        RequestError: one set of examples, units without a tap, a table that is too large, no scikit-learn.
        RunError: liblinear did not converge.
    """
    for value, known, what in ((fit, FITS, "fit"), (scope, ("site", "all"), "scope"), (score, SCORES, "score")):
        one_of(value, known, what=what)
    one_of(statistic, STATISTICS, what="statistic")
    x, y = examples(
        context, pool=pool, statistic=statistic, others=others, padding=padding, standardize=standardize, memory=memory
    )
    intercepts: dict[str, float] = {}
    names = [list(x)] if scope == "all" else [[name] for name in x]
    if fit == "adam":
        weights = _by_adam(context, x, y, names, steps=epochs or 5000, lr=lr, decay=decay, runs=runs)
    else:
        weights = {}
        for group in names:
            wide = torch.cat([x[n] for n in group], 1) if len(group) > 1 else x[group[0]]
            w, intercept = logistic(wide, y, penalty=fit, C=C, steps=epochs or 1000, seed=context.seed)
            weights |= dict(zip(group, w.split([x[n].shape[1] for n in group])))
            intercepts["all" if len(group) > 1 else group[0]] = intercept
    told = {
        "all" if len(group) > 1 else group[0]: auroc(torch.stack([x[n] @ weights[n] for n in group]).sum(0), y)
        for group in names
    }
    card = {"examples": len(y), "positive": int(y.sum()), "train_auroc": told, "fit": fit, "pool": pool}
    if fit != "adam":
        card["intercept"] = intercepts
    card["table_bytes"] = sum(v.numel() * v.element_size() for v in x.values())
    return scored(context, {n: _z(w) for n, w in weights.items()} if score == "z" else weights, card)


def examples(
    context: Context, *, pool: str, statistic: str, others: bool, padding: bool, standardize: bool, memory: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the probe's table, float32 [N, n] for each site, and its labels, float32 [N]."""
    need_two_sets(context)
    sides = [(context.batches, 1.0), (context.contrast, 0.0)]
    count = sum(size(b) for side, _ in sides for b in side) * (2 if others else 1)
    units = sum(site.n for site in context.sites.values())
    needed = 4 * count * units / 2**30
    if needed > memory:
        raise RequestError(
            f"a table of {count} examples by {units} units, {needed:.1f} GiB",
            expected=f"at most memory={memory:g} GiB",
            do="give fewer examples (limit=), fewer layers=, or more memory=",
        )
    each = shares(context.model, context.sites) if statistic == "cett" else None
    found, labels = [], []
    for batches, label in sides:
        for outside in (False, True) if others else (False,):
            rows = table(
                context.model,
                context.sites,
                batches,
                pool="mean" if outside else pool,
                positions=_outside if outside else context.positions,
                padding=padding,
                each=each,
            )
            found.append(rows)
            labels.append(torch.full((len(next(iter(rows.values()))),), 0.0 if outside else label))
    x = {name: torch.cat([rows.pop(name) for rows in found]) for name in context.sites}
    if standardize:
        x = {name: v / v.std(0, correction=0).clamp(min=1e-8) for name, v in x.items()}
    return x, torch.cat(labels)


def _outside(batch: Batch) -> Tensor:
    real, answer = token_mask(batch), token_mask(batch, "answer")
    assert real is not None
    assert answer is not None
    return real & ~answer


def _by_adam(
    context: Context, x: Mapping[str, Tensor], y: Tensor, groups: list[list[str]], *, runs: int, **how: Any
) -> dict[str, Tensor]:
    """Fit sites of one size together, as many as a chunk holds."""
    weights: dict[str, Tensor] = {}
    wide = {tuple(g): torch.cat([x[n] for n in g], 1) if len(g) > 1 else x[g[0]] for g in groups}
    for n in {v.shape[1] for v in wide.values()}:
        mine = [g for g, v in wide.items() if v.shape[1] == n]
        room = max(1, CHUNK // (len(y) * n))
        for part in (mine[i : i + room] for i in range(0, len(mine), room)):
            stacked = torch.stack([wide[g] for g in part])
            total = torch.zeros(len(part), n)
            for run in range(max(1, runs)):
                start = None
                if runs:
                    rng = context.generator("probe", run)
                    start = (2 * torch.rand(n + 1, generator=rng) - 1).expand(len(part), -1) / n**0.5
                total += adam(stacked, y, start=start, **how)[0]
            for g, w in zip(part, total / max(1, runs)):
                weights |= dict(zip(g, w.split([x[name].shape[1] for name in g])))
    return {name: weights[name] for name in x}


def _z(w: Tensor) -> Tensor:
    spread = w.std(correction=0)
    z = (w - w.mean()) / spread if spread > 0 else torch.zeros_like(w)
    return z.abs() * w.sign()
