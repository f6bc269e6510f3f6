"""Random scores: the floor under every locator."""

from __future__ import annotations

import torch

from neurograft.core.card import method
from neurograft.core.context import Context
from neurograft.core.selection import Scores
from neurograft.locators._common import scored


@method(claims={"finite", "length"})
def noise(context: Context) -> Scores:
    """Give every unit a uniform random number, the same for the same seed and site.

    Returns:
        Scores in [0, 1).
    """
    values = {n: torch.rand(s.n, generator=context.generator("noise", n)) for n, s in context.sites.items()}
    return scored(context, values)
