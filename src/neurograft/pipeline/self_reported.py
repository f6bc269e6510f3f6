"""A step of recipes: how well a model reports the weights it decides by, before and after it was taught to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from neurograft.audits.self_report import self_report
from neurograft.core.grafts.graft import Graft
from neurograft.pipeline._earlier import earlier
from neurograft.pipeline.state import as_found

SUMMARY = ("r", "shuffled", "profile_mean", "above_mean", "scenarios", "reports", "choices", "instilled", "standardise")


def self_reported(
    state: Mapping[str, Any], *, of: Sequence[str] = ("graft",), name: str = "graft", **options: Any
) -> dict[str, Any]:
    """Measure every group of scenarios under each of some grafts, and write it on the last one's card.

    Args:
        state: what the recipe has made so far, with `preferences` and `asked` of the step of that name.
        of: names of grafts, each put on alone.
        name: of the graft that gets the card.
        **options: of `audits.self_report`.

    Returns:
        `self_report`: graft -> group -> what the audit found; the graft with `card["self_report"]`, the same without
        single weights.

    Raises:
        RequestError: there is no graft of that name.
    """
    model, seed = state["model"], state.get("common", {}).get("seed", 0)
    found: dict[str, Any] = {}
    for key, graft in zip(of, earlier(state, of, Graft), strict=True):
        with as_found(model), graft.on(model):
            found[key] = {
                group: self_report(model, scenarios, speaker=state["preferences"].speaker, seed=seed, **options)
                for group, scenarios in state["asked"].items()
                if len(scenarios) > 1
            }
    told = {k: {g: {f: v[f] for f in SUMMARY} for g, v in groups.items()} for k, groups in found.items()}
    (graft,) = earlier(state, [name], Graft)
    return {"self_report": found, name: replace(graft, card={**graft.card, "self_report": told})}
