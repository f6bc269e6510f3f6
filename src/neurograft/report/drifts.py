"""How far weights and representations drifted, layer by layer, each from its part of the report's data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from neurograft.report._fit import shortened, spread, wide
from neurograft.report._svg import WIDTH, Scale, dot, drawing, padded, path, rect, scale, titled, words, y_axis, y_room
from neurograft.report.maps import OUTSIDE, label_of
from neurograft.report.words import MINUS, counted, number

Data = Mapping[str, Any]
COLOURS = 4


def weight_bars(found: Sequence[Data], layers: Sequence[str]) -> str:
    """Draw the relative size of the change in every layer."""
    ends = padded([r["relative"] for r in found])
    left, right, top, bottom = y_room(*ends, 44), WIDTH - 8, 10, 150
    at, width = scale(*ends, bottom, top), (right - left) / max(1, len(found))
    body = y_axis(at, *ends, left, right)
    places = {i: left + (i + 0.5) * width for i in range(len(found))}
    for i, row in enumerate(found):
        bar = min(width * 0.7, 26)
        shape = rect(places[i] - bar / 2, at(row["relative"]), bar, bottom - at(row["relative"]), "bar change")
        told = f"{label_of('', row['name'], layers)}: {number(row['relative'])}, {counted(row['entries'], 'number')}"
        body.append(titled(shape, told))
    body += _under([label_of("", r["name"], layers) for r in found], list(places.values()), bottom + 14, right)
    body.append(
        words(
            (left + right) / 2, bottom + 29, "norm of the change / of the parameters, by layer", "t s", anchor="middle"
        )
    )
    return drawing(
        body, bottom + 35, title=f"Weight drift by layer, at most {number(max(r['relative'] for r in found))}"
    )


def _under(labels: Sequence[str], places: Sequence[float], y: float, right: float) -> list[str]:
    """Write labels under their places: the last one if it is no layer's, and of the others as many as there is room."""
    shown, free = list(range(len(labels))), math.inf
    if labels[-1] == OUTSIDE[1]:
        half = 3.3 * wide(labels[-1])
        middle = min(places[-1], right + 8 - half)
        shown, free = shown[:-1], middle - half - 4
    gap = 6.6 * max((wide(labels[i]) for i in shown), default=0) + 6
    every = max(1, math.ceil(gap / (places[1] - places[0]))) if len(places) > 1 else 1
    fits = [i for i in shown[::every] if places[i] + 3.3 * wide(labels[i]) < free]
    found = [words(places[i], y, labels[i], "t s", anchor="middle") for i in fits]
    return found if len(shown) == len(labels) else [*found, words(middle, y, labels[-1], "t s", anchor="middle")]


def drift_lines(domains: Mapping[str, Data], key: str) -> str:
    """Draw a representation drift along the layers, one line a domain; its noise floor is dashed.

    Of many domains those that drift furthest are in colour and named, all others grey.
    """
    series = {name: found["layers"] for name, found in domains.items()}
    far = sorted(series, key=lambda name: -max(layer[key]["value"] for layer in series[name]))
    named = list(series) if len(series) <= COLOURS else far[:COLOURS]
    values = [layer[key]["value"] for layers in series.values() for layer in layers]
    floors = [layer["noise_floor"][key]["value"] for name in named for layer in series[name]]
    ends, count = padded([*values, *floors]), max(len(layers) for layers in series.values())
    left, right, top, bottom = y_room(*ends, 48), WIDTH - 96, 10, 150
    at_y, at_x = scale(*ends, bottom, top), scale(0, max(1, count - 1), left + 8, right - 8)
    body = y_axis(at_y, *ends, left, right)
    for name in named:
        body.append(_curve([at_y(la["noise_floor"][key]["value"]) for la in series[name]], at_x, "curve floor"))
    for name in sorted(series, key=lambda name: name in named):
        kind = f"c{named.index(name)}" if name in named else "null"
        body.append(_curve([at_y(la[key]["value"]) for la in series[name]], at_x, f"curve {kind}"))
        for j, layer in enumerate(series[name]):
            told = f"{name}, layer {j}: {number(layer[key]['value'])}"
            body.append(
                dot(at_x(j), at_y(layer[key]["value"]), 2.5 if name in named else 2, f"mark {kind}", title=told)
            )
    lasts = [at_y(series[name][-1][key]["value"]) for name in named]
    for i, (name, y) in enumerate(zip(named, spread(lasts, top, bottom, 13))):
        body.append(words(right, y + 4, shortened(name, 14), f"t s c{i}"))
    every = -(-count // 8)
    body += [words(at_x(j), bottom + 14, str(j), "t s", anchor="middle") for j in range(0, count, every)]
    what = f"1 {MINUS} " + ("CKA" if key == "cka_drift" else "cosine")
    body.append(words((left + right) / 2, bottom + 29, f"{what} of the output, by layer", "t s", anchor="middle"))
    most = ", ".join(f"{n} {number(max(layer[key]['value'] for layer in series[n]))}" for n in named)
    return drawing(body, bottom + 35, title=f"Representation drift by layer, {what}, at most: {most}")


def _curve(ys: Sequence[float], at_x: Scale, kind: str) -> str:
    """Draw a line through the layers; of a single layer a dash."""
    xs = [at_x(j) for j in range(len(ys))]
    return path(list(zip(xs, ys)) if len(ys) > 1 else [(xs[0] - 8, ys[0]), (xs[0] + 8, ys[0])], kind)
