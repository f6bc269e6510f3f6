"""The README beside an exported graft."""

from __future__ import annotations

from collections.abc import Mapping

from neurograft import __version__
from neurograft.core.grafts.graft import Graft


def readme(graft: Graft, base: str, form: str, notes: Mapping[str, str]) -> str:
    """Return a model card in Markdown with what the Hub reads at its top.

    Args:
        graft: the graft.
        base: name or path of the base.
        form: the export's format.
        notes: heading -> text.
    """
    named = base and not base.startswith((".", "/")) and base.count("/") <= 1
    top = ["---", *([f"base_model: {base}", "base_model_relation: adapter"] if named else [])]
    top += [f"library_name: {'transformers' if form == 'merged' else 'peft'}", "tags: [neurograft]", "---", ""]
    body = [
        f"# A neurograft, exported as {form}",
        "",
        f"Made from the graft `{graft.identity[:16]}` at strength {graft.strength:g} by neurograft {__version__}"
        + (f", for the base `{base}`." if base else "."),
        "The graft itself can be put on and taken off bit for bit; this export cannot." if form != "merged" else "",
        "",
    ]
    for heading, text in notes.items():
        body += [f"## {heading}", "", text, ""]
    return "\n".join([*top, *body])
