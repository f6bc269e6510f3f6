"""The covariance of infinitely wide random ReLU networks, as a kernel for scikit-learn's Gaussian processes.

k_0(x, y) = b + v x . y / n;  k_l = b + v / (2 pi) N (sin t + (pi - t) cos t),  cos t = k_xy / N,  N = sqrt(k_xx k_yy)
(Cho and Saul 2009, Lee et al. 2018), with the depth, weight and bias variances of BoTorch's InfiniteWidthBNNKernel.
Derivatives are written out: with J = N (sin t + (pi - t) cos t), dJ = sin t dN + (pi - t) dk_xy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.gaussian_process.kernels import Hyperparameter, Kernel

NEAR = 1e-12  # how near to +-1 a cosine may come


class Arccos(Kernel):  # type: ignore[misc]
    """The covariance, with weight and bias variances that scikit-learn fits.

    Args:
        depth: hidden layers.
        weight: v, variance of the weights.
        bias: b, variance of the biases.
        limits: of each, when fitted.

    Example:
        >>> x = np.array([[1.0, 0.0]])
        >>> float(Arccos(0, 2.0, 0.5)(x)[0, 0]), round(float(Arccos(1, 2.0, 0.0)(x, -x)[0, 0]), 6)
        (1.5, 0.0)
    """

    def __init__(self, depth: int, weight: float, bias: float, limits: tuple[float, float] = (1e-2, 1e2)) -> None:
        self.depth, self.weight, self.bias, self.limits = depth, weight, bias, limits

    @property
    def hyperparameter_weight(self) -> Hyperparameter:
        """The variance of the weights."""
        return Hyperparameter("weight", "numeric", self.limits)

    @property
    def hyperparameter_bias(self) -> Hyperparameter:
        """The variance of the biases."""
        return Hyperparameter("bias", "numeric", self.limits)

    def __call__(self, X: Any, Y: Any = None, eval_gradient: bool = False) -> Any:
        """Return covariances, and their derivatives by the logarithms of bias and weight, in scikit-learn's order."""
        x = np.asarray(X, dtype=float)
        y = x if Y is None else np.asarray(Y, dtype=float)
        if not eval_gradient:
            return self.layers(x, y)[0]
        v, b, wide = self.weight, self.bias, x.shape[1]
        both, left = b + v * (x @ y.T) / wide, b + v * (x * x).sum(-1) / wide
        # One derivative by b, one by v; what scikit-learn asks for is b d/db and v d/dv.
        slopes = [(np.ones_like(both), np.ones_like(left)), ((both - b) / v, (left - b) / v)]
        for _ in range(self.depth):
            norm, turn = _angle(both, left, left)
            sine, rest = np.sin(turn), np.pi - turn
            value = norm * (sine + rest * np.cos(turn))
            after = []
            for i, (along, own) in enumerate(slopes):
                wider = (own[:, None] * left + left[:, None] * own) / (2 * norm)
                more = 1.0 if i == 0 else value / (2 * np.pi)
                most = 1.0 if i == 0 else left / 2
                after.append((more + v / (2 * np.pi) * (sine * wider + rest * along), most + v / 2 * own))
            both, left, slopes = b + v / (2 * np.pi) * value, b + v / 2 * left, after
        return both, np.stack([b * slopes[0][0], v * slopes[1][0]], -1)

    def layers(self, x: Any, y: Any) -> tuple[Any, list[tuple[Any, Any, Any]]]:
        """Return covariances [m, k], and of each layer the norms, the angles and the variances of x."""
        v, b, wide = self.weight, self.bias, x.shape[1]
        both = b + v * (x @ y.T) / wide
        left, right = (b + v * (p * p).sum(-1) / wide for p in (x, y))
        kept = []
        for _ in range(self.depth):
            norm, turn = _angle(both, left, right)
            kept.append((norm, turn, left))
            both = b + v / (2 * np.pi) * norm * (np.sin(turn) + (np.pi - turn) * np.cos(turn))
            left, right = b + v / 2 * left, b + v / 2 * right
        return both, kept

    def pulled(self, x: Any, y: Any, kept: list[tuple[Any, Any, Any]], slope: Any) -> Any:
        """Return the derivative by x [m, n] of sum(slope * k(x, y)), slope [m, k]."""
        v, wide = self.weight, x.shape[1]
        own = np.zeros(len(x))
        for norm, turn, left in reversed(kept):
            wider = v / (2 * np.pi) * np.sin(turn) * slope
            own = v / 2 * own + (wider * norm).sum(-1) / (2 * left)
            slope = v / (2 * np.pi) * (np.pi - turn) * slope
        return v / wide * (slope @ y + 2 * own[:, None] * x)

    def diag(self, X: Any) -> Any:
        """Return each point's variance."""
        found = self.bias + self.weight * (np.asarray(X, dtype=float) ** 2).sum(-1) / np.shape(X)[1]
        for _ in range(self.depth):
            found = self.bias + self.weight / 2 * found
        return found

    def is_stationary(self) -> bool:
        """Say that it depends on more than differences."""
        return False


def _angle(both: Any, left: Any, right: Any) -> tuple[Any, Any]:
    norm = np.sqrt(left[:, None] * right)
    return norm, np.arccos(np.clip(both / norm, -1 + NEAR, 1 - NEAR))
