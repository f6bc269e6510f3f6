"""The matrices of a model's FFNs."""

from __future__ import annotations

from torch import nn

from neurograft.anatomy.describe import anatomy
from neurograft.core.units import Parameters

MATRICES = ("down", "up", "gate")


def places(model: nn.Module) -> dict[tuple[int, str], str]:
    """Return (layer, "down" | "up" | "gate") -> parameter, for FFNs whose matrices stand alone.

    Example:
        >>> from neurograft.worlds.pico import pico
        >>> places(pico("gpt_neox"))[1, "up"]
        'gpt_neox.layers.1.mlp.dense_h_to_4h.weight'
    """
    alias, found = Parameters.of(model).alias, {}
    for layer, block in enumerate(b for b in anatomy(model).blocks if b.repeated):
        for ffn in block.ffns:
            if ffn.expert is not None or len(block.ffns) > 1:
                continue
            slots = {"down": ffn.down, "up": ffn.up, "gate": ffn.gate}
            for name, slot in slots.items():
                if slot is not None and slot.matrix.param in alias:
                    found[layer, name] = alias[slot.matrix.param]
    return found
