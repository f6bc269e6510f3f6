"""Which block a sub-layer is the first of, so that the residual stream behind it is known."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from neurograft.anatomy.describe import anatomy
from neurograft.core.errors import RequestError
from neurograft.core.units import Site

# Norms, learned scales and gates between a contribution and the stream it is added to, by what they are called.
BETWEEN = ("post_feedforward", "post_self_attn", "layer_scale", "lambda_", "gamma", "scale_shift")


def entering(model: nn.Module) -> dict[str, str]:
    """Return module -> block, for modules whose output is the first contribution to what enters the block.

    Blocks that norm a contribution before they add it (Gemma 2, OLMo 2) or scale it (DINOv2, diffusion transformers)
    are left out, and so are those without attention, whose shortcuts may change what entered.

    Example:
        >>> from neurograft.worlds.pico import pico
        >>> sorted(entering(pico("llama")))
        ['model.layers.0.self_attn.o_proj', 'model.layers.1.self_attn.o_proj']
    """
    found = {}
    for block in anatomy(model).blocks:
        if block.repeated and block.branches and block.attentions and _added_as_is(model.get_submodule(block.name)):
            found[block.branches[0].module] = block.name
    return found


def _added_as_is(block: nn.Module) -> bool:
    names = [n for n, _ in block.named_children()] + [n for n, _ in block.named_parameters(recurse=False)]
    gated = any(type(m).__name__.startswith("Ada") for m in block.children())  # AdaLayerNormZero hands gates out
    scaled = getattr(block, "residual_multiplier", 1.0) != 1.0  # Granite
    return not gated and not scaled and not any(mark in name for name in names for mark in BETWEEN)


def stream_of(known: Mapping[str, str], site: Site) -> str | None:
    """Return the block whose input a site's contribution is added to; None where the site's tap is read as it is."""
    if site.tap is None or site.at or site.tap.side != "output":
        return None
    return known.get(site.tap.module)


def with_streams(model: nn.Module, sites: Mapping[str, Site]) -> dict[str, Site]:
    """Return the sites behind which the residual stream is known: those of the first sub-layers of blocks.

    Raises:
        RequestError: none of them is.
    """
    known = entering(model)
    found = {n: s for n, s in sites.items() if stream_of(known, s)}
    if not found:
        raise RequestError(
            f"{len(sites)} sites of {type(model).__name__}, none of which is a block's first sub-layer, added as it is",
            expected="residual channels behind an attention",
            do="take the stream behind whole blocks: at='residual' (place='mlp' in a recipe)",
        )
    return found
