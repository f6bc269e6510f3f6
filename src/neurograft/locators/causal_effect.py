"""Which heads alone bring an instruction's answer back into a prompt that lacks the instruction."""

from __future__ import annotations

from neurograft.core.card import method
from neurograft.core.context import Context
from neurograft.core.selection import Scores
from neurograft.core.taps.end_states import effects, end_means
from neurograft.locators._common import need_two_sets, scored


@method(
    paper="instruction-vector",
    kinds={"head"},
    needs={"batches", "contrast", "labels", "taps", "per_token"},
    claims={"finite", "length"},
)
def causal_effect(context: Context, *, measure: str = "probability") -> Scores:
    """Score each head by what its mean over instructed prompts restores of the answer in prompts without.

    hbar_h = mean of head h's output (what enters the output projection) at the last prompt token of the batches;
    score_h = mean over the contrast rows of P(y_c | h = hbar_h at the last prompt token) - P(y_c), one run for each
    head and batch.

    Args:
        context: model, heads, instructed prompts as batches, and as contrast the same kind of prompts without the
            instruction (or with demonstrations whose labels are shuffled), labelled with the instructed answers y_c.
        measure: "probability" of the answer's first token, or "nll", the drop of the answer's mean negative
            log-likelihood, which the authors' later code ranks by.

    Raises:
        RequestError: no contrast, or a row without a labelled answer behind a prompt.
    """
    need_two_sets(context, came="instructed prompts alone", expected="prompts without the instruction too")
    values = end_means(context.model, context.sites, context.batches)
    found = effects(context.model, context.sites, context.contrast, values, measure=measure)
    return scored(context, found, {"measure": measure})
