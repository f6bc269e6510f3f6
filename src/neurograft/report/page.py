"""The report as one page: HTML, CSS and SVG in a single file, without a script and without the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from neurograft.report import charts
from neurograft.report._parts import document, figure, folded, grid, section
from neurograft.report.neurons import card
from neurograft.report.sections import SHOWN, by_harm, gain_and_loss, where
from neurograft.report.tables import decided_table, facts, prediction_table, tiles
from neurograft.report.words import counted, number, told

Data = Mapping[str, Any]
REASONS = 4  # reasons that are not folded away


def page(data: Data) -> str:
    """Return the page of a report's data; the same data give the same bytes."""
    parts = (_head, gain_and_loss, where, _neurons, _predictions, _decided, _made)
    body = "".join(part(data) for part in parts)
    return document(f"neurograft audit: {data['verdict']['verdict']}", body)


def _head(data: Data) -> str:
    verdict, base = data["verdict"], data["provenance"]["base"]
    kind = verdict["verdict"].replace(" ", "-")
    first, _, why = verdict["sentence"].partition(":")
    told_more = [f"<p>{_unbroken(reason[:1].upper() + reason[1:])}.</p>" for reason in verdict["reasons"][1:]]
    rest = folded(counted(len(told_more) - REASONS, "more reason"), "".join(told_more[REASONS:]))
    more = "".join(told_more[:REASONS]) + rest
    grafts = [g["identity"][:12] for g in data["provenance"]["change"]["grafts"]]
    change = f"graft {', '.join(grafts)}" if grafts else "a tuned model"
    name = told(base.get("name") or base["class"])
    return (
        f'<header>\n<div class="verdict {kind}"><h1><b>{escape(first)}:</b>{_unbroken(why)}</h1>{more}</div>\n'
        f'<p class="over" style="margin-top:14px">neurograft audit of {escape(change)} on {escape(name)}</p>\n'
        f"{tiles(data)}</header>\n"
    )


def _unbroken(text: str) -> str:
    """Return a text for the page, in which no line begins with a % sign."""
    return escape(text).replace(" %", "&nbsp;%")


def _neurons(data: Data) -> str:
    found = data.get("neurons") or ()
    costs = (
        ", what resembles them, and what their silence costs"
        if any(n.get("silence") for n in found)
        else (" and what resembles them, on a few examples")
    )
    lead = (
        "The units whose numbers the change moved furthest, as they are in the base: what they are active at, what "
        f"they write{costs}. Stronger colour: more active."
    )
    cards = [card(one) for one in found]
    none = f"<p>There is no page of a neuron: {escape(data['no_neurons'])}.</p>\n" if "no_neurons" in data else ""
    return section("Neurons", lead, f'<div class="units">\n{"".join(cards)}</div>\n' if cards else none)


def _predictions(data: Data) -> str:
    places = {**({"task": data["task"]} if data["task"] else {}), **data["domains"]}
    order = [name for name in places if name not in data["domains"]] + by_harm(data)
    found = [
        figure(f"Calibration: {name}", charts.reliability(places[name]["calibration"]))
        for name in order
        if "calibration" in places[name]
    ]
    table = prediction_table(places)
    lead = (
        "How far the predictions moved, whatever the labels say, and whether the model still knows how sure it may be."
    )
    if found:
        lead += (
            " In the pictures a model that is right as often as it is sure lies on the dashed line; the larger a dot, "
            "the more places."
        )
    return section("Predictions", lead, grid(found[:SHOWN], found[SHOWN:]), table)


def _decided(data: Data) -> str:
    rules, listed = data["rules"], []
    for name, value in rules.items():
        shown = ", ".join(f"{k}: {v}" for k, v in value.items()) or "none" if isinstance(value, Mapping) else value
        listed.append((name.replace("_", " "), str(shown)))
    lead = (
        "It ships if the gain's interval lies above zero and above its noise floor, and every kept domain's loss "
        "interval ends below noise floor + tolerance. It does not ship if a domain's interval lies beyond that, "
        "corrected for the number of domains. The noise floor is what running the base again, or drawing another "
        "random change of the same size, moves."
    )
    return section("How this was decided", lead, decided_table(data["verdict"]), facts(listed))


def _made(data: Data) -> str:
    made = data["provenance"]
    base, change = made["base"], made["change"]
    rows: list[tuple[str, str]] = [("base", told(base))]
    for graft in change["grafts"]:
        rows.append(
            (
                "graft",
                f"{graft['identity']}: {counted(graft['numbers'], 'number')} in {counted(graft['tensors'], 'tensor')}",
            )
        )
        rows.append(("strength", number(graft["strength"])))
        card: Callable[[str], Any] = graft["card"].get
        rows += [(key, told(card(key))) for key in ("recipe", "selection", "objective", "adapter") if card(key)]
    rows += [
        (f"data: {n}", f"{counted(d['items'], 'item')}, digest {d['digest'][:16]}") for n, d in made["data"].items()
    ]
    rows.append(("seed", str(made["seed"])))
    rows.append(("machine", f"{made['device']}, {counted(made['threads'], 'thread')}"))
    rows += [(name, version) for name, version in made["versions"].items()]
    return section("Provenance", "What was measured, on what, with what.", facts(rows))
