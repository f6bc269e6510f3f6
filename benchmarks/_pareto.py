"""The picture of gain against forgetting, a dot for each contender, as one SVG file that follows light and dark."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping
from typing import Any

from neurograft.report._svg import dot, drawing, line, scale, words

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 680, 56, 830, 34, 600
STYLE = (
    "<style>text{font:12px system-ui,'DejaVu Sans',sans-serif;fill:#16181d}.s{fill:#565d6b;font-size:11px}"
    ".name{paint-order:stroke;stroke:#fff;stroke-width:3px}"
    "line{stroke:#e9ecf1}.lead{stroke:#aab2c0}.edge{stroke:#1f5fbf;stroke-width:1.5;stroke-dasharray:4 3}"
    ".one{fill:#7b8494}.best{fill:#1f5fbf}.reference{fill:#b03a00}.paper{fill:#fff}"
    "@media(prefers-color-scheme:dark){text{fill:#eceef2}.s{fill:#a5adbb}line{stroke:#292d36}.paper{fill:#14161b}"
    ".name{stroke:#14161b}.lead{stroke:#4b5362}"
    ".edge{stroke:#82b1ff}.best{fill:#82b1ff}.reference{fill:#ff8a57}}</style>"
)
FLOOR = -3  # a smaller rise, and a fall, stand there
KEY = ("no other is better in both (dashed)", "for comparison: PEFT, full, random", "a paper's recipe")
REFERENCES = ("full fine-tuning", "random neurons", "PEFT LoRA", "PEFT SHiRA", "PEFT Super-Tuning", "full, class means")


def picture(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the picture: right is a better task, up a smaller loss of what was known, dots as large as the graft."""
    rows = {n: r for n, r in found.items() if "none" not in r}
    points = {n: (statistics.fmean(r["test"]), _log(statistics.fmean(r["forgetting"]))) for n, r in rows.items()}
    xs, ys = [x for x, _ in points.values()], [y for _, y in points.values()]
    x_at = scale(min(xs) - 0.03, max(xs) + 0.03, LEFT, RIGHT)
    y_at = scale(min(ys) - 0.1, max(ys) + 0.1, TOP, BOTTOM)
    body = [STYLE, f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>']
    for exponent in range(math.floor(min(ys)), math.ceil(max(ys)) + 1):
        if TOP - 1 <= y_at(exponent) <= BOTTOM + 1:
            body.append(line(LEFT, y_at(exponent), RIGHT, y_at(exponent), ""))
            least = "≤ " if exponent == FLOOR else ""
            body.append(words(LEFT - 6, y_at(exponent) + 4, f"{least}{10.0**exponent:g}", "s", anchor="end"))
    for tenth in range(math.ceil(10 * min(xs)), math.floor(10 * max(xs)) + 1):
        body.append(line(x_at(tenth / 10), TOP, x_at(tenth / 10), BOTTOM, ""))
        body.append(words(x_at(tenth / 10), BOTTOM + 16, f".{tenth}" if tenth < 10 else "1", "s", anchor="middle"))
    front = sorted(n for n in points if not any(_beats(points[m], points[n]) for m in points if m != n))
    front.sort(key=lambda n: points[n][0])
    for a, b in itertools.pairwise(front):
        body.append(line(*_at(points[a], x_at, y_at), *_at(points[b], x_at, y_at), "edge"))
    places: list[tuple[float, float, str, str]] = []
    for name, point in points.items():
        kind = "reference" if name in REFERENCES else "best" if name in front else "one"
        size = 2.5 + 1.6 * max(0.0, math.log10(max(1.0, statistics.fmean(rows[name]["numbers"]))) - 2)
        x, y = _at(point, x_at, y_at)
        body.append(dot(x, y, size, kind, title=f"{name}: accuracy {point[0]:.2f}, loss rise {10 ** point[1]:.3g}"))
        places.append((x, y, name, kind))
    body += _labels(places)
    body.append(words((LEFT + RIGHT) / 2, BOTTOM + 34, "accuracy on the new task →", "s", anchor="middle"))
    body.append(words(LEFT, TOP - 16, "↑ smaller rise of the loss on what was known, nats (logarithmic)", "s"))
    body += _key([("best", KEY[0]), ("reference", KEY[1]), ("one", KEY[2])])
    return drawing(body, HEIGHT, title="Gain against forgetting of selective tuning", width=WIDTH).replace(
        "<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1
    )


def _key(entries: list[tuple[str, str]]) -> list[str]:
    body, x = [], float(LEFT)
    for kind, text in entries:
        body += [dot(x + 5, HEIGHT - 18, 5, kind), words(x + 15, HEIGHT - 14, text, "s")]
        x += 35 + 5.9 * len(text)
    return [*body, words(x, HEIGHT - 14, "larger dot: larger graft", "s")]


def _log(rise: float) -> float:
    return math.log10(max(rise, 10.0**FLOOR))


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] >= other[0] and one[1] <= other[1] and one != other


def _at(point: tuple[float, float], x_at: Any, y_at: Any) -> tuple[float, float]:
    return x_at(point[0]), y_at(point[1])


def _labels(places: list[tuple[float, float, str, str]]) -> list[str]:
    """Write names beside their dots, moved apart where they would lie on one another or on a dot, then with a line."""
    done: list[tuple[float, float, float]] = []
    lines, texts = list[str](), list[str]()
    for x, y, name, _ in sorted(places, key=lambda p: p[1]):
        width = 6.4 * len(name)
        dots = [(a, b) for a, b, other, _ in places if other != name]
        free = [
            (left, anchor, lower)
            for lower in sorted(range(-150, 151, 3), key=lambda lower: (abs(lower), -lower))
            for left, anchor in ((x + 9, "start"), (x - 9 - width, "end"))
            if TOP - 12 < y + lower < BOTTOM - 4
            and left > LEFT
            and left + width < WIDTH
            and not any(abs(y + 4 + lower - t) < 13 and left < r + 6 and left + width > a - 6 for a, r, t in done)
            and not any(abs(y + lower - b) < 11 and left - 7 < a < left + width + 7 for a, b in dots)
        ]
        left, anchor, lower = free[0] if free else (x + 9, "start", 0)
        done.append((left, left + width, y + 4 + lower))
        end = left if anchor == "start" else left + width
        if abs(lower) > 12:
            lines.append(line(x, y, end, y + lower, "lead"))
        texts.append(words(end, y + 4 + lower, name, "name", anchor=anchor))
    return [*lines, *texts]
