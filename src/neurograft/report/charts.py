"""The report's charts, each from its part of the report's data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from neurograft.report._fit import shortened, spread
from neurograft.report._svg import (
    WIDTH,
    Scale,
    dot,
    drawing,
    f,
    fitted,
    high_end,
    line,
    low_end,
    padded,
    path,
    rect,
    scale,
    ticks,
    words,
    x_axis,
    y_axis,
    y_room,
)
from neurograft.report.words import counted, interval, number

Data = Mapping[str, Any]
NAMED = 8


def tradeoff(gain: Data, domains: Data, judged: Data) -> str:
    """Draw every kept domain's loss against the task's gain, with the random changes of the same size in grey."""
    measure = gain["measures"].get("likelihood") or gain["measures"][gain["by"]]
    x, nulls = measure["change"], measure["noise_floor"]["nulls"]
    losses = {name: found["loss"]["measures"]["loss"] for name, found in domains.items()}
    limit = min(judged[name]["tests"]["loss"]["limit"] for name in losses)
    xs = padded([x["value"], low_end(x), high_end(x), *nulls])
    seen = [(low_end(m["change"]), high_end(m["change"]), *m["noise_floor"]["nulls"]) for m in losses.values()]
    ys = padded([*(v for one in seen for v in one), limit * 1.5])
    left, right, top, bottom = y_room(*ys, 44) + 14, WIDTH - 12, 12, 218
    at_x, at_y = scale(*xs, left, right), scale(*ys, bottom, top)
    allowed, middle = at_y(limit), at_x(x["value"])
    body = [rect(left, allowed, right - left, bottom - allowed, "allowed")]
    body += [rect(at_x(low_end(x)), top, at_x(high_end(x)) - at_x(low_end(x)), bottom - top, "span")]
    body += y_axis(at_y, *ys, left, right)
    body += x_axis(at_x, *xs, bottom, top, f"gain: {measure['unit']} →", middle=(left + right) / 2)
    body += [line(left, allowed, right, allowed, "edge")]
    unit = next(iter(losses.values()))["unit"].partition(" per ")[0]
    body += [words(9, (top + bottom) / 2, f"loss: {unit} →", "t s up", anchor="middle")]
    for m in losses.values():
        body += [dot(at_x(a), at_y(b), 2.5, "null") for a, b in zip(nulls, m["noise_floor"]["nulls"])]
    for name, m in losses.items():
        y, status = m["change"], judged[name]["status"].replace(" ", "-")
        body += [line(middle, at_y(low_end(y)), middle, at_y(high_end(y)), f"whisker {status}")]
    for name, m in losses.items():
        value, status = m["change"]["value"], judged[name]["status"]
        told = f"{name}, {status}: loss {number(value, sign=True)}, gain {number(x['value'], sign=True)}"
        body += [dot(middle, at_y(value), 5, f"point {status.replace(' ', '-')}", title=told)]
    # The labels are those of the largest losses: what matters if not all of them fit.
    most = sorted(losses, key=lambda name: -losses[name]["change"]["value"])[:NAMED]
    body += _names(most, [at_y(losses[name]["change"]["value"]) for name in most], middle, (left, right, top, bottom))
    told = ", ".join(
        f"{name} {number(losses[name]['change']['value'], sign=True)} ({judged[name]['status']})" for name in most
    )
    told += f", and {len(losses) - NAMED} more" if len(losses) > NAMED else ""
    title = f"Loss of kept domains against a gain of {number(x['value'], sign=True)} {measure['unit']}: {told}"
    return drawing(body, 252, title=title)


def _names(names: Sequence[str], ys: Sequence[float], x: float, frame: tuple[float, float, float, float]) -> list[str]:
    """Write the domains' names beside their points, moved apart where they would overlap, then with a line."""
    left, right, top, bottom = frame
    side = -1 if x > (left + right) / 2 else 1
    found = []
    for name, y, place in zip(names, ys, spread(ys, top + 4, bottom - 4, 13)):
        if abs(place - y) > 5:
            found.append(line(x + side * 6, y, x + side * 16, place, "lead"))
        found.append(
            words(x + side * 18, place + 4, shortened(name, 20), "t s halo", anchor="end" if side < 0 else "start")
        )
    return found


def interval_bar(change: Data, limit: float, ends: tuple[float, float], status: str, *, zone: str = "allowed") -> str:
    """Draw one interval against 0 and a zone that ends at the limit, small enough for a table."""
    at = _bar_scale(ends)
    edge = at(max(min(limit, ends[1]), ends[0]))
    body = [rect(at(ends[0]), 3, edge - at(ends[0]), 16, zone), line(at(0), 1, at(0), 21, "zero")]
    body += [line(at(low_end(change)), 11, at(high_end(change)), 11, f"whisker {status}")]
    body += [dot(at(change["value"]), 11, 4, f"point {status}")]
    title = f"{number(change['value'], sign=True)}, {interval(change)}"
    return drawing(body, 22, title=title, width=180)


def bar_axis(ends: tuple[float, float], title: str) -> str:
    """Draw the axis of a table's intervals, for the head of their column."""
    at = _bar_scale(ends)
    body = []
    for tick in fitted(at, *ends):
        body += [words(at(tick), 11, number(tick), "t s", anchor="middle"), line(at(tick), 16, at(tick), 21, "zero")]
    return drawing(body, 22, title=title, width=180)


def _bar_scale(ends: tuple[float, float]) -> Scale:
    return scale(*ends, 14, 166)


def distribution(found: Data, unit: str) -> str:
    """Draw how many items changed by how much; what got worse lies right of the line."""
    edges, counts = found["histogram"]["edges"], found["histogram"]["counts"]
    ends = (min(edges[0], 0.0), max(edges[-1], 0.0))
    left, right, top, bottom = 54, WIDTH - 12, 10, 112
    most = max(counts) * 1.05
    at_x, at_y = scale(*ends, left, right), scale(0, most, bottom, top)
    change = found["measures"]["loss"]["change"]
    body = []
    for tick in (t for t in ticks(0, most, 3) if t == int(t)):
        body += [
            line(left, at_y(tick), right, at_y(tick), "grid"),
            words(left - 5, at_y(tick) + 4, number(tick), "t s", anchor="end"),
        ]
    body += [words(9, (top + bottom) / 2, "items", "t s up", anchor="middle")]
    body += x_axis(at_x, *ends, bottom, top, f"change of loss, {unit}", middle=(left + right) / 2, gap=22)
    for low, high, count in zip(edges, edges[1:], counts):
        kind = "bar bad" if low + high > 0 else "bar good"
        kind = "bar null" if low <= 0 <= high and edges[0] == -0.5 else kind
        body.append(
            rect(at_x(low) + 0.5, at_y(count), max(1.5, at_x(high) - at_x(low) - 1), bottom - at_y(count), kind)
        )
    body += [line(at_x(0), top, at_x(0), bottom, "zero strong")]
    mean = at_x(min(max(change["value"], ends[0]), ends[1]))
    body += [f'<path d="M{f(mean)} {f(bottom + 1)}l-5 8h10z" class="mean"/>']
    title = f"Change of the loss of {counted(found['items'], 'item')}: mean {number(change['value'], sign=True)} {unit}"
    return drawing(body, 153, title=title)


def reliability(found: Data) -> str:
    """Draw accuracy against confidence for base and change; the diagonal is perfect calibration."""
    left, right, top, bottom = 54, 254, 8, 208
    at_x, at_y = scale(0, 1, left, right), scale(0, 1, bottom, top)
    body = [*y_axis(at_y, 0, 1, left, right), *x_axis(at_x, 0, 1, bottom, top, "confidence", middle=(left + right) / 2)]
    body += [words(9, (top + bottom) / 2, "accuracy", "t s up", anchor="middle")]
    body += [line(at_x(0), at_y(0), at_x(1), at_y(1), "curve floor")]
    for which, kind in (("base", "null"), ("new", "change")):
        bins = found["reliability"][which]
        total = sum(bins["places"]) or 1
        shown = [(c, a, n) for c, a, n in zip(bins["confidence"], bins["accuracy"], bins["places"]) if n]
        # Faint, since a line gives a bin of one place the weight of one of a thousand; dots are as large as their bins.
        body.append(path([(at_x(c), at_y(a)) for c, a, _ in shown], f"curve faint {kind}"))
        for c, a, n in shown:
            told = f"confidence {number(c)}, accuracy {number(a)}, {n:.0f} places"
            body.append(dot(at_x(c), at_y(a), 1.5 + 6.5 * math.sqrt(n / total), f"mark {kind}", title=told))
    ece = found["measures"]["ece"]
    body += [words(266, 30, "base", "t s base"), words(266, 44, f"ECE {number(ece['base'])}", "t s")]
    body += [words(266, 70, "changed", "t s change"), words(266, 84, f"ECE {number(ece['changed'])}", "t s")]
    told = f"calibration error (ECE) {number(ece['base'])} in the base, {number(ece['changed'])} when changed"
    return drawing(body, 240, title=f"Accuracy against confidence in {found['bins']} bins: {told}")
