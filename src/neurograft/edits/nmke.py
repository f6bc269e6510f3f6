"""NMKE: facts written into FFNs by a normal equation, only over the neurons that speak in their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neurograft.core.card import method
from neurograft.core.context import Context, device_of
from neurograft.core.errors import RequestError, one_of
from neurograft.core.grafts.graft import Graft
from neurograft.core.numerics.keyvalue import answers
from neurograft.core.prompts.requests import Rows, joined
from neurograft.core.ranges import least
from neurograft.core.selection import Selection
from neurograft.edits._amplified import amplified, mask_of
from neurograft.edits._layers import in_order
from neurograft.edits._memory import Memory, memories, reaches
from neurograft.edits._protected import caches, covariances
from neurograft.edits._values import wanted

MASKS = ("post", "solve", "none")
WIDTH = 14_336  # neurons of an FFN of Llama-3-8B, for which the paper amplifies 30 times


@method(
    paper="nmke",
    kinds={"neuron"},
    needs={"requests", "gradients", "taps"},
    claims={"separable"},
    departs="The covariance of the keys to protect, and the keys of earlier edits, are read from the model as it is "
    "when a batch comes (of earlier edits behind the bare prompt), not once from the base; without general data the "
    "covariance is read from the prompts' own tokens. The KL term of the value search looks at the prediction behind "
    "the subject in the prompt itself, not behind a template '{subject} is a', so that it needs no language. "
    "mask='solve' solves inside the mask: masking afterwards, as the paper does ('post'), lets the protected keys "
    "drift. null, ridge and lr count in units of the model's own keys and stream, and the amplification in proportion"
    " to the layer's width: in a layer of some hundred neurons 30 times one of them drowns every word, and the mask "
    "then leaves out just the loud ones. absolute=True takes all four as the papers do.",
)
def nmke(
    context: Context,
    where: Selection | None = None,
    *,
    mask: str = "post",
    null: float | None = 2e-2,
    ridge: float = 1e-2,
    weight: float = 0.0,
    exact: bool = False,
    layers: Sequence[int] | None = None,
    gain: float = 30.0,
    steps: int = 25,
    lr: float = 0.5,
    clamp: float = 0.75,
    decay: float = 0.5,
    kl: float = 0.0625,
    eos: bool = False,
    absolute: bool = False,
) -> Graft:
    """Find for each request what the last layer should hand on at the subject, and let the layers learn it in order.

    Layer by layer, with keys K and what is still missing R, shared among the layers left:
    D = R (K K^T + A)^-1 K^T, A as `core.numerics.keyvalue.answers` has it. mask="none" is AlphaEdit; with null=None and
    weight > 0 it is MEMIT; with exact=True, weight=1 and one layer it is ROME.

    Args:
        context: model, requests; batches of general data whose keys are to keep their values.
        where: neurons that may be used at all.
        mask: "post" masks the change by neurons that speak in the batch's prompts, as the paper does; "solve" solves
            inside of them; "none".
        null: only directions in which the mean square of the keys to protect lies below this may be used, in units
            of its mean over all directions; None for all.
        ridge: L2, in the same units.
        weight: lambda of MEMIT, how much the covariance of the keys to protect counts.
        exact: meet the residuals exactly.
        layers: whose FFNs; the paper's 4 to 8 of 32, as a share of the depth.
        gain: how much a neuron is amplified when it is scored, in a layer of 14,336 neurons; narrower layers, where
            each neuron weighs more, in proportion.
        steps: of the search for values.
        lr: its learning rate, in units of the stream's root mean square.
        clamp: largest change of the stream at a subject, as a share of its norm.
        decay: weight of its norm.
        kl: weight of the divergence at the subject.
        eos: ask for the end of the answer too.
        absolute: null, ridge and lr in the model's own units, gain as it is.

    Returns:
        One rank for each request in every edited matrix.

    Raises:
        RequestError: no requests, no free direction, a model without FFNs that can be edited, such as one with a norm
            behind them, a selection of neurons that are all masked.
    """
    one_of(mask, MASKS, what="mask")
    if not context.requests:
        raise RequestError("an edit without requests", expected="at least one request", do="give prompt, target_new")
    least(steps=(steps, 1), lr=(lr, 0), clamp=(clamp, 0), decay=(decay, 0), kl=(kl, 0), gain=(gain, 0))
    least(ridge=(ridge, 0), weight=(weight, 0))
    model = context.model
    found = memories(context, layers, (0.125, 0.25))
    rows = joined(context.requests, device=device_of(model))
    reaches(model, found, rows)
    search: dict[str, Any] = {"steps": steps, "lr": lr, "clamp": clamp, "decay": decay, "kl": kl}
    goal = wanted(model, found[-1], context.requests, eos=eos, absolute=absolute, **search)
    held, cache, masks = covariances(context, found), caches(context, found), dict[str, list[int]]()

    def solve(memory: Memory, keys: Tensor) -> Tensor:
        name = memory.keys.name
        chosen = _mask(context, memory, rows, where, mask, gain if absolute else gain * memory.keys.n / WIDTH)
        masks[name] = [memory.keys.n if chosen is None else int(chosen.sum()), memory.keys.n]
        size = 1.0 if absolute else float(held[name].diagonal().mean())
        return answers(
            keys,
            ridge=ridge * size,
            covariance=held[name],
            weight=weight,
            null=None if null is None else null * size,
            cache=cache.get(name),
            mask=chosen,
            masked="solve" if mask == "none" else mask,
            exact=exact,
        )

    deltas = in_order(model, found, rows, goal, solve)
    return Graft.made(model, deltas, card={"requests": [r.as_dict() for r in context.requests], "neurons": masks})


def _mask(
    context: Context, memory: Memory, rows: Rows, where: Selection | None, mask: str, gain: float
) -> Tensor | None:
    found = None if mask == "none" else mask_of(amplified(context.model, memory, rows, gain=gain))
    if where is None:
        return found
    allowed = torch.zeros(memory.keys.n, dtype=torch.bool)
    allowed[where.ids.get(memory.keys.name, torch.empty(0, dtype=torch.int64))] = True
    if not bool(allowed.any()):
        raise RequestError(
            f"a selection without a neuron of {memory.keys.name}",
            expected="neurons of every layer that is edited",
            do="select neurons there, or name other layers",
        )
    both = allowed if found is None else found & allowed
    if not bool(both.any()):
        raise RequestError(
            f"a selection whose neurons of {memory.keys.name} are all masked: none speaks in these prompts",
            expected="some that do",
            do="select more neurons, or pass mask='none'",
        )
    return both
