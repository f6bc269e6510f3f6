"""The loss of pre-training on identities: softmax, and a pull between features of one identity."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from neurograft.core.card import method
from neurograft.core.errors import RequestError, one_of

TOWARDS = ("mean", "pairs")


@method(
    paper="lnet-anet",
    departs="Whether the paper's second term pulls to the mean of an identity or between pairs of it could not be "
    "checked; both are there. Its weight is ours.",
)
def identity_loss(
    logits: Tensor, features: Tensor, identity: Tensor, *, pull: float = 0.01, towards: str = "mean"
) -> Tensor:
    """Return softmax cross-entropy + pull * the distance of features to others of their identity in the batch.

    The distance is the batch's mean of |f_i - m|^2 / 2, m the mean feature of i's identity; or the mean of
    |f_i - f_j|^2 / 2 over pairs i < j of one identity, 0 if there are none.

    Args:
        logits: of the identities, [B, I].
        features: [B, F].
        identity: int64 [B].
        pull: weight of the second term.
        towards: the "mean" of the identity, or "pairs" of it.

    Raises:
        RequestError: an identity the logits lack.

    Example:
        >>> import torch
        >>> f, who = torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0, 0, 1])
        >>> [round(float(identity_loss(torch.zeros(3, 2), f, who, pull=3.0, towards=t)), 4) for t in TOWARDS]
        [1.6931, 6.6931]
    """
    one_of(towards, TOWARDS, what="towards")
    count = logits.shape[-1]
    if len(identity) and not 0 <= int(identity.min()) <= int(identity.max()) < count:
        raise RequestError(
            f"identities from {int(identity.min())} to {int(identity.max())}",
            expected=f"numbers from 0 to {count - 1}",
            do="make the network with identities= as many as the data have",
        )
    same = identity[:, None] == identity
    if towards == "mean":
        means = same.to(features) @ features / same.sum(1, keepdim=True)
        far = (features - means).square().sum(1).mean() / 2
    else:
        first, second = same.triu(1).nonzero(as_tuple=True)
        far = (features[first] - features[second]).square().sum() / (2 * max(1, len(first)))
    return F.cross_entropy(logits, identity) + pull * far
