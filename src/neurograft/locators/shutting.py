"""What shutting a unit would take off the loss, along a path on which the weights shrink."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neurograft.core.card import method
from neurograft.core.context import Context
from neurograft.core.errors import RequestError
from neurograft.core.prompts.collate import rebatched
from neurograft.core.selection import Scores
from neurograft.core.units import Parameters, Part
from neurograft.locators._common import backward, need_batches, scored
from neurograft.locators._parts import owners, summed, view
from neurograft.locators._weights import put_back, weight_gradients


@method(
    paper="cones",
    needs={"batches", "gradients"},
    takes={"objective", "target"},
    claims={"finite", "length", "permutes"},
    departs="Weights shrink in float32 whatever the model's dtype, where the reference's half precision rounds most "
    "steps away. A unit of several numbers scores their sum.",
)
def shutting(context: Context, *, steps: int | None = None, rho: float = 2e-5, batch_size: int = 2) -> Scores:
    """Score each unit by the sum over steps of theta * dL/dtheta, with theta <- theta * (1 - rho * theta * dL/dtheta).

    To first order the loss falls by theta * dL/dtheta where theta becomes 0: the units to shut are those with high
    scores. The path is gradient descent on log m at theta = m * theta_0, to first order: what does not pay shrinks
    away, and the rest is asked there. Afterwards the model is as it was; of the path only the scores remain. Held
    beside the model are the sites' parameters, float32, and twice more for rho > 0.

    Args:
        context: model, sites, batches, loss or target. A loss may draw anew in every step, as those of diffusion do.
        steps: backward passes, one batch each, the batches in turn; one for each batch if None. The paper makes 1000.
        rho: rate of the path; 0 to stay at theta_0. What a rate does depends on the size of the loss.
        batch_size: examples in a step, however the data are batched.

    Raises:
        RequestError: no data, no step, a rate below 0, no scalar, units without weights, or a path that ran off to
            where the loss is no number.
    """
    need_batches(context)
    batches = rebatched(context.model, context.batches, batch_size)
    steps = len(batches) if steps is None else steps
    if steps < 1 or not 0 <= rho < math.inf:
        raise RequestError(
            f"steps={steps}, rho={rho}", expected="at least one step and a rate of 0 or more", do="steps=1000, rho=2e-5"
        )
    found = owners(context.sites, context.model)
    parameters = {n: p for n, p in Parameters.of(context.model).by_name.items() if n in found}
    # The scores, a number at a time; what no site owns stays where it is.
    totals = {n: torch.zeros(p.shape, device=p.device) for n, p in parameters.items()}
    effects: dict[str, Tensor] = {}

    def tell(name: str, weight: Tensor, grad: Tensor) -> None:
        effects[name] = path[name] * grad.float()

    with put_back(parameters if rho else {}), weight_gradients(context.model, found, tell):
        path = {n: p.detach().float().contiguous() for n, p in parameters.items()}
        owned = {n: _owned(p, [part for _, part in found[n]]) for n, p in path.items()}
        for step in range(steps):
            effects.clear()
            backward(context.scalar(batches[step % len(batches)], step=step))
            with torch.no_grad():  # only now: what lies below still had to read the weights
                for name, effect in effects.items():
                    totals[name] += effect
                    if rho:
                        path[name] = torch.where(owned[name], shrunk(path[name], effect, rho), path[name])
                        parameters[name].copy_(path[name])
    values = {n: torch.zeros(s.n, dtype=torch.float64) for n, s in context.sites.items()}
    for name, total in totals.items():
        for site, part in found[name]:
            values[site] += summed(part, total).double()
    return scored(context, values, {"steps": steps, "rho": rho})


def shrunk(theta: Tensor, effect: Tensor, rho: float) -> Tensor:
    """Return the weights one step down the path.

    Example:
        >>> shrunk(torch.tensor([2.0, 2.0]), torch.tensor([1.0, -1.0]), 0.25).tolist()
        [1.5, 2.5]
    """
    return theta * (1 - rho * effect)


def _owned(weight: Tensor, parts: list[Part]) -> Tensor:
    """Return which numbers of a parameter some unit owns, bool, shaped like it."""
    numbered = torch.arange(weight.numel(), device=weight.device).view(weight.shape)
    mine = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    for part in parts:
        mine[view(part, numbered).reshape(-1)] = True
    return mine.view(weight.shape)
