"""Linear layers: which modules are one, and which way round their weight lies."""

from __future__ import annotations

from torch import nn


def transposed(module: nn.Module) -> bool:
    """Say whether a module is GPT-2's `Conv1D`, whose weight lies [in, out]: y = x @ W where a linear layer has W.T.

    It is known by its name and its `nf`, so that looking at a model does not import transformers' classes.

    Example:
        >>> from neurograft.worlds.pico import pico
        >>> transposed(pico("gpt2").transformer.h[0].mlp.c_fc), transposed(nn.Linear(2, 3))
        (True, False)
    """
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Say whether a module is a linear layer, whichever way round its weight lies.

    Example:
        >>> is_linear(nn.Linear(2, 3)), is_linear(nn.Conv1d(2, 3, 1))
        (True, False)
    """
    return isinstance(module, nn.Linear) or transposed(module)
