"""The papers: which of them work here, shown by what, and how to cite those a graft was made with."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurograft.core.card import Card
from neurograft.core.errors import RequestError, near, one_of
from neurograft.core.resolve import resolve
from neurograft.pipeline import _proofs
from neurograft.pipeline.recipe import Recipe, recipes

if TYPE_CHECKING:
    from neurograft.core.grafts.graft import Graft


@cache
def known() -> Mapping[str, Mapping[str, str]]:
    """Return every paper of the plan: slug -> title, arxiv, venue, room."""
    text = (resources.files("neurograft.pipeline") / "papers.tsv").read_text(encoding="utf-8")
    return {row["slug"]: row for row in csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)}


def papers(about: str | None = None) -> list[dict[str, Any]]:
    """Return what stands of every paper, by slug.

    Args:
        about: only the paper of this slug or recipe, or those that have this word in slug, title or room; None for
            all.

    Raises:
        RequestError: no paper has it.

    Returns:
        One dict for each: `slug`, `title`, `arxiv` (None if not known), `room` that holds its new answer, `recipe`
        (a name for `run`, or None), `working` (a recipe is there, its proof passed, failed under every sabotage,
        and nothing it ran through has changed since), `proof` ("passing", "stale", "failing", "toothless" or
        "none"), `scale` ("identity", "tiny", "full" or None), `departs` (from the paper or its code, and why).

    Example:
        >>> len(papers())
        119
    """
    records, here, digest = _proofs.read(), set(recipes()), cache(_proofs.file_digest)
    found = []
    for slug, row in _about(about).items():
        name = slug.replace("-", "_")
        record = records.get(slug)
        state = _proofs.standing(record, digest)
        found.append(
            {
                "slug": slug,
                "title": row["title"],
                "arxiv": row["arxiv"] or None,
                "room": row["room"],
                "recipe": name if name in here else None,
                "working": state == "passing" and name in here,
                "proof": state,
                "scale": record["scale"] if record else None,
                "departs": card(name).departs if name in here else "",
            }
        )
    return found


def _about(word: str | None) -> Mapping[str, Mapping[str, str]]:
    every = known()
    if word is None:
        return every
    slug = word.lower().replace("_", "-")
    if slug in every:
        return {slug: every[slug]}
    said = {s: f"{s} {row['title']} {row['room']}".lower() for s, row in every.items()}
    found = {s: every[s] for s, text in said.items() if word.lower() in text}
    if not found:
        raise RequestError(
            f"papers about {word!r}, of which there are none", expected="a slug or a word", do=near(slug, every)
        )
    return found


def card(name: str) -> Card:
    """Return the card of a recipe.

    Raises:
        RequestError: an unknown recipe.
    """
    function = resolve(f"neurograft.recipes.{one_of(name, recipes(), what='recipe')}")
    found: Card = getattr(function, "card", Card())
    return found


def cite(source: Graft | Recipe | str | Path) -> list[str]:
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
