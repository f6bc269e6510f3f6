"""Linear probes: full-batch Adam over many sites at once, and sparse or dense logistic regression on one wide table.

Shape letters: S sites of one size, N examples, n units.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from neurograft.core.errors import RunError, extra

CHUNK = 1 << 25


def adam(
    x: Tensor, y: Tensor, *, steps: int, lr: float, decay: float, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Minimise binary cross-entropy + decay / 2 * |w, b|^2 for each site, by `steps` full-batch steps of Adam.

    Args:
        x: float32 [S, N, n].
        y: float32 [N] of 0 and 1.
        steps: of Adam (betas .9 and .999, eps 1e-8), decay in the gradient as in `torch.optim.Adam`.
        lr: step size.
        decay: weight decay, of the bias too.
        start: [S, n + 1], the bias last; zeros if None.

    Returns:
        Weights [S, n] and biases [S].

    Example:
        >>> w, b = adam(torch.tensor([[[-1.0], [-1.0]]]), torch.tensor([1.0, 1.0]), steps=3, lr=0.1, decay=0.0)
        >>> [round(float(w), 2), round(float(b), 2)]
        [-0.3, 0.3]
    """
    wide = torch.cat([x, x.new_ones(*x.shape[:2], 1)], -1)
    theta = torch.zeros_like(wide[:, 0]) if start is None else start.to(wide).clone()
    first, second = torch.zeros_like(theta), torch.zeros_like(theta)
    for step in range(1, steps + 1):
        residual = (torch.bmm(wide, theta[..., None])[..., 0].sigmoid() - y) / len(y)
        gradient = torch.bmm(residual[:, None], wide)[:, 0].add_(theta, alpha=decay)
        first.lerp_(gradient, 0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        scale = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
        theta.addcdiv_(first, scale, value=-lr / (1 - 0.9**step))
    return theta[:, :-1], theta[:, -1]


def logistic(
    x: Tensor, y: Tensor, *, penalty: str = "l1", C: float = 1.0, steps: int = 1000, tol: float = 1e-4, seed: int = 0
) -> tuple[Tensor, float]:
    """Minimise |w, b|_1 (or |w, b|_2^2 / 2) + C * sum of log losses with liblinear, which penalises the bias too.

    For "l1" liblinear only ever sees a working set: columns whose gradient exceeds the penalty join until none is
    left out that should be in, so that 200,000 columns cost little more than the few that end up with a weight.

    Args:
        x: float32 [N, n].
        y: float32 [N] of 0 and 1.
        penalty: "l1" or "l2".
        C: weight of the data.
        steps: liblinear's iterations.
        tol: liblinear's tolerance.
        seed: of the order in which liblinear visits columns.

    Returns:
        Weights float32 [n] and the bias.

    Raises:
        RequestError: scikit-learn is not installed.
        RunError: liblinear did not converge.
    """
    model = _sklearn(penalty, C=C, max_iter=steps, tol=tol, random_state=seed)
    labels = y.numpy().astype(int)
    if penalty == "l2":
        _fitted(model, x, labels)
        return torch.from_numpy(model.coef_[0]).float(), float(model.intercept_[0])
    residual, active, weights = y - y.mean(), torch.empty(0, dtype=torch.int64), torch.zeros(x.shape[1])
    while True:
        pull = C * (residual @ x).abs()
        pull[active] = 0.0
        outside = (pull > 1.0 + 1e-3).nonzero()[:, 0]
        if len(active) and not len(outside):
            return weights, float(model.intercept_[0])
        room = max(256, len(active))
        joining = outside if 0 < len(outside) <= room else pull.topk(min(room, len(pull))).indices
        active = torch.cat([active, joining]).unique()
        _fitted(model, x[:, active], labels)
        weights = torch.zeros(x.shape[1])
        weights[active] = torch.from_numpy(model.coef_[0]).float()
        residual = y - torch.from_numpy(model.predict_proba(x[:, active].double().numpy())[:, 1]).float()


def _fitted(model: Any, x: Tensor, labels: Any) -> None:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x.double().numpy(), labels)
    if int(model.n_iter_.max()) >= model.max_iter:
        raise RunError(
            f"the probe did not converge in {model.max_iter} iterations over {x.shape[1]} columns; "
            "raise epochs=, lower C=, or standardize=True"
        )


def _sklearn(penalty: str, **options: Any) -> Any:
    with extra("probes", what=f"a probe with the {penalty} penalty", instead="take fit='adam'"):
        from sklearn.linear_model import LogisticRegression
    return LogisticRegression(solver="liblinear", l1_ratio=float(penalty == "l1"), **options)
