"""Where a change sits: the neuron map and the damage by layer, each from its part of the report's data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from neurograft.report._fit import shortened
from neurograft.report._svg import (
    WIDTH,
    drawing,
    f,
    high_end,
    line,
    low_end,
    padded,
    rect,
    scale,
    titled,
    words,
    x_axis,
)
from neurograft.report.words import counted, interval, number

Data = Mapping[str, Any]
LEVELS = 5
ROWS, TALL, PARTS = 64, 340, 16
OUTSIDE = ("outside of the layers", "elsewhere")  # what the audit calls it, and what there is room for


def neuron_map(parameters: Sequence[Data], layers: Sequence[str]) -> str:
    """Draw which units of which parameters were touched; the stronger the change, the darker."""
    rows = [(label_of(p["name"], p["layer"], layers), p["units"]["norms"], p["layer"], p["name"]) for p in parameters]
    if gathered(parameters):
        rows = _gathered(parameters, layers)
    left, right, height = 134, WIDTH - 4, min(12.0, TALL / len(rows))
    lane, every = height - 2 if height > 5 else height * 0.75, math.ceil(11 / height)
    most = max((max(norms, default=0.0) for _, norms, *_ in rows), default=0.0)
    squares: list[list[str]] = [[] for _ in range(LEVELS)]
    body, y, last = [], 4.0, None
    for i, (label, norms, layer, name) in enumerate(rows):
        y += 5 if last is not None and layer != last and height == 12 else 0
        last, width = layer, (right - left) / len(norms)
        if i % every == 0:
            body.append(words(left - 6, y + lane / 2 + 4, label, "t s", anchor="end"))
        body.append(titled(rect(left, y, right - left, lane, "lane"), name))
        for j, norm in enumerate(norms):
            if norm > 0:
                level, across = min(LEVELS - 1, int(LEVELS * math.sqrt(norm / most))), f(max(width, 1.2))
                squares[level].append(f"M{f(left + j * width)} {f(y)}h{across}v{f(lane)}h-{across}z")
        y += height
    body += [f'<path d="{"".join(s)}" class="heat h{i}"/>' for i, s in enumerate(squares) if s]
    body += [words(left, y + 12, "first unit", "t s"), words(right, y + 12, "last unit", "t s", anchor="end")]
    what = "layer by layer" if gathered(parameters) else "row by row"
    return drawing(body, y + 18, title=f"Touched units in {counted(len(parameters), 'parameter')}, {what}")


def gathered(parameters: Sequence[Data]) -> bool:
    """Say whether there are too many parameters for a row each, so that a row is a layer."""
    return len(parameters) > ROWS


def tall(parameters: Sequence[Data]) -> bool:
    """Say whether the map takes more room than other pictures."""
    return len(parameters) > 18


def _gathered(parameters: Sequence[Data], layers: Sequence[str]) -> list[tuple[str, list[float], str, str]]:
    """Return one row a layer: its parameters' bins, summed as squares."""
    found: dict[str, list[float]] = {}
    for p in parameters:
        norms = p["units"]["norms"]
        sums = found.setdefault(p["layer"], [0.0] * 96)
        for i in range(96):
            sums[i] += norms[i * len(norms) // 96] ** 2
    return [(label_of("", layer, layers), [math.sqrt(s) for s in sums], layer, layer) for layer, sums in found.items()]


def label_of(name: str, layer: str, layers: Sequence[str]) -> str:
    """Return a short name: the layer's number and what follows it."""
    if layer not in layers:
        return shortened((name or layer).replace(*OUTSIDE), 18)
    rest = re.sub(r"\.weight$", "", name[len(layer) + 1 :])
    return shortened(f"{layers.index(layer)} {rest.rpartition('self_attn.')[2]}".strip(), 18)


def damage_bars(found: Data, layers: Sequence[str]) -> str:
    """Draw how much loss goes with each part of the change, the most harmful first."""
    parts = found["parts"][:PARTS]
    left, right, height = 116, WIDTH - 10, 16
    ends = padded([v for p in parts for v in (low_end(p["change"]), high_end(p["change"]))])
    at, bottom = scale(*ends, left, right), 8 + height * len(parts)
    body = x_axis(at, *ends, bottom, 4, "loss that goes with the part, nats", middle=(left + right) / 2)
    for i, part in enumerate(parts):
        y, change = 8 + i * height + height / 2, part["change"]
        kind = "bad" if change["value"] > 0 else "good"
        x = sorted((at(0), at(change["value"])))
        label = _part_label(part["name"], layers)
        body += [words(left - 6, y + 4, shortened(label, 16), "t s", anchor="end")]
        told = f"{label}: {number(change['value'], sign=True)}, {interval(change)}"
        body += [titled(rect(x[0], y - 5, x[1] - x[0], 10, f"bar pale {kind}"), told)]
        body += [line(at(low_end(change)), y, at(high_end(change)), y, "whisker")]
    first = f"{_part_label(parts[0]['name'], layers)} {number(parts[0]['change']['value'], sign=True)}"
    return drawing(body, bottom + 35, title=f"Loss that goes when a part is taken out, most: {first} nats")


def _part_label(name: str, layers: Sequence[str]) -> str:
    layer = _layer_in(name, layers)
    return f"layer {layers.index(layer)}" if name in layers else label_of(name, layer, layers)


def _layer_in(name: str, layers: Sequence[str]) -> str:
    return next((layer for layer in layers if name == layer or name.startswith(f"{layer}.")), name)
