"""The report's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from neurograft.report._fit import shortened
from neurograft.report._svg import padded
from neurograft.report.charts import bar_axis, interval_bar
from neurograft.report.words import DASH, counted, interval, number

Data = Mapping[str, Any]
PICTURE = '<span class="heard">the interval in a picture</span>'


def table(name: str, head: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> str:
    """Return a table that scrolls sideways where it must; cells are HTML, the first of each row names it."""
    top = "".join(f'<th scope="col">{h}</th>' for h in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>\n' for row in rows
    )
    below = f'<p class="note">{note}</p>\n' if note else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}">'
        f"<table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>\n{below}"
    )


def state(status: str) -> str:
    """Return a status in words and colour."""
    return f'<span class="state {status.replace(" ", "-")}">{escape(status)}</span>'


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Return names and values as a list."""
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>\n" for k, v in rows)
    return f'<dl class="facts">\n{items}</dl>\n'


def gain_table(gain: Data, judged: Data) -> str:
    """Return the task's measures."""
    rows = []
    for name, m in gain["measures"].items():
        decides = name == gain["by"]
        status = judged["status"] if decides else ""
        label = f"<b>{escape(name)}</b>" if decides else escape(name)
        floor = judged["floor"] if decides else m["noise_floor"]["value"]
        limit = judged["limit"] if decides else floor
        ends = padded([m["change"]["value"], m["change"]["low"], m["change"]["high"], limit])
        rows.append(
            [
                label + (f"<br><small>{escape(m['unit'])}</small>" if m["unit"] != name else ""),
                state(status) if decides else "",
                number(m["change"]["value"], sign=True),
                interval(m["change"]),
                interval_bar(m["change"], limit, ends, status.replace(" ", "-"), zone="noise"),
                number(limit) if decides else "",
                number(floor),
                number(m["base"]),
                number(m["changed"]),
            ]
        )
    head = ["task", "verdict", "change", "interval", PICTURE, "limit", "noise floor", "base", "changed"]
    note = (
        f"{escape(gain['by']).capitalize()} decides. Dot and line: the change and its interval; thin line: no change; "
        "grey: what is too little to count as a gain. Each line has a scale of its own."
    )
    return table("What was gained on the task", head, rows, note)


def loss_table(domains: Data, judged: Data) -> str:
    """Return every kept domain's loss."""
    shown = [(n, d["loss"], judged[n]["tests"]["loss"]) for n, d in domains.items()]
    values = [
        v
        for _, d, t in shown
        for v in (d["measures"]["loss"]["change"]["low"], d["measures"]["loss"]["change"]["high"], t["limit"])
    ]
    values += [d["measures"]["loss"]["change"]["value"] for _, d, _ in shown]
    ends = padded([v for v in values if v is not None])
    rows = []
    for name, found, test in shown:
        m, status = found["measures"]["loss"], judged[name]["status"]
        rows.append(
            [
                f"{escape(name)}<br><small>{counted(found['items'], 'item')}, {escape(m['unit'])}</small>",
                state(status),
                number(m["change"]["value"], sign=True),
                interval(m["change"]),
                interval_bar(m["change"], test["limit"], ends, status.replace(" ", "-")),
                number(test["limit"]),
                number(test["floor"]),
                number(m["base"]),
                number(m["changed"]),
            ]
        )
    axis = bar_axis(ends, "the interval in a picture")
    head = ["kept domain", "verdict", "change of loss", "interval", axis, "limit", "noise floor", "base", "changed"]
    note = (
        "Dot and line: the change and its interval; thin line: no change; green: what is allowed, up to the limit, "
        "tolerance + noise floor (capped)."
    )
    return table("What was lost on kept domains", head, rows, note)


PREDICTIONS = (
    ("divergence", "kl", "KL(base ‖ changed)"),
    ("divergence", "kl_reverse", "KL(changed ‖ base)"),
    ("divergence", "flips", "top choice flipped"),
    ("calibration", "ece", "ECE"),
    ("calibration", "brier", "Brier"),
)


def prediction_table(places: Mapping[str, Data]) -> str:
    """Return how the predictions moved on task and domains."""
    columns = [c for c in PREDICTIONS if any(c[0] in found for found in places.values())]
    if not columns:
        return ""
    rows = []
    for name, found in places.items():
        cells = [escape(name)]
        for audit, key, _ in columns:
            if audit not in found:
                cells.append(DASH)
                continue
            change = found[audit]["measures"][key]["change"]
            signed = key in ("ece", "brier")
            cells.append(f"{number(change['value'], sign=signed)}<br><small>{interval(change, sign=signed)}</small>")
        rows.append(cells)
    return table("How the predictions moved", ["change, with interval", *(c[2] for c in columns)], rows)


def decided_table(verdict: Data) -> str:
    """Return limits and p-values of every test."""
    rows = []
    for name, domain in verdict["domains"].items():
        for key, test in domain["tests"].items():
            told = [number(test[k]) for k in ("accepted", "excused", "limit", "p", "p_adjusted", "null_mean")]
            rows.append([f"{escape(name)}: {escape(key)}", state(test["status"]), *told])
    if not rows:
        return ""
    head = ["test", "verdict", "tolerance", "+ noise", "= limit", "p", "p, corrected", "mean of random changes"]
    return table("Every test behind the verdict", head, rows)


def tiles(data: Data) -> str:
    """Return the few numbers that say most."""
    made = []
    gain, judged = data["gain"], data["verdict"]
    if gain:
        g = judged["gain"]
        unit = f"{g['unit']}; " if g["unit"] != g["by"] else ""
        made.append((f"gain: {g['by']}", number(g["change"]["value"], sign=True), unit + interval(g["change"])))
    tests = [(n, d["tests"]["loss"]) for n, d in judged["domains"].items()]
    if tests:
        name, worst = max(tests, key=lambda pair: pair[1]["change"]["value"])
        told = f"{worst['unit']}; {interval(worst['change'])}, limit {number(worst['limit'])}"
        made.append((f"loss, worst domain: {shortened(name, 40)}", number(worst["change"]["value"], sign=True), told))
    flips = [(n, d["divergence"]["measures"]["flips"]) for n, d in data["domains"].items() if "divergence" in d]
    if flips:
        name, most = max(flips, key=lambda pair: pair[1]["change"]["value"])
        made.append(("top choices flipped, at most", f"{100 * most['change']['value']:.1f} %", name))
    weights = data["whole"].get("weight_drift")
    if weights:
        share = 100 * weights["entries"] / max(1, weights["total"])
        made.append(("numbers touched", f"{weights['entries']:,}", f"{share:.3g} % of {weights['total']:,}"))
    cells = "".join(
        f'<div class="tile"><dt>{escape(a)}</dt><dd class="big">{escape(b)}</dd>'
        f'<dd class="small">{escape(c)}</dd></div>\n'
        for a, b, c in made
    )
    return f'<dl class="tiles">\n{cells}</dl>\n'
