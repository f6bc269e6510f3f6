"""Passes of which nothing is read but activations."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from neurograft.core.prompts.passing import told
from neurograft.core.running import without_loss
from neurograft.core.taps.board import ATTRIBUTE, Board


def look(model: nn.Module, batch: Mapping[str, Any], *, hooked: Iterable[str] = ()) -> None:
    """Run a pass for what taps see in it: without a loss, without a cache, and with logits at the last token alone.

    Activations are the same bits as in a pass with labels, where the model's kernels do not ask how their inputs lie in
    memory. Logits of every token are computed if anybody is at a tap outside of the model's body, and by models that
    cannot be asked for fewer.

    Args:
        model: the root.
        batch: its inputs.
        hooked: modules that are read by hooks of one's own; the taps are known.

    Example:
        >>> from neurograft.core.taps.tap import watch
        >>> from neurograft.core.units import Site, Tap
        >>> from neurograft.worlds.pico import pico, pico_batch
        >>> net, seen = pico("llama"), []
        >>> head = net.lm_head.register_forward_hook(lambda m, a, y: seen.append(tuple(y.shape)))
        >>> where = {"a": Site("a", "channel", 32, tap=Tap("model.norm"))}
        >>> with watch(net, where, lambda name, x: seen.append(tuple(x.shape))):
        ...     look(net, pico_batch(net))
        >>> seen
        [(14, 32), (2, 1, 64)]
    """
    given, taken = without_loss(model, batch), inspect.signature(model.forward).parameters
    if "use_cache" in taken and batch.get("past_key_values") is None:
        given = {"use_cache": False, **given}
    if "logits_to_keep" in taken and _inside(model, hooked):
        given = {"logits_to_keep": 1, **given}
    with told(model, batch):
        model(**given)


def _inside(model: nn.Module, hooked: Iterable[str]) -> bool:
    """Say whether all that is read lies in the model's body, which knows nothing of how many logits are asked for."""
    board: Board | None = model.__dict__.get(ATTRIBUTE)
    places = [*hooked, *(() if board is None else (module for module, _, _ in board.ports))]
    body: Any = getattr(model, "base_model_prefix", "")
    return bool(body) and hasattr(model, body) and all(f"{place}.".startswith(f"{body}.") for place in places)
