"""What a unit's page is made of: its activity, its exemplars, its effect on the logits, its partners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.context import Batch
from neurograft.core.intervene import Intervention
from neurograft.core.prompts.examples import singles
from neurograft.core.running import run
from neurograft.core.taps.look import look
from neurograft.core.taps.reducers import Exemplars, Extremes, Moments, Rate, Reducer, Sample
from neurograft.core.taps.stream import observe
from neurograft.core.taps.tap import per_unit, watch
from neurograft.core.units import Site

QUANTILES = (0.01, 0.5, 0.9, 0.99)


class Words:
    """Token numbers as text, or as numbers where there is no tokenizer."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)

    def __call__(self, token: int) -> str:
        decode = getattr(self.tokenizer, "decode", None)
        return str(decode([token])) if decode is not None else str(token)


def ends(scores: Tensor, words: Words, top: int) -> dict[str, list[dict[str, Any]]]:
    """Return the tokens at both ends of [V] logit changes."""
    order = scores.argsort(descending=True, stable=True)
    k = min(top, len(order) // 2)
    listed = {"raised": order[:k], "lowered": order.flip(0)[:k]}
    return {
        way: [{"token": words(int(i)), "id": int(i), "logit": float(scores[i])} for i in ids]
        for way, ids in listed.items()
    }


def alone(site: Site, number: int) -> Site:
    """Return a site of that one unit, for reading it without its neighbours."""
    assert site.tap is not None
    return replace(
        site, n=1, parts=(), writes=(), tap=replace(site.tap, start=site.tap.start + number * site.tap.stride)
    )


def active(
    model: nn.Module,
    site: Site,
    number: int,
    batches: Sequence[Batch],
    words: Words,
    *,
    top: int,
    partners: int,
    seed: int,
) -> dict[str, Any]:
    """Return what the activations of one unit show, as plain data."""
    one = {site.name: alone(site, number)}

    def make(n: int) -> dict[str, Reducer]:
        sample = Sample(n, size=4096, seed=seed)
        return {"moments": Moments(n), "rate": Rate(n), "ends": Extremes(n), "sample": sample}

    seen = observe(model, one, batches, make)[site.name]
    best = observe(model, one, batches, lambda n: {"top": Exemplars(n, k=top)}, pool="max")[site.name]["top"]
    moments, rate, limits, sample = (seen[k] for k in ("moments", "rate", "ends", "sample"))
    assert isinstance(moments, Moments)
    assert isinstance(rate, Rate)
    assert isinstance(limits, Extremes)
    assert isinstance(sample, Sample)
    assert isinstance(best, Exemplars)
    rows = [one for batch in batches for one in singles(batch)]
    strongest = [rows[e] for e in best.places[:, 0, 0].tolist() if e >= 0]
    pairs = [(row, _exemplar(model, one, site.name, row, words)) for row in strongest]
    # An expert may get no token of an example that runs alone.
    strongest, exemplars = [r for r, e in pairs if e is not None], [e for _, e in pairs if e is not None]
    return {
        "activity": {
            "tokens": moments.count,
            "mean": float(moments.mean),
            "std": float(moments.variance.sqrt()),
            "rate_above_0": float(rate.rate),
            "largest": float(limits.high),
            "smallest": float(limits.low),
            "quantiles": {str(q): float(sample.quantile(q)) for q in QUANTILES},
        },
        "exemplars": exemplars,
        "silenced_logits": _silenced(model, site, number, strongest, exemplars, words, top),
        "partners": _partners(model, site, number, batches, partners) if site.n > 1 else [],
    }


def _exemplar(model: nn.Module, one: Mapping[str, Site], name: str, row: Batch, words: Words) -> dict[str, Any] | None:
    """Return one example's tokens with the unit's activation at each, and where it peaks; None if it gets no token."""
    places: list[int] = []
    values: list[float] = []

    def read(_: str, x: Tensor) -> None:
        flat = per_unit(x)
        places.extend(found.place()[1].tolist())
        values.extend(flat[:, 0].float().tolist())

    with watch(model, one, read) as found, torch.no_grad():
        look(model, row)
    if not places:
        return None
    at = sorted(range(len(places)), key=lambda i: places[i])
    ids = row.get("input_ids")
    ids = ids[0].tolist() if isinstance(ids, Tensor) and ids.shape[1] > max(places) else None
    return {
        "peak": places[max(at, key=lambda i: values[i])],
        "positions": [places[i] for i in at],
        "tokens": None if ids is None else [words(ids[places[i]]) for i in at],
        "activations": [values[i] for i in at],
    }


def _silenced(
    model: nn.Module,
    site: Site,
    number: int,
    rows: Sequence[Batch],
    exemplars: Sequence[Mapping[str, Any]],
    words: Words,
    top: int,
) -> dict[str, Any] | None:
    """Return what silence takes from the logits at the unit's strongest places; positive: the unit raises them."""
    total, count = None, 0
    for row, exemplar in zip(rows, exemplars):
        step = Intervention(site, torch.tensor([number]), "zero")
        with torch.no_grad():
            plain = run(model, row)
            mounted = step.mount(model)
            try:
                silent = run(model, row)
            finally:
                mounted.remove()
        logits = getattr(plain, "logits", None)
        if logits is None or logits.dim() != 3 or exemplar["peak"] >= logits.shape[1]:
            return None
        change = (logits - silent.logits)[0, exemplar["peak"]].float().cpu()
        total, count = change if total is None else total + change, count + 1
    return None if total is None else {"examples": count, **ends(total / count, words, top)}


def _partners(model: nn.Module, site: Site, number: int, batches: Sequence[Batch], count: int) -> list[dict[str, Any]]:
    """Return the units of the site whose activations correlate most with the unit's, over tokens."""
    sums = torch.zeros(3, site.n, dtype=torch.float64)
    tokens = 0

    def read(_: str, x: Tensor) -> None:
        nonlocal tokens
        x = per_unit(x).double().cpu()
        sums.add_(torch.stack([x.sum(0), x.square().sum(0), (x * x[:, [number]]).sum(0)]))
        tokens += len(x)

    with watch(model, {site.name: site}, read), torch.no_grad():
        for batch in batches:
            look(model, batch)
    if not tokens:
        return []
    mean, square, cross = sums / tokens
    spread = (square - mean.square()).clamp(min=0).sqrt()
    correlation = (cross - mean * mean[number]) / (spread * spread[number]).clamp(min=1e-12)
    correlation[number] = 0
    order = correlation.abs().argsort(descending=True, stable=True)[:count]
    return [{"id": int(i), "correlation": float(correlation[i])} for i in order]
