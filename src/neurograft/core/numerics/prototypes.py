"""Prototypes: classes as the means of their examples' features, and classification by cosine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from neurograft.core.errors import RequestError

SHARP = 10.0  # what the reference multiplies the cosines with


def class_means(features: Tensor, labels: Tensor) -> Tensor:
    """Return the mean features of classes 0, 1, ..., [ways, d], of features [N, d] and labels [N].

    Raises:
        RequestError: a class without an example.
    """
    ways = int(labels.max()) + 1
    counts = torch.bincount(labels, minlength=ways)
    if bool((counts == 0).any()):
        raise RequestError(
            f"no example of class {int((counts == 0).nonzero()[0])} among {ways}",
            expected="classes numbered 0, 1, ... in every support set",
            do="number the episode's classes anew",
        )
    sums = features.new_zeros(ways, features.shape[1]).index_add(0, labels, features)
    return sums / counts[:, None]


def cosines(features: Tensor, means: Tensor) -> Tensor:
    """Return the cosine of each feature vector and each class mean, [N, ways]."""
    return F.normalize(features, dim=-1) @ F.normalize(means, dim=-1).T


def prototypical(support: Tensor, labels: Tensor, query: Tensor, asked: Tensor, *, sharp: float = SHARP) -> Tensor:
    """Return the cross-entropy of softmax(sharp * cos(query, class mean of the support)), a scalar.

    Example:
        >>> s = torch.eye(2)
        >>> loss = prototypical(s, torch.tensor([0, 1]), s, torch.tensor([0, 1]), sharp=1.0)
        >>> round(float(loss), 4), round(float(torch.tensor(1 + 1 / torch.e).log()), 4)
        (0.3133, 0.3133)
    """
    return F.cross_entropy(sharp * cosines(query, class_means(support, labels)), asked)
