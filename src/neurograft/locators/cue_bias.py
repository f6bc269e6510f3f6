"""Which channels make a prompt prefer one group's word, or make words depend on the group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from neurograft.core.card import method
from neurograft.core.context import Batch, Context, Said
from neurograft.core.errors import RequestError, one_of
from neurograft.core.prompts.candidates import candidate_ids, candidate_logits, divergence, entropy
from neurograft.core.prompts.examples import size
from neurograft.core.selection import Scores
from neurograft.locators._common import need_batches
from neurograft.locators.integrated_gradients import integrated_gradients

DIRECTIONS, EPS = ("forward", "backward"), 1e-12


@method(
    paper="bidirectional-bias",
    kinds={"norm", "channel", "column"},
    needs={"batches", "labels", "taps", "gradients", "per_token"},
    claims={"finite", "length", "permutes"},
    departs="Midpoints on the path instead of the reference's inclusive points, whose quadrature is 3 % off "
    "(rule='inclusive' as published). One position, where the answer begins, instead of four generated ones. "
    "Candidates are single tokens.",
)
def cue_bias(
    context: Context,
    *,
    candidates: Sequence[str | int] = (),
    direction: str = "forward",
    variants: int = 2,
    temperature: float = 0.1,
    last: bool = False,
    steps: int = 20,
    rule: str = "midpoint",
) -> Scores:
    """Attribute a preference among candidate tokens to the units of each site, by integrated gradients from 0.

    Forward (cue to group): F = 1 / (H(p) + 1e-12), p over the candidates where the answer begins, renormalised, so
    that a high score speaks for a strong preference. Backward (group to word): each prompt comes in `variants` rows
    that differ in the group, and F = mean_g KL(q_g || mean q), q_g over the candidates at `temperature`; attributions
    are summed over the variants and divided by their number. Scores keep their sign. For a bias-free head the forward
    scores of a prompt add up to 1 / H(p) - 1 / log n.

    Args:
        context: model, sites with taps, labelled batches.
        candidates: words or token ids; empty for the first tokens of the data's answers.
        direction: "forward" or "backward".
        variants: rows of a prompt that stand together, for "backward"; a batch holds whole prompts.
        temperature: of the backward distributions.
        last: score the last site in the model's order alone: with units="norm" the final norm's output, which is what
            the head reads, with units="channel", at="residual" what the last block hands on.
        steps: points on the path.
        rule: of quadrature, see `integrated_gradients`.

    Raises:
        RequestError: no labelled rows, fewer than two candidates, batches that cut a prompt's variants apart.
    """
    one_of(direction, DIRECTIONS, what="direction")
    need_batches(context)
    ids = candidate_ids(context.batches, candidates, context.processor)
    if direction == "backward":
        cut = next((size(b) for b in context.batches if variants < 2 or size(b) % variants), None)
        if cut is not None:
            raise RequestError(
                f"a batch of {cut} rows for prompts in {variants} variants",
                expected="at least two variants of each prompt side by side",
                do="order the rows by prompt, and set batch_size= to a multiple of variants=",
            )

    def forward(outputs: Any, batch: Batch) -> Tensor:
        return (1 / (entropy(candidate_logits(outputs.logits, batch, ids)) + EPS)).mean()

    def backward(outputs: Any, batch: Batch) -> Tensor:
        logits = candidate_logits(outputs.logits, batch, ids) / temperature
        return divergence(logits.reshape(-1, variants, logits.shape[-1])).mean()

    names = list(context.sites)[-1 if last else 0 :]
    asked = replace(
        context,
        sites={name: context.sites[name] for name in names},
        target=Said(forward if direction == "forward" else backward),
        positions="all",
    )
    found = integrated_gradients(asked, steps=steps, rule=rule, signed=True)
    scale = 1.0 if direction == "forward" else 1 / variants
    card = {**found.card, "candidates": ids.tolist(), "direction": direction}
    return Scores(found.sites, {n: v * scale for n, v in found.values.items()}, card)
