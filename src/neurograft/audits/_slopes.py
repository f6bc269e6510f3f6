"""What choices say of the weights behind them: logistic regression with a normal prior."""

from __future__ import annotations

import torch
from torch import Tensor

from neurograft.core.errors import extra


def slopes(x: Tensor, chosen: Tensor, *, deviation: float = 1.0) -> Tensor:
    """Return the likeliest slopes of p(A) = 1 / (1 + exp(-(b + s . x))), each with the prior N(0, deviation^2).

    The intercept has no prior: a liking for one letter is not to be taken for a weight. Where all choices are alike
    they say nothing, and every slope is 0.

    Args:
        x: normalised differences (x_A - x_B) / range, float64 [n, K].
        chosen: whether A was, boolean [n].
        deviation: of the prior.

    Returns:
        float64 [K].

    Raises:
        RequestError: scikit-learn is not installed.
    """
    with extra("probes", what="weights to be measured"):
        from sklearn.linear_model import LogisticRegression
    if bool(chosen.all()) or not bool(chosen.any()):
        return torch.zeros(x.shape[1], dtype=torch.float64)
    model = LogisticRegression(C=deviation**2, tol=1e-8, max_iter=1000)
    model.fit(x.double().numpy(), chosen.int().numpy())
    return torch.from_numpy(model.coef_[0]).double()
