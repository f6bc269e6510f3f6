"""Does a selection matter more than chance? Silencing it against matched controls, on data of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.audits._scoring import scored
from neurograft.audits._silence import chosen_sites, drawn, matched, silenced, sizes
from neurograft.audits._statistics import expanded
from neurograft.core.card import method
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError, one_of
from neurograft.core.progress import Progress, quiet
from neurograft.core.prompts.examples import singles
from neurograft.core.seeds import derive, generator
from neurograft.core.selection import Selection
from neurograft.core.taps.stream import means

Loss = Callable[[nn.Module, Batch], Tensor]
FAMILIES = {"random": "random units", "magnitude": "equally active units", "no_sinks": "random units without sinks"}


@method(needs={"batches", "labels"})
def evidence(
    model: nn.Module,
    where: Selection,
    batches: Sequence[Batch],
    *,
    loss: Loss | None = None,
    controls: int = 20,
    draws: int = 1000,
    level: float = 0.95,
    silence: str = "zero",
    protected: Mapping[str, Selection] | None = None,
    relocate: Callable[[Sequence[Batch]], Selection] | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Silence the selection and, one after another, control selections of the same size in the same sites.

    An effect is the rise in loss (nats for each labelled place) under silence, paired by example. Controls are
    random units of each site; units of the same mean absolute activation; and, where a site has massive or
    attention-sink units, random units without those. The interval of the difference between the selection's
    effect and the mean control's resamples examples and controls together.

    Args:
        model: left as found.
        where: the selection; units without activations are silenced in their weights.
        batches: labelled data, not those the selection was located on.
        loss: (model, batch of one) -> scalar, for models without class labels; None scores the labels.
        controls: how many of each family.
        draws: of the bootstrap.
        level: of the intervals.
        silence: "zero", or "mean": each unit's mean activation over these batches.
        protected: name -> selection to compare with.
        relocate: batches -> a selection, located again on each half of the batches, for stability.
        progress: (items, what) -> items, to show a bar.
        seed: of draws and bootstrap.

    Returns:
        `effect`, `families` (effects of the controls, difference with interval, p-value), `massive` units,
        `protected` overlaps, `stability`, `verdict` and `sentence`, as plain data.

    Raises:
        RequestError: nothing is selected, no controls, fewer than two labelled examples, or an unknown silence.
    """
    one_of(silence, ("zero", "mean"), what="silence")
    if not len(where):
        raise RequestError("evidence for no unit", expected="a selection of at least one", do="select some units")
    if controls < 1 or draws < 1:
        raise RequestError(
            f"controls={controls}, draws={draws}", expected="at least one of each", do="leave them out, or use fewer"
        )
    if not 0.5 < level < 1:
        raise RequestError(f"level={level:g}", expected="more than 0.5, below 1", do="give level=0.95")
    base = _losses(model, batches, loss)
    size, massive = sizes(model, where, batches)
    level_at = _levels(model, where, batches) if silence == "mean" else None
    avoid: dict[str, list[int]] = {}
    for unit in massive:
        avoid.setdefault(unit["site"], []).append(unit["unit"])
    # Drawn when their turn comes: all at once they would hold the selection's ids 2 * controls times over.
    plans: list[tuple[str, Callable[[], Selection]]] = [("selection", lambda: where)]
    for i in range(controls):
        own = derive(seed, "control", i)
        plans += [("random", partial(drawn, where, own)), ("magnitude", partial(matched, where, size, own))]
        plans += [("no_sinks", partial(drawn, where, own, avoid))] if avoid else []
    effects: dict[str, list[Tensor]] = {}
    for family, draw in (progress or quiet)(plans, "silencing"):
        with silenced(model, draw(), means=level_at):
            effects.setdefault(family, []).append(_losses(model, batches, loss)[0] - base[0])
    found = _compared(effects, base[1], draws=draws, level=level, seed=seed)
    found |= {
        "units": len(where),
        "of": where.total,
        "sites": {n: len(where.ids[n]) for n in chosen_sites(where)},
        "examples": int((base[1] > 0).sum()),
        "base_loss": float(base[0].sum() / base[1].sum()),
        "silence": silence,
        "controls": controls,
        "massive": massive[:20],
        "protected": {n: where.overlap(other) for n, other in (protected or {}).items()},
        "stability": _stability(where, batches, relocate) if relocate is not None else None,
    }
    return found | dict(zip(("verdict", "sentence"), verdict(found)))


def _levels(model: nn.Module, where: Selection, batches: Sequence[Batch]) -> dict[str, Tensor]:
    sites = chosen_sites(where)
    untapped = [n for n, s in sites.items() if s.tap is None]
    if untapped:
        raise RequestError(
            f"silence='mean' for {untapped[0]}, whose units have no activations",
            expected="units with a tap",
            do="use silence='zero'",
        )
    return means(model, sites, batches)


def _losses(model: nn.Module, batches: Sequence[Batch], loss: Loss | None) -> tuple[Tensor, Tensor]:
    """Return summed loss and number of places of every example, float64 [examples] twice."""
    sums, counts = [], []
    with torch.no_grad():
        for batch in batches:
            if loss is not None:
                each = [float(loss(model, one)) for one in singles(batch)]
                sums.append(torch.tensor(each, dtype=torch.float64))
                counts.append(torch.ones(len(each), dtype=torch.float64))
                continue
            found = scored(model, batch)
            sums.append(found.by_row(-found.log_probs))
            counts.append(found.counts.double())
    number = torch.cat(counts) if counts else torch.zeros(0)
    if int((number > 0).sum()) < 2:
        raise RequestError(
            f"{int((number > 0).sum())} labelled examples",
            expected="at least two",
            do="give more data, and labels unless the model predicts its own input",
        )
    total = torch.cat(sums)
    if not bool(torch.isfinite(total).all()):
        raise RequestError("a loss that is not finite", expected="finite losses", do="check the data and the model")
    return total, number


def _compared(
    effects: Mapping[str, list[Tensor]], number: Tensor, *, draws: int, level: float, seed: int
) -> dict[str, Any]:
    own = effects["selection"][0]
    keep = number > 0
    own, number = own[keep], number[keep]
    tail = expanded((1 - level) / 2, len(own))
    rng = generator(seed, "evidence")
    items = _counts(len(own), draws, rng)
    drawn_own = (items @ own) / (items @ number)
    found: dict[str, Any] = {
        "effect": {"value": float(own.sum() / number.sum()), **_interval(drawn_own, tail)},
        "level": level,
        "families": {},
    }
    for family, rows in effects.items():
        if family == "selection" or not rows:
            continue
        table = torch.stack([row[keep] for row in rows])
        each = table.sum(1) / number.sum()
        among = _counts(len(rows), draws, rng) / len(rows)
        difference = drawn_own - ((among @ table) * items).sum(1) / (items @ number)
        at_least = int((each >= found["effect"]["value"]).sum())
        found["families"][family] = {
            "effects": each.tolist(),
            "mean": float(each.mean()),
            "difference": {"value": found["effect"]["value"] - float(each.mean()), **_interval(difference, tail)},
            "p_value": (1 + at_least) / (1 + len(rows)),
        }
    return found


def _counts(n: int, draws: int, rng: torch.Generator) -> Tensor:
    picked = torch.randint(n, (draws, n), generator=rng)
    return torch.zeros(draws, n, dtype=torch.float64).scatter_add_(1, picked, torch.ones_like(picked).double())


def _interval(values: Tensor, tail: float) -> dict[str, float]:
    return {"low": float(values.quantile(tail)), "high": float(values.quantile(1 - tail))}


def _stability(
    where: Selection, batches: Sequence[Batch], relocate: Callable[[Sequence[Batch]], Selection]
) -> dict[str, Any]:
    rows = [one for batch in batches for one in singles(batch)]
    if len(rows) < 2:
        raise RequestError("one example", expected="two halves of the data", do="give more data")
    halves = [relocate(rows[0::2]), relocate(rows[1::2])]
    return {
        "examples_each": len(rows) // 2,
        "halves": halves[0].overlap(halves[1]),
        "with_selection": [where.overlap(half) for half in halves],
    }


def verdict(found: Mapping[str, Any]) -> tuple[str, str]:
    """Return a word and a sentence: no better than random is said first."""
    families = found["families"]
    random = families["random"]["difference"]
    chosen_units = "the unit" if found["units"] == 1 else f"the {found['units']} units"
    fact = (
        f"silencing {chosen_units} changes the loss by {found['effect']['value']:+.4g} nats per place, "
        f"as many random ones by {families['random']['mean']:+.4g} (difference {random['value']:+.4g}, "
        f"{100 * found['level']:g} % interval {random['low']:+.4g} to {random['high']:+.4g}, "
        f"{found['controls']} controls, {found['examples']} examples)"
    )
    chosen = [m for m in found["massive"] if m["chosen"]]
    note = f" Massive units are among them: {', '.join(str(m['unit']) for m in chosen[:5])}." if chosen else ""
    if random["low"] <= 0 <= random["high"]:
        return "no better than random", f"No better than random: {fact}.{note}"
    if random["high"] < 0:
        return "less than random", f"Matters less than random units: {fact}.{note}"
    for family in ("magnitude", "no_sinks"):
        other = families.get(family, {}).get("difference")
        if other is not None and other["low"] <= 0:
            word = f"no better than {FAMILIES[family]}"
            against = f"{FAMILIES[family]} do as much ({families[family]['mean']:+.4g})"
            return word, f"Better than random, {word}: {fact}; {against}.{note}"
    return "better than its controls", f"Better than random and equally active units: {fact}.{note}"
