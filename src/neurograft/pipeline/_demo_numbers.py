"""From the demo's runs to its numbers: chosen learning rates, paired intervals, and one first sentence."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from neurograft.core.seeds import generator
from neurograft.pipeline._demo_data import Correction
from neurograft.pipeline._demo_runs import LOCATED, Run
from neurograft.report.words import listed

DRAWS, LEVEL = 2000, 0.95
LEARNED = 0.95  # a rate counts only if English validation questions are answered so well
Corrections = Mapping[int, Correction]


def transferred(run: Run, corrections: Corrections, test: str = "transfer") -> float:
    """Return accuracy in the other languages where the country's name differs from the English one."""
    rows = corrections[run.seed].tests[test]
    return float(run.answers[test].right[[r["other_name"] for r in rows]].mean())


def harm(run: Run, bases: Mapping[int, Run], test: str = "old") -> float:
    """Return the mean rise of old answers' loss over the base, in nats."""
    return float((run.answers[test].loss - bases[run.seed].answers[test].loss).mean())


def chosen_rates(runs: Sequence[Run], corrections: Corrections, bases: Mapping[int, Run]) -> dict[str, dict]:
    """Choose every contender's learning rate on validation phrasings, by two rules.

    "far": the best transfer; "careful": the least harm to old answers. Both among the rates that learn the
    correction in English (else among all).
    """
    found: dict[str, dict[str, float]] = {"far": {}, "careful": {}}
    for contender in dict.fromkeys(r.contender for r in runs):
        mine: dict[float, list[Run]] = {}
        for run in runs:
            if run.contender == contender:
                mine.setdefault(run.rate, []).append(run)
        gained = {rate: _mean(float(r.answers["gain_val"].right.mean()) for r in rs) for rate, rs in mine.items()}
        able = [rate for rate in mine if gained[rate] >= LEARNED] or [max(gained, key=lambda rate: gained[rate])]
        far = {rate: _mean(transferred(r, corrections, "transfer_val") for r in mine[rate]) for rate in able}
        hurt = {rate: _mean(harm(r, bases, "old_val") for r in mine[rate]) for rate in able}
        found["far"][contender] = max(able, key=lambda rate: far[rate])
        found["careful"][contender] = min(able, key=lambda rate: hurt[rate])
    return found


def _mean(values: Any) -> float:
    return statistics.fmean(values)


def clusters(runs: Sequence[Run], corrections: Corrections, bases: Mapping[int, Run]) -> dict[str, dict]:
    """Return per-cluster means of a contender's runs: transfer by (seed, country), harm by (seed, question)."""
    transfer: dict[Any, list[float]] = {}
    loss: dict[Any, list[float]] = {}
    for run in runs:
        tests = corrections[run.seed].tests
        for row, right in zip(tests["transfer"], run.answers["transfer"].right.tolist()):
            if row["other_name"]:
                transfer.setdefault((run.seed, row["subject"]), []).append(right)
        rise = run.answers["old"].loss - bases[run.seed].answers["old"].loss
        for i, value in enumerate(rise.tolist()):
            loss.setdefault((run.seed, i), []).append(value)
    return {"transfer": transfer, "loss": loss}


def paired(a: Mapping[Any, list[float]], b: Mapping[Any, list[float]], *, name: str) -> dict[str, float]:
    """Return the mean of a - b and its bootstrap interval, drawing whole clusters (countries, questions).

    Example:
        >>> paired({1: [1.0], 2: [1.0]}, {1: [0.0], 2: [0.0]}, name="x")
        {'difference': 1.0, 'low': 1.0, 'high': 1.0}
    """
    sums = torch.tensor([[sum(a[k]) - sum(b[k]), float(len(a[k]))] for k in a], dtype=torch.float64)
    drawn = torch.randint(len(sums), (DRAWS, len(sums)), generator=generator(0, "demo.paired", name))
    totals = sums[drawn].sum(1)
    ratios: Tensor = totals[:, 0] / totals[:, 1]
    tail = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = ratios.quantile(tail).tolist()
    value = float(sums[:, 0].sum() / sums[:, 1].sum())
    return {"difference": round(value, 4), "low": round(low, 4), "high": round(high, 4)}


def summary(runs: Sequence[Run], corrections: Corrections) -> dict[str, Any]:
    """Return all numbers of the demo as plain data."""
    bases = {r.seed: r for r in runs if r.contender == "base"}
    trained = [r for r in runs if r.contender != "base"]
    rates = chosen_rates(trained, corrections, bases)
    data: dict[str, Any] = {"rates": rates, "runs": [_point(r, corrections, bases) for r in trained]}
    for rule, by in rates.items():
        mine = {c: [r for r in trained if r.contender == c and r.rate == rate] for c, rate in by.items()}
        data[rule] = {
            "contenders": {c: _row(rs, corrections, bases) for c, rs in mine.items()},
            "located_minus": _against(mine, corrections, bases),
        }
    data["forgetting"] = {by: _cells(trained, rates["far"], corrections, bases, key) for by, key in _KEYS.items()}
    data["sentence"] = sentence(data["far"]["located_minus"])
    return data


_KEYS = {"skill": "skill", "language": "language"}


def _point(run: Run, corrections: Corrections, bases: Mapping[int, Run]) -> dict[str, Any]:
    same = [not r["other_name"] for r in corrections[run.seed].tests["transfer"]]
    found = {
        "gain": float(run.answers["gain"].right.mean()),
        "half_time": run.half,
        "unheard": float(run.answers["unheard"].right.mean()),
        "transfer": transferred(run, corrections),
        "transfer_same_name": float(run.answers["transfer"].right[same].mean()) if any(same) else None,
        "old": float(run.answers["old"].right.mean()),
        "harm": harm(run, bases),
        "other_capitals": float(run.answers["capitals"].right.mean()),
    }
    about = {"contender": run.contender, "rate": run.rate, "seed": run.seed}
    return about | {k: None if v is None else round(v, 4) for k, v in found.items()}


def _row(runs: Sequence[Run], corrections: Corrections, bases: Mapping[int, Run]) -> dict[str, Any]:
    points = [_point(r, corrections, bases) for r in runs]
    row: dict[str, Any] = {"rate": runs[0].rate, "seeds": len(runs), "trained": runs[0].trained}
    for key in points[0]:
        values = [p[key] for p in points if p[key] is not None]
        if key not in ("contender", "rate", "seed") and values:
            row[key] = round(_mean(values), 4)
            row[key + "_sd"] = round(statistics.stdev(values), 4) if len(values) > 1 else None
    row["step_ms"] = round(1000 * statistics.median(r.step for r in runs), 1)
    row["saved_bytes"] = round(_mean(r.saved for r in runs))
    return row


def _against(
    mine: Mapping[str, Sequence[Run]], corrections: Corrections, bases: Mapping[int, Run]
) -> dict[str, dict[str, Any]]:
    all_clusters = {c: clusters(rs, corrections, bases) for c, rs in mine.items()}
    located = all_clusters[LOCATED]
    return {
        c: {
            "transfer": paired(located["transfer"], other["transfer"], name=f"transfer {c}"),
            "harm": paired(located["loss"], other["loss"], name=f"harm {c}"),
        }
        for c, other in all_clusters.items()
        if c != LOCATED
    }


def _cells(
    runs: Sequence[Run], rates: Mapping[str, float], corrections: Corrections, bases: Mapping[int, Run], key: str
) -> dict[str, dict[str, dict[str, float]]]:
    """Return old accuracy and harm by skill or language, at the rates of the rule "far"."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for contender, rate in rates.items():
        right: dict[str, list[float]] = {}
        rise: dict[str, list[float]] = {}
        for run in (r for r in runs if r.contender == contender and r.rate == rate):
            more = run.answers["old"].loss - bases[run.seed].answers["old"].loss
            for i, row in enumerate(corrections[run.seed].tests["old"]):
                right.setdefault(row[key], []).append(float(run.answers["old"].right[i]))
                rise.setdefault(row[key], []).append(float(more[i]))
        found[contender] = {
            cell: {"accuracy": round(_mean(right[cell]), 4), "harm": round(_mean(rise[cell]), 4)} for cell in right
        }
    return found


def sentence(against: Mapping[str, Mapping[str, Any]]) -> str:
    """Say whether located neurons beat random ones, LoRA and full fine-tuning, or not."""
    far = _said(against, "transfer", better=1, digits=2)
    kept = _said(against, "harm", better=-1, digits=3)
    return (
        f"Corrected in English and asked in German, French and Spanish, located neurons {far} (answers right); "
        f"in what was to stay, they {kept} (nats of loss)."
    )


def _said(against: Mapping[str, Mapping[str, Any]], measure: str, *, better: int, digits: int) -> str:
    groups: dict[str, list[str]] = {"beat": [], "did not beat": [], "did worse than": []}
    for contender, found in against.items():
        low, high = sorted((better * found[measure]["low"], better * found[measure]["high"]))
        verb = "beat" if low > 0 else "did worse than" if high < 0 else "did not beat"
        groups[verb].append(f"{contender} {found[measure]['difference']:+.{digits}f}")
    return ", ".join(f"{verb} {listed(names)}" for verb, names in groups.items() if names)
