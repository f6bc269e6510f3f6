"""Low-rank pressure: the nuclear norm of what is trained of one matrix a step."""

from __future__ import annotations

import torch
from torch import Tensor

from neurograft.core.card import method
from neurograft.core.context import Step
from neurograft.core.errors import RequestError
from neurograft.core.seeds import generator


@method(
    paper="sara",
    claims={"penalty"},
    departs="Matrices count from a smaller side of more than 16, not 64, so that small models are pressed too; pass "
    "side=64 for the reference's rule.",
)
def nuclear(step: Step, *, side: int = 16, seed: int = 0) -> Tensor:
    """Return the sum of singular values of P * M for one matrix P drawn at random, M marking what is trained of it.

    Its gradient is U V^T on M: all directions shrink alike, so that the weak ones vanish. An anchor without data:
    `anchor=("nuclear", {"weight": 5e-4})`.

    Args:
        step: names the draw by its number; what is trained.
        side: a matrix counts if its smaller side is larger.
        seed: names the draws.

    Raises:
        RequestError: nothing trained is part of such a matrix.
    """
    trained = step.trained()
    names = sorted(n for n, t in trained.items() if len(t.region.shape) == 2 and min(t.region.shape) > side)
    if not names:
        raise RequestError(
            f"a nuclear norm over {len(trained)} trained tensors, none of a matrix with both sides above {side}",
            expected="part of one such matrix, trained in place or whole",
            do="lower side=, or use adapter='slice' in place",
        )
    pick = names[int(torch.randint(len(names), (), generator=generator(seed, "nuclear", step.step)))]
    held = trained[pick]
    region, values = held.region, held.values
    masked = values
    if region.layout != "all":
        flat = region.flat().to(values.device)
        masked = values.new_zeros(region.shape[0] * region.shape[1]).index_copy(0, flat, values.reshape(-1))
    singular: Tensor = torch.linalg.svdvals(masked.reshape(region.shape))
    return singular.sum()
