"""The report as one page: HTML, CSS and SVG in a single file, without a script and without the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from neurograft.report import charts, maps
from neurograft.report.neurons import card
from neurograft.report.tables import decided_table, facts, gain_table, loss_table, prediction_table, tiles
from neurograft.report.words import number, told

Data = Mapping[str, Any]


def page(data: Data) -> str:
    """Return the page of a report's data; the same data give the same bytes."""
    verdict = data["verdict"]
    parts = (_head, _tradeoff, _where, _neurons, _predictions, _decided, _made)
    sections = [part(data) for part in parts]
    style = files("neurograft.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>neurograft audit: {escape(verdict['verdict'])}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def _head(data: Data) -> str:
    verdict, base = data["verdict"], data["provenance"]["base"]
    kind = verdict["verdict"].replace(" ", "-")
    first, _, rest = verdict["sentence"].partition(":")
    more = "".join(f"<p>{_unbroken(reason[:1].upper() + reason[1:])}.</p>" for reason in verdict["reasons"][1:])
    grafts = [g["identity"][:12] for g in data["provenance"]["change"]["grafts"]]
    change = f"graft {', '.join(grafts)}" if grafts else "a tuned model"
    name = told(base.get("name") or base["class"])
    return (
        f'<header>\n<div class="verdict {kind}"><h1><b>{escape(first)}:</b>{_unbroken(rest)}</h1>{more}</div>\n'
        f'<p class="over" style="margin-top:14px">neurograft audit of {escape(change)} on {escape(name)}</p>\n'
        f"{tiles(data)}</header>\n"
    )


def _unbroken(text: str) -> str:
    """Return a text for the page, in which no line begins with a % sign."""
    return escape(text).replace(" %", "&nbsp;%")


def figure(title: str, picture: str, caption: str = "", key: str = "", *, kind: str = "one") -> str:
    """Return a captioned picture."""
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="{kind}"><h3>{escape(title)}</h3>{picture}{key}{below}</figure>\n'


def section(title: str, lead: str, *content: str) -> str:
    """Return a titled part of the page; nothing without content."""
    body = "".join(content)
    return f'<section>\n<h2>{escape(title)}</h2>\n<p class="lead">{lead}</p>\n{body}</section>\n' if body else ""


def _grid(figures: Sequence[str]) -> str:
    return f'<div class="grid">\n{"".join(figures)}</div>\n' if figures else ""


def _tradeoff(data: Data) -> str:
    gain, domains, judged = data["gain"], data["domains"], data["verdict"]["domains"]
    pictures, tables = [], []
    if gain and domains:
        key = (
            '<ul class="key"><li><i class="allowed"></i>accepted loss</li>'
            '<li><i class="null"></i>random changes of the same size</li></ul>'
        )
        caption = "Right is a better task, down a smaller loss. Whiskers are intervals over items."
        pictures.append(figure("Gain against loss", charts.tradeoff(gain, domains, judged), caption, key, kind="tall"))
    pictures += [_items(name, domain["loss"]) for name, domain in domains.items()]
    if gain:
        tables.append(gain_table(gain, data["verdict"]["gain"]))
    if domains:
        tables.append(loss_table(domains, judged))
    lead = (
        "Base and changed model answered the same items; every number is a difference on the same item. The small "
        "pictures count items by how their loss changed: right of the line an item got worse, the triangle is the mean."
    )
    return section("Gain and loss", lead, _grid(pictures), *tables)


def _items(name: str, loss: Data) -> str:
    unit, middle = loss["measures"]["loss"]["unit"], loss["quantiles"]
    half = f"{number(middle['0.25'], sign=True)} to {number(middle['0.75'], sign=True)}"
    caption = f"{loss['items']} items, the middle half from {half}"
    return figure(f"Items of {name}", charts.distribution(loss, unit), caption)


def _where(data: Data) -> str:
    weights, found = data["whole"].get("weight_drift"), []
    layers = weights["layer_names"] if weights else []
    if weights and weights["parameters"]:
        share = f"{weights['entries']:,} of {weights['total']:,} numbers"
        caption = f"{share} in {len(weights['parameters'])} parameters. Stronger colour: a larger change."
        found.append(figure("Neuron map", maps.neuron_map(weights["parameters"], layers), caption))
        found.append(figure("Weights, by layer", maps.weight_bars(weights["layers"], layers)))
    drifts = {n: d["representation_drift"] for n, d in data["domains"].items() if "representation_drift" in d}
    for key, title in (("cka_drift", "Representations, by layer"), ("cosine_drift", "Directions, by layer")):
        if drifts:
            found.append(figure(title, maps.drift_lines(drifts, key), key=_lines_key(list(drifts))))
    for name, domain in data["domains"].items():
        parts = domain.get("damage", {}).get("parts")
        if parts:
            caption = f"The whole change costs {number(domain['damage']['whole'], sign=True)} nats here."
            found.append(figure(f"Where the loss sits: {name}", maps.damage_bars(domain["damage"], layers), caption))
    lead = "What was moved, how far the layers' outputs moved with it, and which parts of the change do the harm."
    return section("Where", lead, _grid(found))


def _lines_key(names: Sequence[str]) -> str:
    items = "".join(f'<li><i class="c{i % 4}"></i>{escape(name)}</li>' for i, name in enumerate(names))
    return f'<ul class="key">{items}<li><i class="floor"></i>noise floor</li></ul>'


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
    found = [
        figure(f"Calibration: {name}", charts.reliability(one["calibration"]))
        for name, one in places.items()
        if "calibration" in one
    ]
    table = prediction_table(places)
    lead = (
        "How far the predictions moved, whatever the labels say, and whether the model still knows how sure it may be."
    )
    return section("Predictions", lead, _grid(found), table)


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
        rows.append(("graft", f"{graft['identity']}: {graft['numbers']:,} numbers in {graft['tensors']} tensors"))
        rows.append(("strength", number(graft["strength"])))
        card: Callable[[str], Any] = graft["card"].get
        rows += [(key, told(card(key))) for key in ("recipe", "selection", "objective", "adapter") if card(key)]
    rows += [(f"data: {n}", f"{d['items']} items, digest {d['digest'][:16]}") for n, d in made["data"].items()]
    rows.append(("seed", str(made["seed"])))
    rows.append(("machine", f"{made['device']}, {made['threads']} threads"))
    rows += [(name, version) for name, version in made["versions"].items()]
    return section("Provenance", "What was measured, on what, with what.", facts(rows))
