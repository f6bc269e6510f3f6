"""The report's charts, each from its part of the report's data."""

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
    line,
    padded,
    path,
    rect,
    scale,
    shortened,
    words,
    x_axis,
    y_axis,
)
from neurograft.report.words import MINUS, interval, number

Data = Mapping[str, Any]
LEVELS = 5
ROWS = 64


def tradeoff(gain: Data, domains: Data, judged: Data) -> str:
    """Draw every kept domain's loss against the task's gain, with the random changes of the same size in grey."""
    measure = gain["measures"].get("likelihood") or gain["measures"][gain["by"]]
    x, nulls = measure["change"], measure["noise_floor"]["nulls"]
    losses = {name: found["loss"]["measures"]["loss"] for name, found in domains.items()}
    limits = [judged[name]["tests"]["loss"]["limit"] for name in losses]
    xs = padded([x["value"], _low(x), _high(x), *nulls])
    ys = padded([v for m in losses.values() for v in (_low(m["change"]), _high(m["change"]))] + [max(limits) * 1.5])
    left, right, top, bottom = 48, WIDTH - 12, 12, 218
    at_x, at_y = scale(*xs, left, right), scale(*ys, bottom, top)
    allowed = at_y(max(min(max(limits), ys[1]), ys[0]))
    body = [rect(left, allowed, right - left, bottom - allowed, "allowed")]
    body += y_axis(at_y, *ys, left, right)
    body += x_axis(at_x, *xs, bottom, top, f"gain: {measure['unit']} →", middle=(left + right) / 2)
    body += [words(12, (top + bottom) / 2, "loss: nats →", "t s up", anchor="middle")]
    for m in losses.values():
        body += [dot(at_x(a), at_y(b), 2.5, "null") for a, b in zip(nulls, m["noise_floor"]["nulls"])]
    for name, m in losses.items():
        y, status = m["change"], judged[name]["status"].replace(" ", "-")
        body += [line(at_x(_low(x)), at_y(y["value"]), at_x(_high(x)), at_y(y["value"]), f"whisker {status}")]
        body += [line(at_x(x["value"]), at_y(_low(y)), at_x(x["value"]), at_y(_high(y)), f"whisker {status}")]
        told = f"{name}: loss {number(y['value'], sign=True)}, gain {number(x['value'], sign=True)}"
        body += [dot(at_x(x["value"]), at_y(y["value"]), 5, f"point {status}", title=told)]
    body += _names(list(losses), [at_y(m["change"]["value"]) for m in losses.values()], at_x(x["value"]), left, right)
    return drawing(body, 252, title="Loss of every kept domain against the gain on the task")


def _names(names: Sequence[str], ys: Sequence[float], x: float, left: float, right: float) -> list[str]:
    """Write the domains' names beside their points, moved apart where they would overlap."""
    anchor, place = ("end", x - 9) if x > (left + right) / 2 else ("start", x + 9)
    found, last = [], -math.inf
    for y, name in sorted(zip(ys, names)):
        last = max(y - 5, last + 11)
        found.append(words(place, last, shortened(name, 24), "t s halo", anchor=anchor))
    return found


def interval_bar(change: Data, limit: float, ends: tuple[float, float], status: str) -> str:
    """Draw one interval against 0 and the limit, small enough for a table."""
    at = scale(*ends, 4, 176)
    body = [
        rect(at(ends[0]), 3, at(min(limit, ends[1])) - at(ends[0]), 16, "allowed"),
        line(at(0), 1, at(0), 21, "zero"),
    ]
    body += [line(at(_low(change)), 11, at(_high(change)), 11, f"whisker {status}")]
    body += [dot(at(change["value"]), 11, 4, f"point {status}")]
    title = f"{number(change['value'], sign=True)}, {interval(change)}"
    return drawing(body, 22, title=title, width=180)


def distribution(found: Data, unit: str) -> str:
    """Draw how many items changed by how much; what got worse lies right of the line."""
    edges, counts = found["histogram"]["edges"], found["histogram"]["counts"]
    ends = (min(edges[0], 0.0), max(edges[-1], 0.0))
    left, right, top, bottom = 12, WIDTH - 12, 8, 110
    at_x, at_y = scale(*ends, left, right), scale(0, max(counts), bottom, top)
    change = found["measures"]["loss"]["change"]
    body = x_axis(at_x, *ends, bottom, top, f"change of loss, {unit}", middle=WIDTH / 2, gap=21)
    for low, high, count in zip(edges, edges[1:], counts):
        kind = "bar bad" if low + high > 0 else "bar good"
        kind = "bar null" if low <= 0 <= high and edges[0] == -0.5 else kind
        body.append(rect(at_x(low) + 0.5, at_y(count), at_x(high) - at_x(low) - 1, bottom - at_y(count), kind))
    body += [line(at_x(0), top, at_x(0), bottom, "zero strong")]
    mean = at_x(min(max(change["value"], ends[0]), ends[1]))
    body += [f'<path d="M{f(mean)} {f(bottom + 1)}l-5 8h10z" class="mean"/>']
    return drawing(body, 152, title=f"Change of the loss by item: mean {number(change['value'], sign=True)}")


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
    ends = padded([v for p in parts for v in (_low(p["change"]), _high(p["change"]))])
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
        body += [line(at(_low(change)), y, at(_high(change)), y, "whisker")]
    return drawing(body, bottom + 34, title="Where the loss sits")


def _layer_in(name: str, layers: Sequence[str]) -> str:
    return next((layer for layer in layers if name == layer or name.startswith(f"{layer}.")), name)


def reliability(found: Data) -> str:
    """Draw accuracy against confidence for base and change; the diagonal is perfect calibration."""
    left, right, top, bottom = 40, 240, 8, 208
    at_x, at_y = scale(0, 1, left, right), scale(0, 1, bottom, top)
    body = [*y_axis(at_y, 0, 1, left, right), *x_axis(at_x, 0, 1, bottom, top, "confidence", middle=(left + right) / 2)]
    body += [line(at_x(0), at_y(0), at_x(1), at_y(1), "curve floor")]
    for which, kind in (("base", "null"), ("new", "change")):
        bins = found["reliability"][which]
        total = sum(bins["places"]) or 1
        shown = [(c, a, n) for c, a, n in zip(bins["confidence"], bins["accuracy"], bins["places"]) if n]
        body.append(path([(at_x(c), at_y(a)) for c, a, _ in shown], f"curve {kind}"))
        for c, a, n in shown:
            told = f"confidence {number(c)}, accuracy {number(a)}, {n:.0f} places"
            body.append(dot(at_x(c), at_y(a), 2 + 5 * math.sqrt(n / total), f"mark {kind}", title=told))
    ece = found["measures"]["ece"]
    body += [words(252, 30, "base", "t s null"), words(252, 44, f"ECE {number(ece['base'])}", "t s")]
    body += [words(252, 70, "changed", "t s change"), words(252, 84, f"ECE {number(ece['changed'])}", "t s")]
    return drawing(body, 240, title=f"Accuracy against confidence in {found['bins']} bins")


def _low(change: Data) -> float:
    return float(change["value"] if change.get("low") is None else change["low"])


def _high(change: Data) -> float:
    return float(change["value"] if change.get("high") is None else change["high"])
