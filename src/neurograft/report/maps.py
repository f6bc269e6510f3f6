"""Where a change sits: the neuron map, drift and damage by layer, each from its part of the report's data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from neurograft.report._svg import (
    WIDTH,
    dot,
    drawing,
    f,
    high_end,
    line,
    low_end,
    padded,
    path,
    rect,
    scale,
    shortened,
    words,
    x_axis,
    y_axis,
)
from neurograft.report.words import MINUS, number

Data = Mapping[str, Any]
LEVELS = 5
ROWS = 64


def neuron_map(parameters: Sequence[Data], layers: Sequence[str]) -> str:
    """Draw which units of which parameters were touched; the stronger the change, the darker."""
    rows = [(_label(p["name"], p["layer"], layers), p["units"]["norms"], p["layer"]) for p in parameters]
    if len(rows) > ROWS:
        rows = _gathered(parameters, layers)
    rows = rows[: 2 * ROWS]
    left, right, height = 118, WIDTH - 4, 12
    most = max((max(norms, default=0.0) for _, norms, _ in rows), default=0.0)
    squares: list[list[str]] = [[] for _ in range(LEVELS)]
    body, y, last = [], 4.0, None
    for label, norms, layer in rows:
        y += 5 if last is not None and layer != last else 0
        last, width = layer, (right - left) / len(norms)
        body += [
            words(left - 6, y + height - 3, label, "t s", anchor="end"),
            rect(left, y, right - left, height - 2, "lane"),
        ]
        for i, norm in enumerate(norms):
            if norm > 0:
                level = min(LEVELS - 1, int(LEVELS * math.sqrt(norm / most)))
                squares[level].append(
                    f"M{f(left + i * width)} {f(y)}h{f(max(width, 1.2))}v{height - 2}h-{f(max(width, 1.2))}z"
                )
        y += height
    body += [f'<path d="{"".join(s)}" class="heat h{i}"/>' for i, s in enumerate(squares) if s]
    body += [words(left, y + 12, "first unit", "t s"), words(right, y + 12, "last unit", "t s", anchor="end")]
    return drawing(body, y + 18, title=f"Touched units in {len(parameters)} parameters, row by row")


def _gathered(parameters: Sequence[Data], layers: Sequence[str]) -> list[tuple[str, list[float], str]]:
    """Return one row a layer: its parameters' bins, summed as squares."""
    found: dict[str, list[float]] = {}
    for p in parameters:
        norms = p["units"]["norms"]
        sums = found.setdefault(p["layer"], [0.0] * 96)
        for i in range(96):
            sums[i] += norms[i * len(norms) // 96] ** 2
    return [(_label("", layer, layers), [math.sqrt(s) for s in sums], layer) for layer, sums in found.items()]


def _label(name: str, layer: str, layers: Sequence[str]) -> str:
    """Return a short name: the layer's number and what follows it."""
    if layer not in layers:
        return shortened(name or layer, 20)
    rest = re.sub(r"\.weight$", "", name[len(layer) + 1 :])
    return shortened(f"{layers.index(layer)} {rest.rpartition('self_attn.')[2]}".strip(), 20)


def weight_bars(found: Sequence[Data], layers: Sequence[str]) -> str:
    """Draw the relative size of the change in every layer."""
    rows = [(_label("", r["name"], layers), r["relative"], f"{r['entries']:,} numbers") for r in found]
    return _columns(rows, "norm of the change / of the parameters", "Weight drift by layer")


def _columns(rows: Sequence[tuple[str, float, str]], unit: str, title: str) -> str:
    left, right, top, bottom = 44, WIDTH - 8, 10, 150
    ends = padded([v for _, v, _ in rows])
    at, width = scale(*ends, bottom, top), (right - left) / max(1, len(rows))
    body = y_axis(at, *ends, left, right)
    every = -(-len(rows) // 16)
    for i, (label, value, more) in enumerate(rows):
        x = left + i * width
        bar = min(width * 0.7, 26)
        shape = rect(x + (width - bar) / 2, at(value), bar, bottom - at(value), "bar change")
        body.append(f"<g><title>{label}: {number(value)}, {more}</title>{shape}</g>")
        if i % every == 0:
            body.append(words(x + width / 2, bottom + 13, shortened(label, 8), "t s", anchor="middle"))
    body.append(words((left + right) / 2, bottom + 28, f"{unit}, by layer", "t s", anchor="middle"))
    return drawing(body, bottom + 34, title=title)


def drift_lines(domains: Mapping[str, Data], key: str) -> str:
    """Draw a representation drift along the layers, one line a domain; its noise floor is dashed."""
    left, right, top, bottom = 48, WIDTH - 12, 10, 150
    series = {name: found["layers"] for name, found in domains.items()}
    values = [layer[key]["value"] for layers in series.values() for layer in layers]
    floors = [layer["noise_floor"][key]["value"] for layers in series.values() for layer in layers]
    ends, count = padded([*values, *floors]), max(len(layers) for layers in series.values())
    at_y, at_x = scale(*ends, bottom, top), scale(0, max(1, count - 1), left + 8, right - 8)
    body = y_axis(at_y, *ends, left, right)
    for i, (name, layers) in enumerate(series.items()):
        body.append(
            path([(at_x(j), at_y(la["noise_floor"][key]["value"])) for j, la in enumerate(layers)], "curve floor")
        )
        body.append(path([(at_x(j), at_y(la[key]["value"])) for j, la in enumerate(layers)], f"curve c{i % 4}"))
        for j, layer in enumerate(layers):
            told = f"{name}, layer {j}: {number(layer[key]['value'])}"
            body.append(dot(at_x(j), at_y(layer[key]["value"]), 2.5, f"mark c{i % 4}", title=told))
    every = -(-count // 12)
    body += [words(at_x(j), bottom + 13, str(j), "t s", anchor="middle") for j in range(0, count, every)]
    name = f"1 {MINUS} " + ("CKA" if key == "cka_drift" else "cosine")
    body.append(words((left + right) / 2, bottom + 28, f"{name} of the output, by layer", "t s", anchor="middle"))
    return drawing(body, bottom + 34, title=f"Representation drift by layer, {name}")


def damage_bars(found: Data, layers: Sequence[str], *, most: int = 16) -> str:
    """Draw how much loss goes with each part of the change, the most harmful first."""
    parts = found["parts"][:most]
    left, right, height = 96, WIDTH - 10, 16
    ends = padded([v for p in parts for v in (low_end(p["change"]), high_end(p["change"]))])
    at, bottom = scale(*ends, left, right), 8 + height * len(parts)
    body = x_axis(at, *ends, bottom, 4, "loss that goes when the part is taken out, nats", middle=(left + right) / 2)
    for i, part in enumerate(parts):
        y, change = 8 + i * height + height / 2, part["change"]
        kind = "bad" if change["value"] > 0 else "good"
        x = sorted((at(0), at(change["value"])))
        layer = _layer_in(part["name"], layers)
        label = f"layer {layers.index(layer)}" if part["name"] in layers else _label(part["name"], layer, layers)
        body += [words(left - 6, y + 4, shortened(label, 16), "t s", anchor="end")]
        body += [rect(x[0], y - 5, x[1] - x[0], 10, f"bar {kind}")]
        body += [line(at(low_end(change)), y, at(high_end(change)), y, "whisker")]
    return drawing(body, bottom + 34, title="Where the loss sits")


def _layer_in(name: str, layers: Sequence[str]) -> str:
    return next((layer for layer in layers if name == layer or name.startswith(f"{layer}.")), name)
