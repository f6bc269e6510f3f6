"""A step of recipes: the heads that carry an instruction, their means, and the one vector these write together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neurograft.anatomy.sites import sites
from neurograft.core.errors import one_of
from neurograft.core.selection import Scores, Selection
from neurograft.core.taps.end_states import best, end_means, joint
from neurograft.pipeline._earlier import earlier
from neurograft.pipeline.given import located_data
from neurograft.pipeline.state import as_found

LAYER, OF = 9, 32  # the paper's, of Llama-2-7B
PLACES = ("residual", "attention")


def instructed(
    state: Mapping[str, Any],
    *,
    of: str = "scores",
    count: int | None = None,
    layer: int | None = None,
    at: str = "residual",
    data: Any = None,
) -> dict[str, Any]:
    """Return `heads`, the best ones; `means`, each one's mean output; `stream` and `theta`, where and what to add.

    hbar_h = mean of head h at the last prompt token; theta = sum over the heads of W_o^h hbar_h, for one block.

    Args:
        state: what the recipe has made so far, its model and data.
        of: name of the heads' scores.
        count: how many heads; 10 if None, or all of a model that has fewer.
        layer: the block; as 9 of 32 if None.
        at: "residual", behind the block, or "attention", behind its attention, as the authors' follow-up.
        data: instructed prompts, or rows with `positive` and `negative`, instead of the run's.

    Raises:
        RequestError: no scores, more heads than there are, units that are no heads, no such block.
    """
    one_of(at, PLACES, what="place of the vector")
    (scores,) = earlier(state, [of], Scores)
    model, heads = state["model"], best(scores, count)
    options: Mapping[str, Any] = state.get("common", {})
    batches, _ = located_data(
        state["data"] if data is None else data, model, processing_class=options.get("processing_class")
    )
    chosen = {name: heads.sites[name] for name, ids in heads.ids.items() if len(ids)}
    with as_found(model):
        found = end_means(model, chosen, batches)
        theta = joint(model, heads, found)
    depth = LAYER * len(sites(model, "layer", at=at)) // OF if layer is None else layer
    place = sites(model, "layer", at=at, layers=[depth])
    stream = Selection.of(place, {name: [0] for name in place}, {"rule": "place", "layer": depth, "at": at})
    values = {name: found[name][heads.ids[name]] for name in chosen}
    return {"heads": heads, "means": values, "stream": stream, "theta": dict.fromkeys(place, theta[None])}
