"""A unit's page in a terminal: what it is about, where it is active, what it writes, and what its silence costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from neurograft.cli.show import Shown, dump, plain
from neurograft.report.words import number

AROUND, LISTED, WIDE = 10, 5, 22
SHADES = ("", "on grey23", "on dark_blue", "bold on blue")


def page(found: Any, target: Path | None, shown: Shown) -> None:
    """Show what `ng.neuron` found, and write it as JSON if a path is given."""
    facts = plain(found)
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(dump(facts) + "\n", encoding="utf-8")
    shown.result(facts, lines=lines(facts))


def lines(found: Mapping[str, Any]) -> list[str | Text]:
    """Return the page's lines; in exemplars the strongest tokens stand between « and », for those without colours."""
    unit, said = found["unit"], found.get("description") or []
    made: list[str | Text] = [Text(f"{unit['site']}:{unit['id']}", style="bold")]
    made += [f"{name:{WIDE}}{text}" for name, text in _facts(found, said)]
    exemplars = found.get("exemplars") or []
    return [*made, *([""] if exemplars else []), *(_exemplar(one) for one in exemplars)]


def _facts(found: Mapping[str, Any], said: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    rows = []
    if said:
        rows.append(("described as", said[0]["text"]))
    if said[1:]:
        rows.append(("or as", "; ".join(one["text"] for one in said[1:LISTED])))
    activity = found.get("activity")
    if activity:
        rows.append(("active", f"above 0 at {100 * activity['rate_above_0']:.1f} % of {activity['tokens']:,} places"))
        rows.append(("activation", f"{number(activity['smallest'])} to {number(activity['largest'])}"))
    for key, name in (("writes", "its weights"), ("silenced_logits", "its activity")):
        for way in ("raised", "lowered"):
            words = [_visible(one["token"]) for one in (found.get(key) or {}).get(way, ())][:LISTED]
            rows += [(f"{name} {way}", "  ".join(words))] if words else []
    partners = [f"{p['id']} ({number(p['correlation'], sign=True)})" for p in found.get("partners") or ()][:LISTED]
    rows += [("moves with", ", ".join(partners))] if partners else []
    return rows + ([("when silenced", found["silence"]["sentence"])] if found.get("silence") else [])


def _visible(token: str) -> str:
    return token.replace("\n", "↵").replace("\t", "⇥").strip(" ") or "␣"


def _exemplar(one: Mapping[str, Any]) -> Text:
    """Return the tokens around an exemplar's peak, darker where the unit is more active; of other inputs the peak."""
    values, at = one["activations"], one["positions"].index(one["peak"])
    peak = values[at]
    if one["tokens"] is None:
        return Text(f"{number(peak):>8}  at place {one['peak']} of {len(values)}")
    first, last = max(0, at - AROUND), min(len(values), at + AROUND + 1)
    apart = not any(token[:1].isspace() for token in one["tokens"])
    made = Text(f"{number(peak):>8}  {'… ' if first else ''}")
    for token, value in zip(one["tokens"][first:last], values[first:last]):
        shade = min(3, int(3 * value / peak + 0.5)) if peak > 0 and value > 0 else 0
        text = token.replace("\n", "↵").replace("\t", "⇥")
        space = text[: len(text) - len(text.lstrip(" "))]
        made.append(space)
        made.append(f"«{text[len(space) :]}»" if shade == 3 else text[len(space) :], style=SHADES[shade])
        made.append(" " if apart else "")
    return made.append("…" if last < len(values) else "")
