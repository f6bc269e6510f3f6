"""The page's sections of pictures: gain and loss, and where the change sits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neurograft.report import charts, drifts, maps
from neurograft.report._parts import figure, grid, section
from neurograft.report.reasons import KEPT, LOST, UNSURE
from neurograft.report.tables import gain_table, loss_table
from neurograft.report.words import counted, listed, number

Data = Mapping[str, Any]
SHOWN = 6  # pictures of domains that are not folded away


def by_harm(data: Data) -> list[str]:
    """Return the domains, lost ones first, then by their change of loss."""
    judged, order = data["verdict"]["domains"], (LOST, UNSURE, KEPT)
    return sorted(
        data["domains"],
        key=lambda n: (order.index(judged[n]["status"]), -judged[n]["tests"]["loss"]["change"]["value"]),
    )


def gain_and_loss(data: Data) -> str:
    """Return the section that sets what was gained beside what was lost."""
    gain, domains, judged = data["gain"], data["domains"], data["verdict"]["domains"]
    pictures, tables = [], []
    if gain and domains:
        limits = {d["tests"]["loss"]["limit"] for d in judged.values()}
        accepted = "accepted loss" if len(limits) == 1 else "accepted everywhere"
        key = (
            f'<ul class="key"><li><i class="allowed"></i>{accepted}</li>'
            '<li><i class="span"></i>interval of the gain</li>'
            '<li><i class="null"></i>random changes of the same size</li></ul>'
        )
        caption = "Right: better at the task; down: less lost."
        if len(domains) > charts.NAMED:
            caption += f" Named are the {charts.NAMED} largest losses; all stand in the table."
        pictures.append(figure("Gain against loss", charts.tradeoff(gain, domains, judged), caption, key, kind="tall"))
    items = [_items(name, domains[name]["loss"]) for name in by_harm(data)]
    if gain:
        tables.append(gain_table(gain, data["verdict"]["gain"]))
    if domains:
        tables.append(loss_table(domains, judged))
    lead = (
        "Base and changed model answered the same items; every number is a difference on the same item."
        + " The small pictures count items: right of the line they got worse; the triangle is the mean." * bool(items)
    )
    if any("nats" in d["loss"]["measures"]["loss"]["unit"] for d in domains.values()):
        lead += " 0.7 nats more loss: the right answer is half as likely."
    return section("Gain and loss", lead, grid([*pictures, *items[:SHOWN]], items[SHOWN:]), *tables)


def _items(name: str, loss: Data) -> str:
    unit, middle = loss["measures"]["loss"]["unit"], loss["quantiles"]
    half = f", the middle half from {number(middle['0.25'], sign=True)} to {number(middle['0.75'], sign=True)}"
    caption = counted(loss["items"], "item") + (half if loss["items"] > 3 else "")
    caption += "; the outermost 1 % stand in the end bars" if loss["items"] > 100 else ""
    return figure(f"Items of {name}", charts.distribution(loss, unit), caption)


def where(data: Data) -> str:
    """Return the section on what was moved, how far the layers moved with it, and which parts do the harm."""
    weights, found = data["whole"].get("weight_drift"), []
    layers = weights["layer_names"] if weights else []
    if weights and weights["parameters"]:
        share = f"{weights['entries']:,} of {weights['total']:,} numbers"
        rows = ", a row for each layer" if maps.gathered(weights["parameters"]) else ""
        caption = (
            f"{share} in {counted(len(weights['parameters']), 'parameter')}{rows}. Stronger colour: a larger change."
        )
        kind = "tall" if maps.tall(weights["parameters"]) else "one"
        found.append(figure("Neuron map", maps.neuron_map(weights["parameters"], layers), caption, kind=kind))
        found.append(figure("Weights, by layer", drifts.weight_bars(weights["layers"], layers)))
    moved = {n: d["representation_drift"] for n, d in data["domains"].items() if "representation_drift" in d}
    for key, title in (("cka_drift", "Representations, by layer"), ("cosine_drift", "Directions, by layer")):
        if moved:
            caption = "Dashed: the noise floor."
            if len(moved) > drifts.COLOURS:
                caption += f" Named are the {drifts.COLOURS} of {len(moved)} domains that moved furthest."
            found.append(figure(title, drifts.drift_lines(moved, key), caption))
    harm = [
        _damage(name, data["domains"][name]["damage"], data["domains"][name]["loss"]["items"], layers)
        for name in by_harm(data)
        if data["domains"][name].get("damage", {}).get("parts")
    ]
    told = ["What was moved", *["how far the layers' outputs moved with it"] * bool(moved)]
    told += ["which parts of the change do the harm"] * bool(harm)
    lead = (f"{', '.join(told[:-1])}, and {told[-1]}" if len(told) > 2 else listed(told)) + "."
    return section("Where", lead, grid([*found, *harm[:SHOWN]], harm[SHOWN:]))


def _damage(name: str, damage: Data, items: int, layers: Sequence[str]) -> str:
    of = f"the first {damage['items']} of {items} items" if damage["items"] < items else counted(items, "item")
    caption = f"On {of} the whole change costs {number(damage['whole'], sign=True)} nats."
    if len(damage["parts"]) > maps.PARTS:
        caption += f" The {maps.PARTS} most harmful of {len(damage['parts'])} parts."
    return figure(f"Where the loss sits: {name}", maps.damage_bars(damage, layers), caption)
