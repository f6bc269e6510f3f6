"""The papers: which of them work here, and shown by what."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from neurograft.core.card import Card
from neurograft.core.errors import RequestError, near, one_of
from neurograft.core.resolve import resolve
from neurograft.pipeline import _proofs
from neurograft.pipeline.recipe import recipes


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
