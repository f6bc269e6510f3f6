"""Which block a sub-layer is the first of, so that the residual stream behind it is known."""

from __future__ import annotations

from torch import nn

from neurograft.anatomy.describe import anatomy
from neurograft.core.units import Site


def entering(model: nn.Module) -> dict[str, str]:
    """Return module -> block, for modules whose output is the first contribution to what enters the block.

    Blocks that norm a contribution before they add it (Gemma 2, OLMo 2) are left out.

    Example:
        >>> from neurograft.worlds.pico import pico
        >>> sorted(entering(pico("llama")))
        ['model.layers.0.self_attn.o_proj', 'model.layers.1.self_attn.o_proj']
    """
    found = {}
    for block in anatomy(model).blocks:
        sandwiched = any("post_feedforward" in n for n, _ in model.get_submodule(block.name).named_children())
        if block.repeated and block.branches and not sandwiched:
            found[block.branches[0].module] = block.name
    return found


def stream_of(known: dict[str, str], site: Site) -> str | None:
    """Return the block whose input a site's contribution is added to; None where the site's tap is read as it is."""
    if site.tap is None or site.at or site.tap.side != "output":
        return None
    return known.get(site.tap.module)
