"""Running a model for what it says or holds, without the loss it would compute if it were given labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from neurograft.core.batches import Batch, unlabelled
from neurograft.core.prompts.passing import told


def without_loss(model: nn.Module, batch: Mapping[str, Any]) -> Batch:
    """Return what a model needs of a batch to say the same and compute no loss.

    Over a large vocabulary the loss costs several float32 copies of the logits. Where a decoder's input is made from
    the labels, that input stands in their place, as the model makes it; they stay where nobody knows how it does, and
    where a model takes no batch without them.

    Args:
        model: reads `labels` for its loss, and for its decoder's input if it has one.
        batch: its inputs.

    Example:
        >>> from neurograft.worlds.pico import pico
        >>> rows = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[7, 8]])}
        >>> list(without_loss(pico("llama"), rows)), without_loss(pico("t5"), rows)["decoder_input_ids"].tolist()
        (['input_ids'], [[0, 7]])
    """
    bare = unlabelled(batch)
    if "labels" not in batch:
        return bare
    taken, config = inspect.signature(model.forward).parameters, getattr(model, "config", None)
    asked = taken.get("labels")
    if asked is not None and asked.default is inspect.Parameter.empty:
        return dict(batch)
    two_sided = getattr(config, "is_encoder_decoder", False) or "decoder_input_ids" in taken
    if not two_sided or any(batch.get(n) is not None for n in ("decoder_input_ids", "decoder_inputs_embeds")):
        return bare
    labels, made = batch["labels"], getattr(model, "prepare_decoder_input_ids_from_labels", None)
    by_token = isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point()
    # Models put together from two make a mask of the decoder's from the labels as well.
    if made is None or not by_token or getattr(config, "has_no_defaults_at_init", False):
        return dict(batch)
    once = {"use_cache": False} if "use_cache" in taken else {}  # as such models do where they see labels
    return {**bare, "decoder_input_ids": made(labels), **once}


def run(model: nn.Module, batch: Mapping[str, Any], *, call: Callable[..., Any] | None = None) -> Any:
    """Return a model's outputs on a batch without its loss; taps see the labels all the same.

    Args:
        model: the root.
        batch: its inputs.
        call: what to call instead of the model, if it is wrapped.

    Example:
        >>> from neurograft.worlds.pico import pico, pico_batch
        >>> net = pico("llama")
        >>> said = run(net, pico_batch(net))
        >>> said.loss is None, said.logits.shape
        (True, torch.Size([2, 8, 64]))
    """
    with told(model, batch):
        return (model if call is None else call)(**without_loss(model, batch))
