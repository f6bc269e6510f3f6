"""The report's charts, each from its part of the report's data."""

from __future__ import annotations

import math
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
from neurograft.report.words import interval, number

Data = Mapping[str, Any]


def tradeoff(gain: Data, domains: Data, judged: Data) -> str:
    """Draw every kept domain's loss against the task's gain, with the random changes of the same size in grey."""
    measure = gain["measures"].get("likelihood") or gain["measures"][gain["by"]]
    x, nulls = measure["change"], measure["noise_floor"]["nulls"]
    losses = {name: found["loss"]["measures"]["loss"] for name, found in domains.items()}
    limits = [judged[name]["tests"]["loss"]["limit"] for name in losses]
    xs = padded([x["value"], low_end(x), high_end(x), *nulls])
    ys = padded(
        [v for m in losses.values() for v in (low_end(m["change"]), high_end(m["change"]))] + [max(limits) * 1.5]
    )
    left, right, top, bottom = 48, WIDTH - 12, 12, 218
    at_x, at_y = scale(*xs, left, right), scale(*ys, bottom, top)
    allowed = at_y(max(min(max(limits), ys[1]), ys[0]))
    body = [rect(left, allowed, right - left, bottom - allowed, "allowed")]
    body += y_axis(at_y, *ys, left, right)
    body += x_axis(at_x, *xs, bottom, top, f"gain: {measure['unit']} →", middle=(left + right) / 2)
    unit = next(iter(losses.values()))["unit"].partition(" per ")[0]
    body += [words(12, (top + bottom) / 2, f"loss: {unit} →", "t s up", anchor="middle")]
    for m in losses.values():
        body += [dot(at_x(a), at_y(b), 2.5, "null") for a, b in zip(nulls, m["noise_floor"]["nulls"])]
    for name, m in losses.items():
        y, status = m["change"], judged[name]["status"].replace(" ", "-")
        body += [line(at_x(low_end(x)), at_y(y["value"]), at_x(high_end(x)), at_y(y["value"]), f"whisker {status}")]
        body += [line(at_x(x["value"]), at_y(low_end(y)), at_x(x["value"]), at_y(high_end(y)), f"whisker {status}")]
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
    body += [line(at(low_end(change)), 11, at(high_end(change)), 11, f"whisker {status}")]
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


def reliability(found: Data) -> str:
    """Draw accuracy against confidence for base and change; the diagonal is perfect calibration."""
    left, right, top, bottom = 48, 248, 8, 208
    at_x, at_y = scale(0, 1, left, right), scale(0, 1, bottom, top)
    body = [*y_axis(at_y, 0, 1, left, right), *x_axis(at_x, 0, 1, bottom, top, "confidence", middle=(left + right) / 2)]
    body += [words(10, (top + bottom) / 2, "accuracy", "t s up", anchor="middle")]
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
    body += [words(260, 30, "base", "t s null"), words(260, 44, f"ECE {number(ece['base'])}", "t s")]
    body += [words(260, 70, "changed", "t s change"), words(260, 84, f"ECE {number(ece['changed'])}", "t s")]
    return drawing(body, 240, title=f"Accuracy against confidence in {found['bins']} bins")
