"""The units of the sites whose names match."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch

from neurograft.core.card import method
from neurograft.core.errors import RequestError, near
from neurograft.core.selection import Scores, Selection


@method()
def names(scores: Scores, *, match: Sequence[str] | str, exclude: Sequence[str] | str = ()) -> Selection:
    """Take all units of every site whose name matches one of the patterns, e.g. `*.self_attn.q_proj/*`.

    Args:
        scores: give the sites.
        match: shell patterns over site names; each must match something.
        exclude: patterns to leave out again.

    Raises:
        RequestError: a pattern matches no site.
    """
    wanted = [match] if isinstance(match, str) else list(match)
    unwanted = [exclude] if isinstance(exclude, str) else list(exclude)
    for pattern in [*wanted, *unwanted]:
        if not any(fnmatchcase(name, pattern) for name in scores.sites):
            raise RequestError(
                f"the pattern {pattern!r}, which matches no site",
                expected="a pattern over site names",
                do=near(pattern, scores.sites),
            )
    ids = {}
    for name, site in scores.sites.items():
        inside = any(fnmatchcase(name, p) for p in wanted) and not any(fnmatchcase(name, p) for p in unwanted)
        ids[name] = torch.arange(site.n if inside else 0)
    return Selection(dict(scores.sites), ids, {"rule": "names", "match": wanted, "exclude": unwanted})
