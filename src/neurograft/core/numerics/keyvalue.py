"""Key-value edits of a linear map: one normal equation behind ROME, MEMIT, AlphaEdit and their relatives.

A map W [m, k] is to send n keys further by n residuals: (W + D) key_i = W key_i + residual_i. Every member of the
family is D = sum_i residual_i answer_i^T, so that each edit's own part can be taken out again; they differ in what
holds the rest of W in place while the answers [n, k] are sought:

| | ridge | weight * covariance | null | cache | exact |
|---|---|---|---|---|---|
| ridge least squares | > 0 | | | | |
| ROME | | 1 | | | yes |
| MEMIT | | > 0 | | | |
| AlphaEdit | > 0 | | threshold | earlier keys | |

Shape letters: n keys, k entries of a key, q free directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neurograft.core.errors import RequestError, one_of

MASKED = ("solve", "post")


def answers(
    keys: Tensor,
    *,
    ridge: float = 0.0,
    covariance: Tensor | None = None,
    weight: float = 0.0,
    null: float | None = None,
    cache: Tensor | None = None,
    mask: Tensor | None = None,
    masked: str = "solve",
    exact: bool = False,
) -> Tensor:
    """Return the rows of (K^T K + A)^-1 K^T with A = ridge + weight * covariance + cache, one for each key.

    Args:
        keys: K, [n, k].
        ridge: weight of every direction.
        covariance: E[key key^T] of keys whose values are to stay, [k, k].
        weight: how much they count.
        null: only directions of the covariance whose eigenvalue lies below this may be used.
        cache: sum of key key^T over keys edited earlier, [k, k].
        mask: entries of the keys that may be used, bool [k]; the answers are 0 elsewhere.
        masked: "solve" inside of the mask, its free directions found there; or mask the answers only afterwards
            ("post"), which lets protected keys drift.
        exact: meet every residual exactly, A deciding only how (A = 1 where nothing is given).

    Returns:
        The answers, float64 [n, k].

    Raises:
        RequestError: nothing holds the map where the keys leave it open, or no direction is free.

    Example:
        >>> answers(torch.tensor([[2.0, 0.0]]), ridge=1.0)
        tensor([[0.4000, 0.0000]], dtype=torch.float64)
    """
    one_of(masked, MASKED, what="masked")
    wide, k = keys.double(), keys.shape[1]
    if mask is not None and masked == "solve":
        inside = mask.nonzero().reshape(-1)
        cut = [None if c is None else c[inside][:, inside] for c in (covariance, cache)]
        found = torch.zeros_like(wide)
        if len(inside):
            how = {"ridge": ridge, "weight": weight, "null": null, "exact": exact}
            found[:, inside] = answers(wide[:, inside], covariance=cut[0], cache=cut[1], **how)  # type: ignore[arg-type]
        return found
    free = None if null is None else null_space(_needed(covariance, "null"), null)
    mine = wide if free is None else wide @ free
    held = torch.zeros(mine.shape[1], mine.shape[1], dtype=torch.float64, device=keys.device)
    for scale, matrix in ((weight, covariance if weight == 0 else _needed(covariance, "weight")), (1.0, cache)):
        if matrix is not None and scale:
            held += scale * (matrix.double() if free is None else free.T @ matrix.double() @ free)
    if ridge or (exact and not held.any()):
        held.diagonal().add_(ridge or 1.0)
    if exact:
        across = _solved(held, mine.T)
        found = _solved(mine @ across, across.T)
    else:
        found = _solved(held + mine.T @ mine, mine.T).T
    found = found if free is None else found @ free.T
    assert found.shape[1] == k
    return found if mask is None else found * mask


def null_space(covariance: Tensor, below: float) -> Tensor:
    """Return the eigenvectors of a covariance whose eigenvalues lie below a threshold, float64 [k, q].

    Raises:
        RequestError: there is none.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    free: Tensor = vectors[:, values < below]
    if not free.shape[1]:
        raise RequestError(
            f"a null space below {below:g}, where the least eigenvalue is {float(values[0]):.3g}",
            expected="a free direction of the keys",
            do="raise null, or leave it out and give weight",
        )
    return free


def _needed(covariance: Tensor | None, what: str) -> Tensor:
    if covariance is None:
        raise RequestError(f"{what} and no covariance", expected="both", do=f"give covariance=, or leave {what} out")
    return covariance


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        raise RequestError(
            "keys that leave the map open in some directions",
            expected="something that holds it there",
            do="give ridge > 0 (with exact=True: different keys)",
        )
    return torch.cholesky_solve(right, factor)
