"""Several locators multiplied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from neurograft.core.card import method
from neurograft.core.choose import choose
from neurograft.core.context import Context
from neurograft.core.selection import Scores
from neurograft.locators._common import scored


@method(takes={"against", "objective", "positions", "target"}, claims={"finite", "length", "permutes"})
def product(context: Context, *, of: Sequence[Any] = ("magnitude", "magnitude")) -> Scores:
    """Score each unit by the product of other locators' scores, e.g. ("magnitude", "activation").

    Args:
        context: what the other locators need.
        of: choices of `locators`.
    """
    found = [choose("locators", one)(context) for one in of]
    values = {n: torch.stack([f.values[n] for f in found]).prod(0) for n in context.sites}
    return scored(context, values, {"of": [choose("locators", one).as_dict() for one in of]})
