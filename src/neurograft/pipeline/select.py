"""`select`: which of the scored units do we take?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neurograft.core.choose import Choice, choose, option_names
from neurograft.core.selection import Scores, Selection


def select(
    scores: Scores | str | Path,
    by: Choice = "top",
    *,
    fraction: float | None = None,
    count: int | None = None,
    per: str | None = None,
    **options: Any,
) -> Selection:
    """Take units by their scores.

    Args:
        scores: scores, or the file `scores.save` wrote.
        by: the selector, of `neurograft.selectors`.
        fraction: share of each group; 0.01 if neither it nor a count is given to a selector that needs one.
        count: number in each group.
        per: the group: "global", "layer", "site" or "row".
        **options: what else the selector offers, e.g. `above=3.0` of "threshold", `seed=1` of "random".

    Raises:
        RequestError: an unknown selector or option.
    """
    found = Scores.load(scores) if isinstance(scores, (str, Path)) else scores
    given = {"fraction": fraction, "count": count, "per": per}
    options |= {k: v for k, v in given.items() if v is not None}
    chosen = choose("selectors", by, **options)
    if "fraction" in option_names(chosen.function) and not {"fraction", "count"} & chosen.options.keys():
        chosen = choose("selectors", chosen, fraction=0.01)
    taken: Selection = chosen(found)
    return taken
