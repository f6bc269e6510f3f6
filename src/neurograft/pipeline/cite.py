"""Which papers stand behind something that was made or is to be run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from neurograft.core.card import Card
from neurograft.core.errors import one_of
from neurograft.core.resolve import resolve
from neurograft.pipeline.papers import known
from neurograft.pipeline.recipe import Recipe


@runtime_checkable
class Carded(Protocol):
    """A graft, or what else carries a card; grafts themselves would bring torch along."""

    @property
    def card(self) -> Mapping[str, Any]:
        """How it was made."""


def cite(source: Carded | Recipe | str | Path) -> list[str]:
    """Return the papers behind something, one line each, the recipe's own first.

    Args:
        source: a graft or its folder (its card names its recipe and the methods that made it), a recipe, or a
            paper's slug.

    Returns:
        No line for a graft made without any paper's method.

    Raises:
        RequestError: an unknown slug, or a folder that is no graft.

    Example:
        >>> cite("smt")
        ['Sparse Matrix in Large Language Model Fine-tuning. arXiv:2405.15525, ICLR 2025.']
    """
    slugs: list[str | None]
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        from neurograft.core.grafts.graft import Graft

        source = Graft.load(source)
    if isinstance(source, (str, Path)):
        slugs = [one_of(str(source).replace("_", "-"), known(), what="paper")]
    elif isinstance(source, Recipe):
        slugs = [source.paper, *_mentioned([dict(step) for step in source.steps])]
    else:
        slugs = [*_mentioned([source.card.get("recipe", {})]), *_mentioned([dict(source.card)])]
    return [_line(known()[slug]) for slug in dict.fromkeys(s for s in slugs if s) if slug in known()]


def _mentioned(value: Any) -> list[str]:
    """Return the slugs that plain data of a card speaks of: "paper" and "citations" entries, and methods' cards."""
    if isinstance(value, (list, tuple)):
        return [slug for item in value for slug in _mentioned(item)]
    if not isinstance(value, Mapping):
        return []
    found = []
    for key, item in value.items():
        if key in ("paper", "citations"):
            found += [item] if isinstance(item, str) else [i for i in item or () if isinstance(i, str)]
        elif key == "path" and isinstance(item, str) and item.startswith("neurograft."):
            found += [p] if (p := getattr(resolve(item), "card", Card()).paper) else []
        else:
            found += _mentioned(item)
    return found


def _line(row: Mapping[str, str]) -> str:
    where = ", ".join(part for part in (f"arXiv:{row['arxiv']}" if row["arxiv"] else "", row["venue"]) if part)
    return f"{row['title'].rstrip('.')}. {where}."
