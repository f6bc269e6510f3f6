"""Cards of single units on the page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from neurograft.report.words import MINUS, number

Data = Mapping[str, Any]
AROUND, LISTED, SHADES = 10, 5, 4


def card(found: Data) -> str:
    """Return one unit's card, of what `ng.neuron` found."""
    unit, said = found["unit"], found.get("description") or []
    title = f"{unit['site']}:{unit['id']}"
    lines = [f"<h3>{escape(title)}</h3>\n"]
    if said:
        lines.append(f'<p class="said">{escape(said[0]["text"])}</p>\n')
    facts = [("change of its numbers", f"norm {number(found['changed_by'])}")] if "changed_by" in found else []
    facts += _facts(found, said[1:])
    lines.append('<dl class="facts">\n' + "".join(f"<dt>{escape(k)}</dt><dd>{v}</dd>\n" for k, v in facts) + "</dl>\n")
    lines += [_exemplar(one) for one in found.get("exemplars") or ()]
    return f'<article class="unit">\n{"".join(lines)}</article>\n'


def _facts(found: Data, said: Sequence[Data]) -> list[tuple[str, str]]:
    """Return names and values, values as HTML."""
    rows = []
    if said:
        rows.append(("also described as", escape("; ".join(d["text"] for d in said))))
    activity = found.get("activity")
    if activity:
        rows.append(("active", f"above 0 at {100 * activity['rate_above_0']:.1f} % of {activity['tokens']:,} places"))
    for key, name, s in (("writes", "its weights", ""), ("silenced_logits", "its activity", "s")):
        effect = found.get(key)
        if effect:
            ways = (("raised", "raise"), ("lowered", "lower"))
            rows += [(f"{name} {verb}{s}", _tokens(effect[way])) for way, verb in ways if effect[way]]
    partners = found.get("partners")
    if partners:
        told = [f"{p['id']} ({number(p['correlation'], sign=True)})" for p in partners[:LISTED]]
        rows.append(("moves with", escape(", ".join(told))))
    silence = found.get("silence")
    if silence:
        rows.append(("when silenced", escape(re.sub(r"(?<!\w)-(?=\d)", MINUS, silence["sentence"]))))
    return rows


def _tokens(listed: Sequence[Data]) -> str:
    return " ".join(f"<code>{_shown(one['token'])}</code>" for one in listed[:LISTED])


def _shown(token: str) -> str:
    """Return a token with its line breaks and tabs made visible."""
    return escape(token.replace("\n", "↵").replace("\t", "⇥")) or "&nbsp;"


def _exemplar(one: Data) -> str:
    """Return an exemplar's tokens around its peak, shaded by activation; of other inputs the peak alone."""
    values, at = one["activations"], one["positions"].index(one["peak"])
    peak = values[at]
    if one["tokens"] is None:
        return f'<p class="text">{number(peak)} at place {one["peak"]} of {len(values)}</p>\n'
    first, last = max(0, at - AROUND), min(len(values), at + AROUND + 1)
    words = []
    for token, value in zip(one["tokens"][first:last], values[first:last]):
        shade = min(SHADES, int(SHADES * value / peak + 0.5)) if peak > 0 and value > 0 else 0
        told = f' title="{number(value)}"'
        words.append(f'<mark class="m{shade}"{told}>{_shown(token)}</mark>' if shade else _shown(token))
    before, after = "… " if first else "", " …" if last < len(values) else ""
    between = "" if any(token[:1].isspace() for token in one["tokens"]) else " "
    return f'<p class="text">{before}{between.join(words)}{after}</p>\n'
