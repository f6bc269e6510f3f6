"""How each verb's result is written and shown."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from neurograft.cli.show import Shown, dump, human, plain, size, table_of
from neurograft.core.resolve import resolve


def scores(found: Any, target: Path | None, shown: Shown, *, proof: Any = None, reason: str = "") -> None:
    """Write scores, show the best units, and what they are worth or why that is not known."""
    written = found.save(target) if target else None
    best = found.top(count=min(10, sum(s.n for s in found.sites.values())))
    rows = [
        {"site": name, "unit": int(i), "score": float(found.values[name][i])}
        for name, ids in best.ids.items()
        for i in ids
    ]
    rows.sort(key=lambda row: -row["score"])
    total = sum(s.n for s in found.sites.values())
    shown.result(
        {
            "path": str(written),
            "units": total,
            "top": rows,
            "evidence": {"none": reason} if proof is None else plain(proof),
            "card": plain(found.card),
        },
        lines=[
            f"no evidence: {reason}" if proof is None else f"evidence: {proof.sentence}",
            f"{total} units scored: {written}",
        ],
        table=table_of(rows),
    )


def selection(found: Any, target: Path | None, shown: Shown) -> None:
    """Write a selection and show how it is spread over the layers."""
    written = found.save(target) if target else None
    layers: Counter[Any] = Counter()
    for name, count in found.counts().items():
        layers[found.sites[name].layer] += count
    rows = [{"layer": "-" if k is None else k, "units": v} for k, v in sorted(layers.items(), key=lambda p: str(p[0]))]
    shown.result(
        {"path": str(written), "chosen": len(found), "of": found.total, "numbers": found.numel, "layers": rows},
        lines=[f"{len(found)} of {found.total} units, {found.numel} numbers: {written}"],
        table=table_of(rows),
    )


def evidence(found: Any, target: Path | None, shown: Shown) -> None:
    """Show evidence, its verdict first."""
    facts = plain(found)
    _write(facts, target)
    rows = [{"what": k, "value": v} for k, v in facts.items() if isinstance(v, (int, float, str)) and k != "sentence"]
    shown.result(facts, lines=[str(getattr(found, "sentence", ""))], table=table_of(rows))


def graft(found: Any, target: Path | None, shown: Shown, more: Sequence[str] = ()) -> None:
    """Write a graft and say what it holds, then `more`."""
    written = found.save(target or Path("graft"))
    facts = {"path": str(written), "numbers": found.numel, "tensors": len(found.deltas), "identity": found.identity}
    facts["base"] = plain(found.card.get("base"))
    shown.result(
        facts, lines=[f"{found.numel} numbers in {len(found.deltas)} tensors, {size(written)}: {written}", *more]
    )


def tuned(found: Any, target: Path | None, shown: Shown) -> None:
    """Write a trained graft and say what it holds and how the loss went."""
    losses, steps = found.card.get("losses") or [], found.card.get("steps")
    graft(
        found,
        target,
        shown,
        [f"{steps} steps, loss {losses[0]:.4g} at first, {losses[-1]:.4g} at last"] if losses else [],
    )


def trimmed(found: Any, target: Path | None, shown: Shown) -> None:
    """Write a trimmed graft and say what was left out and what that changed."""
    cut = found.card["trim"]
    what = ", ".join(cut["left_out"]) or "nothing: every kept domain was within its tolerance"
    lines = [f"left out: {what}"]
    if not cut["reached"]:
        lines.append("some kept domain still loses more than its tolerance")
    for when in ("before", "after") if cut["left_out"] else ("after",):
        kept = ", ".join(f"{name} {-lost:+.4g}" for name, lost in cut[when]["losses"].items())
        lines.append(f"{when}: task {cut[when]['gain']:+.4g}, {kept} nats per place")
    graft(found, target, shown, lines)


def edit(found: Any, target: Path | None, shown: Shown) -> None:
    """Write an edit and say how far it does what was asked."""
    written = found.save(target or Path("graft"))
    shares = {k: found.card[k] for k in ("reliability", "rephrase", "locality") if k in found.card}
    facts = {"path": str(written), "numbers": found.numel, "tensors": len(found.deltas), "identity": found.identity}
    facts |= {"requests": len(found.card["requests"]), **shares}
    lines = [f"{len(found.card['requests'])} requests in {len(found.deltas)} tensors, {size(written)}: {written}"]
    shown.result(facts, lines=[*lines, *([", ".join(f"{k} {v:.1%}" for k, v in shares.items())] if shares else [])])


def report(found: Any, target: Path | None, shown: Shown) -> None:
    """Write an audit's report and show its verdict; exit 3 says do not ship."""
    written = found.save(target) if target else None
    facts = plain(found)
    lines = [str(getattr(found, "sentence", found.verdict))]
    lines += [f"report: {written}"] if written else ["no page written: give -o FOLDER"]
    shown.result(facts, lines=lines)
    if found.exit_status:
        raise typer.Exit(found.exit_status)


def path(found: Any, target: Path | None, shown: Shown) -> None:
    """Say where something was written."""
    shown.result({"path": str(found)}, lines=[f"written: {found} ({size(Path(found))})"])


def data(found: Any, target: Path | None, shown: Shown) -> None:
    """Show plain data."""
    facts = plain(found)
    _write(facts, target)
    if isinstance(facts, list) and facts and isinstance(facts[0], Mapping):
        shown.result(facts, table=table_of(facts))
    elif isinstance(facts, Mapping):
        shown.result(facts, lines=[f"{k}: {_short(v)}" for k, v in facts.items()])
    else:
        shown.result(facts, lines=map(str, facts) if isinstance(facts, list) else [str(facts)])


def _write(facts: Any, target: Path | None) -> None:
    """Write plain data as JSON where a path was given."""
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(dump(facts) + "\n", encoding="utf-8")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else dump(value)
    return text if len(text) < 400 else text[:400] + " ..."


def plan(found: Mapping[str, Any], target: Path | None, shown: Shown) -> None:
    """Show what a recipe would touch and cost."""
    _write(found, target)
    rows = found["parameters"] if isinstance(found["parameters"], Sequence) else []
    rows = [] if isinstance(rows, str) else [{**r, "shape": "x".join(map(str, r["shape"]))} for r in rows]
    lines = [f"{found['trainable']} trainable numbers" + (f" ({found['fraction']:.2%})" if "fraction" in found else "")]
    if found["units"]:
        lines.append(f"{found['units']['chosen']} of {found['units']['of']} units")
    if isinstance(found["parameters"], str):
        lines.append(f"parameters: {found['parameters']}")
    lines += [f"{name}: {human(count)}" for name, count in found["bytes"].items()]
    shown.result(found, lines=lines, table=table_of(rows) if rows else None)


def anatomy(found: Any, target: Path | None, shown: Shown) -> None:
    """Show the units of a model, or the families whose anatomy was verified."""
    facts = plain(found)
    _write(facts, target)
    rows = next((v for v in facts.values() if isinstance(v, list)), []) if isinstance(facts, Mapping) else facts
    lines = [f"{k}: {v}" for k, v in facts.items() if not isinstance(v, list)] if isinstance(facts, Mapping) else []
    lines += [f"{r['architecture']}: {r['reason']}" for r in rows if r.get("reason") and "architecture" in r]
    rows = [{k: v for k, v in r.items() if k != "reason" or "architecture" not in r} for r in rows]
    shown.result(facts, lines=lines, table=table_of(rows) if rows else None)


def papers(found: Sequence[Mapping[str, Any]], target: Path | None, shown: Shown) -> None:
    """Show papers, working ones first; one alone with what there is to know of it."""
    _write(list(found), target)
    if len(found) == 1:
        shown.result(list(found), lines=[f"{k}: {_said(v)}" for k, v in _one_paper(found[0]).items() if v])
        return
    working = sum(bool(row["working"]) for row in found)
    rows = [
        {"name": row["recipe"] or row["slug"], "room": row["room"], "proof": _standing(row), "title": row["title"]}
        for row in sorted(found, key=lambda row: (not row["working"], row["recipe"] is None))
    ]
    lines = [f"{working} of {len(rows)} papers work in this version; neurograft papers NAME tells of one"]
    shown.result(list(found), lines=lines, table=table_of(rows))


def _standing(row: Mapping[str, Any]) -> str | None:
    return row["scale"] if row["working"] else row["proof"] if row["recipe"] else None


def _one_paper(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a paper's row with how its recipe is run and which options that has."""
    if row["recipe"] is None:
        return {**row, "working": "not in this version"}
    options = inspect.signature(resolve(f"neurograft.recipes.{row['recipe']}")).parameters.values()
    shown = [f"{p.name}={p.default}" for p in options if p.default is not inspect.Parameter.empty]
    return {**row, "run": f"neurograft run {row['recipe']} MODEL DATA", "options": " ".join(shown)}


def _said(value: Any) -> str:
    return "yes" if value is True else str(value)


def citations(found: Sequence[str], target: Path | None, shown: Shown) -> None:
    """Show the papers to cite, a line each, and write them if a path is given."""
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join(f"{line}\n" for line in found), encoding="utf-8")
    shown.result(list(found), lines=found or ["no paper: nothing here was made by a paper's method"])


def demo(found: Any, target: Path | None, shown: Shown) -> None:
    """Show the demo's first sentence, its tables and the report's path."""
    facts = plain(found)
    shown.result(facts, lines=[*facts.get("lines", [facts.get("sentence", "")])])


def outcome(found: Any, target: Path, shown: Shown) -> None:
    """Write what a recipe made."""
    if found.state.get("graft") is not None:
        tuned(found.graft, target, shown)
    elif found.state.get("report") is not None:
        report(found.report, target, shown)
    else:
        rest = {k: v for k, v in found.state.items() if v is not None}
        data(rest, None, shown)
