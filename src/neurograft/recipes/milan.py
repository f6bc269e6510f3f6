"""MILAN: units described in words, those about something that should not matter found by a query and silenced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neurograft.core.card import method
from neurograft.core.ranges import least, share
from neurograft.pipeline.recipe import Recipe


@method(
    paper="milan",
    kinds={"channel", "neuron", "row"},
    needs={"labels", "taps"},
    task="image-classification",
    departs="The released captioner, its pretrained encoder and its human annotations are not shipped: a closed "
    "vocabulary or a captioner of the same form is taught on synthetic scenes or on pairs of one's own, over features "
    "of colour, edges and place, or over any encoder's. For texts descriptions are the tokens units are active at. "
    "Where a unit is nowhere above its level the exemplar is left out, not kept without features; where the level is "
    "the unit's maximum, the places at it count.",
)
def milan(
    *,
    query: Sequence[str] | str = ("word", "text", "letter"),
    units: str = "channel",
    at: str | None = "residual",
    describer: str | None = None,
    pairs: str | None = None,
    k: int = 15,
    quantile: float = 0.99,
    lam: float = 0.2,
    beam: int = 50,
    length: int = 15,
    most: int = 50,
    ship: str = "operations",
) -> Recipe:
    """Describe every unit, take those whose description has a word of the query, silence those that cost least.

    E: a unit's k strongest examples by largest activation, masked where it is above its own quantile. Description:
    argmax_d [log p(d | E) - lam * log p(d)] over a beam of p(d | E). Candidates are ordered by the accuracy on the
    data with that unit alone at zero, highest first. The scores of the step "matches" hold all descriptions.

    Args:
        query: words; one of them in a description makes its unit a candidate.
        units: kind of unit; "neuron" for texts.
        at: which of a kind's activations, as in `ng.locate`; what a block hands on, as published, or None for
            what each convolution gives, or a neuron.
        describer: folder of a saved one, or "tokens", "words", "captions"; None: tokens for texts, words for images.
        pairs: file of exemplar sets with descriptions to teach it on.
        k: exemplars of a unit.
        quantile: of a unit's activations, its level.
        lam: weight of log p(d).
        beam: descriptions that are proposed.
        length: words of one.
        most: units that are silenced at most.
        ship: "operations", or "weights" where silence folds into them (not at "residual").

    The data are labelled rows that the model was not trained on, and among which what is asked for occurs.
    """
    least(k=(k, 1), beam=(beam, 1), length=(length, 1), most=(most, 1))
    share(quantile=quantile)
    options: dict[str, Any] = {"query": [query] if isinstance(query, str) else list(query), "describer": "$describer"}
    options |= {"k": k, "quantile": quantile, "lam": lam, "beam": beam, "length": length}
    return Recipe(
        "milan",
        (
            {"do": "neurograft.pipeline.taught", "describer": describer, "pairs": pairs},
            {"do": "locate", "by": ("described", options), "units": units, "at": at, "as": "matches"},
            {"do": "select", "scores": "$matches", "by": ("threshold", {"above": 0.0}), "as": "candidates"},
            {
                "do": "locate",
                "by": ("spared", {"among": "$candidates", "metric": "accuracy"}),
                "units": units,
                "at": at,
            },
            {"do": "select", "by": ("threshold", {"above": -0.5, "most": most})},
            {"do": "intervene", "kind": "zero", "ship": ship},
        ),
        paper="milan",
    )
