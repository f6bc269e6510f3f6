"""The picture of what a growing number of edits leaves, a panel for each question, in light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neurograft.report._svg import dot, drawing, line, path, scale, words

WIDTH, PANEL, HEIGHT, TOP, BOTTOM = 940, 200, 330, 40, 240
COLOURS = (("#1f5fbf", "#82b1ff"), ("#b03a00", "#ff8a57"), ("#1a7f4b", "#63c98f"), ("#7b3fa0", "#c69be0"))
TITLES = {
    "reliability": "the edit, as it was put",
    "held_out": "in words never trained on",
    "locality": "facts that were not edited",
    "general": "sums, refusals, compliances",
}


def style(colours: Sequence[tuple[str, str]]) -> str:
    """Return the style sheet: a class `c0`, `c1`, ... for each line."""

    def rules(which: int) -> str:
        return "".join(f".c{i}{{stroke:{c[which]};fill:{c[which]}}}" for i, c in enumerate(colours))

    return (
        "<style>text{font:12px system-ui,'DejaVu Sans',sans-serif;fill:#16181d}.s{fill:#565d6b;font-size:11px}"
        "line{stroke:#e9ecf1}path{fill:none!important;stroke-width:2}circle{stroke:none!important}.paper{fill:#fff}"
        f"{rules(0)}@media(prefers-color-scheme:dark){{text{{fill:#eceef2}}.s{{fill:#a5adbb}}line{{stroke:#292d36}}"
        f".paper{{fill:#14161b}}{rules(1)}}}</style>"
    )


def picture(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the picture: to the right more edits, up a larger share answered word for word."""
    most = max(point["edits"] for row in found.values() for point in row["curve"])
    body = [style(COLOURS), f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>']
    y_at = scale(0.0, 1.0, BOTTOM, TOP)
    for column, (key, title) in enumerate(TITLES.items()):
        left = 40 + column * (PANEL + 27)
        x_at = scale(0, most, left, left + PANEL)
        body.append(words(left, TOP - 16, title))
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            body.append(line(left, y_at(share), left + PANEL, y_at(share), ""))
            if not column:
                body.append(words(left - 6, y_at(share) + 4, f"{share:g}".replace("0.", "."), "s", anchor="end"))
        for edits in sorted({p["edits"] for row in found.values() for p in row["curve"]}):
            body.append(words(x_at(edits), BOTTOM + 16, f"{edits:,}", "s", anchor="middle"))
        for number, (name, row) in enumerate(found.items()):
            points = [(x_at(p["edits"]), y_at(p[key])) for p in row["curve"]]
            body.append(path(points, f"c{number}"))
            body += [
                dot(x, y, 3.5, f"c{number}", title=f"{name}, {p['edits']} edits: {p[key]:.3f}")
                for (x, y), p in zip(points, row["curve"])
            ]
    body.append(words(40, BOTTOM + 36, "edits made →   (up: the share answered right, word for word)", "s"))
    x = 40.0
    for number, name in enumerate(found):
        body += [dot(x + 4, HEIGHT - 24, 4, f"c{number}"), words(x + 14, HEIGHT - 20, name)]
        x += 44 + 7 * len(name)
    return drawing(body, HEIGHT, title="What a growing number of edits leaves", width=WIDTH).replace(
        "<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1
    )
