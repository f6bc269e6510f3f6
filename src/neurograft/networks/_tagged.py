"""What the networks for attributes return, and the loss of attributes."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from neurograft.core.errors import RequestError


@dataclass
class Tagged(ModelOutput):  # type: ignore[misc]
    """Outputs of a network for attributes.

    Args:
        loss: summed over attributes, averaged over examples; None without labels.
        logits: of the attributes, [B, A]; above 0 is "there".
        response: of an LNet, [B, h, w]: the last convolution's maps, averaged over channels.
        features: of an ANet, [B, P, F]: the units of its fully connected layer, for every patch.
        identities: of an ANet that has them, logits [B, P, I].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    response: Tensor | None = None
    features: Tensor | None = None
    identities: Tensor | None = None


def attribute_loss(logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """Return the sum over attributes of binary cross-entropies, averaged over examples; None without labels.

    Args:
        logits: [B, A].
        labels: 0 or 1, of any dtype, [B, A].

    Raises:
        RequestError: labels of another shape.
    """
    if labels is None:
        return None
    if labels.shape != logits.shape:
        raise RequestError(
            f"labels {list(labels.shape)} for {logits.shape[1]} attributes",
            expected=f"0 or 1 for each, {list(logits.shape)}",
            do="make the network with labels= as many as the data have",
        )
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum") / len(logits)


def rectified(convs: nn.Module) -> None:
    """Draw convolutions at a scale that rectifiers keep, however many follow one another; biases are 0."""
    for conv in convs.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
