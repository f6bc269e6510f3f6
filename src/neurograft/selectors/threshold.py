"""The units whose scores pass a bar."""

from __future__ import annotations

from neurograft.core.card import method
from neurograft.core.errors import RequestError
from neurograft.core.selection import Scores, Selection
from neurograft.selectors._quota import highest, joined, split


@method()
def threshold(
    scores: Scores,
    *,
    above: float | None = None,
    below: float | None = None,
    least: int = 0,
    most: int | None = None,
) -> Selection:
    """Take the units with above < score < below; either bar may be left out.

    Args:
        scores: a number for every unit.
        above: lower bar, exclusive.
        below: upper bar, exclusive.
        least: take so many of the highest scores if fewer pass, as a z-score's bar may ask of a small site; the
            selection's card then says so.
        most: of those that pass, take so many of the highest scores; ties go to the lower unit number.

    Raises:
        RequestError: no bar is given, no unit passes, or most is below least or 1.
    """
    if above is None and below is None:
        raise RequestError("no bar", expected="above, below or both", do="give above=3.0")
    if least < 0 or (most is not None and most < max(1, least)):
        raise RequestError(f"least={least}, most={most}", expected="least from 0, most from least", do="leave them out")
    key = joined(scores)
    passing = (key > (-float("inf") if above is None else above)) & (key < (float("inf") if below is None else below))
    rule = {"rule": "threshold", "above": above, "below": below}
    if int(passing.sum()) < least:
        instead = highest(key[None], min(least, len(key)))[0].nonzero()[:, 0]
        return split(scores, instead, {**rule, "passed": int(passing.sum()), "least": least})
    if not passing.any():
        raise RequestError(
            f"bars above={above}, below={below}, which no unit passes",
            expected=f"bars within {key.min():.4g} to {key.max():.4g}",
            do="move the bar, or take a fraction",
        )
    if most is not None and int(passing.sum()) > most:
        kept = highest(key.masked_fill(~passing, -float("inf"))[None], most)[0].nonzero()[:, 0]
        return split(scores, kept, {**rule, "passed": int(passing.sum()), "most": most})
    return split(scores, passing.nonzero().reshape(-1), rule)
