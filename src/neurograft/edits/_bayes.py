"""Bayesian optimisation: a Gaussian process over what was seen proposes where the improvement is expected.

The process is scikit-learn's, refitted every round; the acquisition climbs along its written-out gradient.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from neurograft.core.errors import extra
from neurograft.core.numerics.search import Found, Propose, drawn

if TYPE_CHECKING:
    from sklearn.gaussian_process import GaussianProcessRegressor

NOISE = (1e-5, 1e-1)  # variance of the fitness beside the process, in units of its variance
LEAST = 1e-12  # of a posterior variance


def bayes(
    low: Tensor,
    high: Tensor,
    *,
    depth: int = 12,
    weight: float = 10.0,
    bias: float = 5.0,
    restarts: int = 20,
    raw: int = 1024,
    steps: int = 30,
) -> Propose:
    """Return a proposer: the point with the largest log expected improvement over the best one seen.

    Inputs are brought to [0, 1], fitness is standardised; the kernel's variances, its scale and a noise are fitted
    to what was seen, from where the last round's fit ended.

    Args:
        low: bounds [n].
        high: bounds [n].
        depth: hidden layers of the kernel's infinitely wide network.
        weight: variance of its weights at the start.
        bias: variance of its biases at the start.
        restarts: how many points climb the acquisition.
        raw: of how many random ones they are the best.
        steps: iterations of L-BFGS-B, of the fit and of the climb.

    Raises:
        RequestError: scikit-learn is not installed.

    Example:
        >>> from neurograft.core.numerics.search import search
        >>> low, high = torch.tensor([-1.0]), torch.tensor([1.0])
        >>> rng = torch.Generator().manual_seed(0)
        >>> near = lambda x: -float((x - 0.3).square().sum())
        >>> found = search(torch.tensor([[-0.9], [0.9]]), near, bayes(low, high), rounds=5, generator=rng)
        >>> abs(float(found.best) - 0.3) < 0.1
        True
    """
    with extra("probes", what="Bayesian optimisation", instead="pass optimizer='random'"):
        from sklearn.gaussian_process.kernels import ConstantKernel, WhiteKernel

        from neurograft.edits._arccos import Arccos

    start, span = low.double(), (high - low).double()
    level = 1 / float(Arccos(depth, weight, bias).diag(np.full((1, len(low)), 0.5))[0])  # variance 1 at the start
    kernel = ConstantKernel(level, (level * 1e-2, level * 1e6)) * Arccos(depth, weight, bias)
    state: dict[str, Any] = {"kernel": kernel + WhiteKernel(1e-3, NOISE)}
    zero, one = torch.zeros(len(low)), torch.ones(len(low))

    def propose(found: Found, generator: torch.Generator) -> Tensor:
        seen = ((found.points - start) / span).numpy()
        process = fitted(seen, found.fitness.numpy(), state["kernel"], steps)
        state["kernel"] = process.kernel_
        gain = improvement(process, seen, float(found.fitness.max()))
        tries = drawn(zero, one, raw, generator).numpy()
        order = np.argsort(-gain(tries)[0], kind="stable")
        ends = _climbed(gain, tries[order[:restarts]], steps)
        return start + torch.as_tensor(ends[gain(ends)[0].argmax()])[None] * span

    return propose


def fitted(x: Any, y: Any, kernel: Any, steps: int) -> GaussianProcessRegressor:
    """Return a process fitted to fitness y [m] at points x [m, n] by its marginal likelihood."""
    from scipy.optimize import minimize
    from sklearn.gaussian_process import GaussianProcessRegressor

    def descend(loss: Callable[..., Any], start: Any, bounds: Any) -> tuple[Any, Any]:
        end = minimize(loss, start, jac=True, bounds=bounds, method="L-BFGS-B", options={"maxiter": steps})
        return end.x, end.fun

    process = GaussianProcessRegressor(kernel, optimizer=descend, normalize_y=True)
    with warnings.catch_warnings():
        # It warns of variances that end at their bounds, where they may be.
        warnings.simplefilter("ignore")
        return process.fit(x, y)


def improvement(process: GaussianProcessRegressor, seen: Any, best: float) -> Callable[[Any], tuple[Any, Any]]:
    """Return points [m, n] -> log of the expected improvement [m] over `best`, and its gradient [m, n].

    Args:
        process: fitted; its kernel is scale * arccos + noise.
        seen: the points it was fitted on, [p, n].
        best: the largest fitness seen.
    """
    from scipy.linalg import cho_solve

    scale, kernel = float(process.kernel_.k1.k1.constant_value), process.kernel_.k1.k2
    alpha, mean, std = np.ravel(process.alpha_), process._y_train_mean, process._y_train_std
    bar = (best - float(np.ravel(mean)[0])) / float(np.ravel(std)[0])

    def gain(x: Any) -> tuple[Any, Any]:
        cross, kept = kernel.layers(x, seen)
        solved = cho_solve((process.L_, True), scale * cross.T).T
        spread = np.sqrt(np.maximum(scale * kernel.diag(x) - (solved * scale * cross).sum(-1), LEAST))
        z = (scale * cross @ alpha - bar) / spread
        value = log_improvement(z)
        # EI = spread * h(z): its derivatives by mean and spread are Phi(z) and phi(z).
        by_mean = np.exp(_log_ndtr(z) - value) / spread
        by_variance = np.exp(_log_phi(z) - value) / spread / (2 * spread)
        slope = scale * (by_mean[:, None] * alpha - 2 * by_variance[:, None] * solved)
        own = scale * 2 * kernel.weight / x.shape[1] * (kernel.weight / 2) ** kernel.depth
        return value + np.log(spread), kernel.pulled(x, seen, kept, slope) + (own * by_variance)[:, None] * x

    return gain


def log_improvement(z: Any) -> Any:
    """Return log(phi(z) + z Phi(z)), without cancellation where z is far below 0.

    Example:
        >>> [round(float(v), 6) for v in log_improvement(np.array([0.0, -40.0]))]
        [-0.918939, -808.298568]
    """
    from scipy.special import erfcx, ndtr

    high, low = np.maximum(z, -1.0), np.minimum(z, -1.0)
    near = np.log(np.exp(_log_phi(high)) + high * ndtr(high))
    # phi + z Phi = phi (1 - |z| sqrt(pi / 2) erfcx(|z| / sqrt 2)); the bracket goes to 1 / z^2
    ratio = -low * math.sqrt(math.pi / 2) * erfcx(-low / math.sqrt(2))
    far = _log_phi(low) + np.where(low > -1e3, np.log1p(-np.minimum(ratio, 1 - 1e-15)), -2 * np.log(-low))
    return np.where(z > -1.0, near, far)


def _log_phi(z: Any) -> Any:
    return -0.5 * z * z - 0.5 * math.log(2 * math.pi)


def _log_ndtr(z: Any) -> Any:
    from scipy.special import log_ndtr

    return log_ndtr(z)


def _climbed(gain: Callable[[Any], tuple[Any, Any]], start: Any, steps: int) -> Any:
    """Return points that climbed the gain inside of [0, 1], all together."""
    from scipy.optimize import minimize

    def loss(flat: Any) -> tuple[float, Any]:
        value, slope = gain(flat.reshape(start.shape))
        return -float(value.sum()), -slope.reshape(-1)

    limits = [(0.0, 1.0)] * start.size
    end = minimize(loss, start.reshape(-1), jac=True, bounds=limits, method="L-BFGS-B", options={"maxiter": steps})
    return end.x.reshape(start.shape)
