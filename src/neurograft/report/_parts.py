"""The parts of a page: figures, sections, what is folded away."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from neurograft.report.words import counted


def document(title: str, body: str, style: str = "") -> str:
    """Return a page that needs nothing but itself; `style` is added to the reports' own."""
    shared = files("neurograft.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{shared}{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def figure(title: str, picture: str, caption: str = "", key: str = "", *, kind: str = "one") -> str:
    """Return a captioned picture."""
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="{kind}"><h3>{escape(title)}</h3>{picture}{key}{below}</figure>\n'


def section(title: str, lead: str, *content: str) -> str:
    """Return a titled part of the page; nothing without content."""
    body = "".join(content)
    return f'<section>\n<h2>{escape(title)}</h2>\n<p class="lead">{lead}</p>\n{body}</section>\n' if body else ""


def folded(summary: str, content: str) -> str:
    """Return what opens on a click, and on paper always; nothing without content."""
    return f"<details>\n<summary>{escape(summary)}</summary>\n{content}</details>\n" if content else ""


def grid(figures: Sequence[str], more: Sequence[str] = ()) -> str:
    """Return figures side by side, and more of them folded away."""
    shown = f'<div class="grid">\n{"".join(figures)}</div>\n' if figures else ""
    return shown + folded(counted(len(more), "more picture"), grid(more) if more else "")
