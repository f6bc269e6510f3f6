"""How large a weight is once its matrix is reduced to its strongest directions."""

from __future__ import annotations

import torch
from torch import Tensor

from neurograft.core.card import method
from neurograft.core.context import Context
from neurograft.core.errors import RequestError, one_of
from neurograft.core.selection import Scores
from neurograft.core.units import Parameters
from neurograft.locators._common import scored
from neurograft.locators._parts import owners, view

SVD = ("exact", "random")


@method(paper="lift", kinds={"weight"}, claims={"finite", "length"})
def principal(context: Context, *, r: int = 128, svd: str = "exact", rounds: int = 2) -> Scores:
    """Score each weight by |W_r|, its size in the best approximation of rank r: W_r = U_r S_r V_r^T.

    A large weight that stands alone counts little, a middling one that many others go along with counts much. One
    matrix is decomposed at a time and its factors are dropped; a bank of experts is one matrix for each expert.

    Args:
        context: model and sites of kind "weight"; no data is used.
        r: directions kept; from the smaller side of a matrix on, the scores are |W|.
        svd: "exact", or "random": from 2 r random directions, which is faster and near it.
        rounds: how often the random directions are turned towards the strongest ones.

    Raises:
        RequestError: r below 1, or rounds below 0.
    """
    one_of(svd, SVD, what="svd")
    if r < 1 or rounds < 0:
        raise RequestError(f"r={r}, rounds={rounds}", expected="r from 1, rounds from 0", do="give r=128, rounds=2")
    parameters = Parameters.of(context.model).by_name
    values = {}
    for param, found in owners(context.sites, context.model).items():
        for name, part in found:
            high, wide = part.units[-2][0], part.units[-1][0]
            tall = view(part, parameters[param]).reshape(-1, high, wide)
            tall = tall if tall.dtype == torch.float64 else tall.float()
            rng = context.generator("principal", name)
            reduced = [_reduced(w, r, svd, rounds, rng) for w in tall]
            values[name] = torch.stack(reduced).abs().reshape(-1)
    return scored(context, values)


def _reduced(w: Tensor, r: int, svd: str, rounds: int, rng: torch.Generator) -> Tensor:
    if r >= min(w.shape):
        return w
    if svd == "random" and 2 * r < min(w.shape):
        drawn = torch.randn(w.shape[1], 2 * r, generator=rng).to(w)
        basis = torch.linalg.qr(w @ drawn).Q
        for _ in range(rounds):
            basis = torch.linalg.qr(w @ torch.linalg.qr(w.t() @ basis).Q).Q
        u, s, v = torch.linalg.svd(basis.t() @ w, full_matrices=False)
        u = basis @ u
    else:
        u, s, v = torch.linalg.svd(w, full_matrices=False)
    return (u[:, :r] * s[:r]) @ v[:r]
