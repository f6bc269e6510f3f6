"""The demo's result as one page: the whole cloud of runs, tables, and the proof of the undo."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from neurograft.pipeline._demo_runs import RATES
from neurograft.report._parts import document, figure, grid, section
from neurograft.report._svg import WIDTH, dot, drawing, line, scale, words, x_axis
from neurograft.report.tables import facts, table
from neurograft.report.words import MINUS, interval, number

Data = Mapping[str, Any]
STYLE = """
:root { --d0: #1f5fbf; --d1: #478eb8; --d2: #7b8494; --d3: #a35c00; --d4: #b03a5c; --d5: #00694b; }
@media (prefers-color-scheme: dark) {
  :root { --d0: #82b1ff; --d1: #8fd0ee; --d2: #a5adbb; --d3: #f0ab52; --d4: #ff9db5; --d5: #4fc79a; }
}
h1 { font-size: clamp(17px, 2vw, 21px); }
circle.run { stroke: var(--paper); stroke-width: 1; }
.d0 { fill: var(--d0); } .d1 { fill: var(--d1); } .d2 { fill: var(--d2); }
.d3 { fill: var(--d3); } .d4 { fill: var(--d4); } .d5 { fill: var(--d5); }
.key i.dot { width: 10px; height: 10px; border-radius: 50%; }
""" + "".join(f".key i.k{i} {{ background: var(--d{i}); }}\n" for i in range(6))
LEVEL = "95 %"
# Trainings that broke the model lose a thousand times what careful ones do: the loss axis is logarithmic.
LEAST, TICKS = 0.01, (0.01, 0.03, 0.1, 0.3, 1, 3, 10)


def page(data: Data) -> str:
    """Return the page; the same data give the same bytes."""
    parts = (_head, _clouds, _tables, _forgetting, _undo, _made)
    return document("neurograft demo", "".join(part(data) for part in parts), STYLE)


def _head(data: Data) -> str:
    text = (
        f"{data['facts']} capitals moved. Each contender learned it from English questions, beside old ones, in "
        f"{data['steps']} steps, and was asked in phrasings it was not trained on."
    )
    first, _, second = re.sub(r"(?<!\w)-(?=\d)", MINUS, data["sentence"]).partition("; ")
    rest = f"<p>{escape(second[:1].upper() + second[1:])}</p>\n" if second else ""
    stop = "." if second else ""
    return f'<header>\n<h1>{escape(first)}{stop}</h1>\n{rest}<p class="lead">{escape(text)}</p>\n</header>\n'


def _clouds(data: Data) -> str:
    names = [c for c in RATES if any(r["contender"] == c for r in data["runs"])]
    key = "".join(f'<li><i class="dot k{list(RATES).index(name)}"></i>{escape(name)}</li>' for name in names)
    key = f'<ul class="key">{key}</ul>'
    pictures = [
        figure(
            "Other languages against loss on old questions", _cloud(data, "transfer", "in other languages"), key=key
        ),
        figure("English against loss on old questions", _cloud(data, "gain", "in English"), key=key),
        figure("English at half time", _cloud(data, "half_time", "in English, at half time"), key=key),
    ]
    lead = (
        "One point is one training: every contender, learning rate and seed, not the best alone. Right is a better "
        "correction, down is less forgotten; larger points use the learning rate chosen on validation. Rises below "
        f"{LEAST} stand there."
    )
    return section("The whole cloud", lead, grid(pictures))


def _log(harm: float) -> float:
    return math.log10(max(harm, LEAST))


def _cloud(data: Data, key: str, what: str) -> str:
    runs = data["runs"]
    xs, most = (0.0, 1.03), max(r["harm"] for r in runs)
    left, right, top, bottom = 54, WIDTH - 12, 12, 218
    at_x, linear = scale(*xs, left, right), scale(_log(LEAST), _log(1.3 * max(most, 10 * LEAST)), bottom, top)

    def at_y(harm: float) -> float:
        return linear(_log(harm))

    body = []
    for tick in (t for t in TICKS if LEAST <= t <= 1.3 * most):
        body += [
            line(left, at_y(tick), right, at_y(tick), "grid"),
            words(left - 5, at_y(tick) + 3.5, f"{tick:g}", "t s", anchor="end"),
        ]
    body += x_axis(at_x, *xs, bottom, top, f"right {what} →", middle=(left + right) / 2)
    body += [words(9, (top + bottom) / 2, "loss rise: nats, logarithmic →", "t s up", anchor="middle")]
    order = list(RATES)
    for r in runs:
        big = data["rates"]["far"][r["contender"]] == r["rate"]
        told = f"{r['contender']}, rate {r['rate']:g}, seed {r['seed']}: {r[key]:.2f}, {r['harm']:+.3f}"
        body.append(
            dot(at_x(r[key]), at_y(r["harm"]), 5 if big else 3, f"run d{order.index(r['contender'])}", title=told)
        )
    return drawing(body, 252, title=f"Loss on old questions against answers right {what}")


def _table(name: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return table(name, [escape(h) for h in head], [[escape(c) for c in row] for row in rows])


def _tables(data: Data) -> str:
    far, careful = (
        _contenders(data[rule], name) for rule, name in (("far", "best transfer"), ("careful", "least harm"))
    )
    lead = (
        "Shares of answers that are right as a whole, mean and standard deviation over seeds. Other languages: only "
        "countries whose name differs from the English one. Numbers and files of full fine-tuning are not matched."
    )
    against = [
        [name, *(f"{number(f[k]['difference'], sign=True)} ({interval(f[k])})" for k in ("transfer", "harm"))]
        for name, f in data["far"]["located_minus"].items()
    ]
    head = ["located neurons minus", f"other languages ({LEVEL})", f"loss on old questions ({LEVEL})"]
    return section(
        "Contenders",
        lead,
        "<h3>At the learning rate with the best transfer on validation</h3>",
        far,
        _table("Located neurons against the others", head, against),
        "<h3>At the learning rate with the least harm on validation</h3>",
        careful,
    )


def _contenders(part: Data, name: str) -> str:
    head = ["contender", "numbers", "rate", "half time", "English", "unheard phrasings", "other languages", "same name"]
    head += ["old skills", "loss rise", "other capitals", "ms a step", "saved kB", "file kB"]
    rows = []
    for name, row in part["contenders"].items():
        shares = [
            f"{row[k]:.2f}" + ("" if row.get(f"{k}_sd") is None else f" ± {row[f'{k}_sd']:.2f}")
            for k in ("half_time", "gain", "unheard", "transfer", "transfer_same_name", "old", "harm", "other_capitals")
            if k in row
        ]
        sizes = [f"{row['step_ms']:.0f}", f"{row['saved_bytes'] / 1e3:,.0f}", f"{row['file_bytes'] / 1e3:,.0f}"]
        rows.append([name, f"{row['trained']:,}", f"{row['rate']:g}", *shares, *sizes])
    return _table(f"Contenders at the rate with the {name}", head, rows)


def _forgetting(data: Data) -> str:
    parts = []
    for by, cells in data["forgetting"].items():
        names = list(next(iter(cells.values())))
        rows = [
            [c, *(f"{number(found[n]['harm'], sign=True, digits=2)} ({found[n]['accuracy']:.2f})" for n in names)]
            for c, found in cells.items()
        ]
        parts.append(_table(f"Forgetting by {by}", [f"by {by}", *names], rows))
    lead = "Rise of the loss on old questions in nats and, in brackets, the share still right."
    return section("What was forgotten", lead, *parts)


def _undo(data: Data) -> str:
    undo, graft = data["undo"], data["graft"]
    kept = "the same, bit for bit" if undo["identical"] else "NOT the same"
    rows = [
        ("question", undo["question"]),
        ("base", undo["before"]),
        ("with the graft", undo["during"]),
        ("taken off", undo["after"]),
        ("digest of all weights", f"{undo['digest']}: {kept} as before"),
        ("graft", f"{graft['numbers']:,} numbers, {graft['bytes']:,} bytes, {Path(graft['path']).name}/"),
    ]
    more = ""
    if data.get("report"):
        link = f'<a href="report/{escape(Path(data["report"]["path"]).name)}">audit of this graft</a>'
        more = f"<p>{link}: {escape(data['report']['verdict'])}</p>\n"
    return section("On and off again", "The located neurons' change, of the first seed.", facts(rows), more)


def _made(data: Data) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in data["versions"].items())
    text = (
        f"Seeds {', '.join(map(str, data['seeds']))}; base {data['base'][:16]}; {versions}; {data['processes']} "
        f"processes of one thread; {data['seconds']:.0f} s. Seeds change facts, order, random neurons and LoRA's "
        "starts on one base; how much another base would change is not measured. Step times are medians on a machine "
        "that does other things; they rank nothing finely."
    )
    return section("How this was made", escape(text), "<p></p>")
