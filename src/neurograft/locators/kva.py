"""Which output coordinates of a sub-layer the answer's probability comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from neurograft.core.card import method
from neurograft.core.context import Batch, Context, Said, token_mask
from neurograft.core.errors import RequestError, one_of
from neurograft.core.prompts.candidates import first_answers
from neurograft.core.running import run
from neurograft.core.selection import Scores
from neurograft.locators._common import need_batches
from neurograft.locators.integrated_gradients import integrated_gradients

ANSWERS, AIMS = ("labelled", "likeliest"), ("probability", "logit")


@method(
    paper="loki",
    kinds={"row", "channel"},
    needs={"batches", "taps", "gradients", "per_token"},
    claims={"finite", "length", "permutes"},
    departs="The printed formula averages gradients and leaves the activation out (multiply=False); the authors' code "
    "multiplies with it, as the default here does, but begins at a sequence of token 0, moves every position, uses the "
    "trapezoid rule and attributes the token the model finds likeliest: baseline='token', everywhere=True, "
    "rule='trapezoid', answer='likeliest'. The paper speaks of the target's logit, its code takes the probability: "
    "of='logit' or 'probability'.",
)
def kva(
    context: Context,
    *,
    steps: int = 7,
    rule: str = "right",
    baseline: str = "zero",
    token: int = 0,
    everywhere: bool = False,
    multiply: bool = True,
    answer: str = "labelled",
    of: str = "probability",
    per_example: bool = False,
) -> Scores:
    """Score output coordinate j of each site by z_j * (1/m) sum_k dF(k/m z)/dz_j, F the answer token's probability.

    Knowledge vector attribution: z is what the site writes where the answer begins, one site at a time, with the
    authors' m = 7 right Riemann steps; F is read at the same position. Scores keep their sign and are means over
    examples; those of a site add up to F(z) - F(0) but for the quadrature (`completeness` in the card).

    Args:
        context: model, sites with taps, batches; with answer="labelled" they are labelled.
        steps: m.
        rule: of quadrature, see `integrated_gradients`.
        baseline: where the path begins: "zero", or "token", the activations of as many tokens `token`.
        token: of baseline="token".
        everywhere: move every position along the path and not only the one that is scored.
        multiply: False leaves the factor z_j - baseline out.
        answer: "labelled", the first token of the data's answer; or "likeliest", what the model would say there, or
            behind the last token of data without labels.
        of: F, its "probability" or its "logit".
        per_example: keep the scores of each example, for `selectors.vote`.

    Raises:
        RequestError: no data, rows without an answer, or units without a tap.
    """
    one_of(answer, ANSWERS, what="answer")
    one_of(of, AIMS, what="of")
    need_batches(context)
    # By the tokens themselves: taps see the arguments of a pass, which are another dict with the same tensors.
    aims = {id(batch["input_ids"]): _aim(context, batch, answer) for batch in _tokens(context)}

    def place(batch: Batch) -> Tensor:
        tokens = batch["input_ids"]
        at, _ = aims[id(tokens)]
        return torch.arange(tokens.shape[1], device=tokens.device) == at[:, None]

    def target(outputs: Any, batch: Batch) -> Tensor:
        at, said = aims[id(batch["input_ids"])]
        logits = outputs.logits[torch.arange(len(at), device=at.device), at]
        values = logits if of == "logit" else logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        return values.gather(1, said[:, None]).mean()

    asked = replace(context, target=Said(target), positions=place)
    found = integrated_gradients(
        asked,
        steps=steps,
        rule=rule,
        baseline=baseline,
        token=token,
        everywhere=everywhere,
        multiply=multiply,
        signed=True,
        per_example=per_example,
    )
    return replace(found, card={**found.card, "answer": answer, "of": of})


def _tokens(context: Context) -> Sequence[Batch]:
    if any("input_ids" not in batch for batch in context.batches):
        raise RequestError("data without tokens for kva", expected="input_ids", do="give text")
    return context.batches


def _aim(context: Context, batch: Batch, answer: str) -> tuple[Tensor, Tensor]:
    """Return the position in front of each row's answer, and the token that is attributed, int64 [B] each."""
    if answer == "labelled" or "labels" in batch:
        at, said = first_answers(batch)
        at = at - 1
    else:
        last = token_mask(batch, "last")
        assert last is not None
        at = last.int().argmax(1)
    if answer == "likeliest":
        with torch.no_grad():
            logits = run(context.model, batch).logits
        said = logits[torch.arange(len(at), device=at.device), at].argmax(-1)
    return at, said
