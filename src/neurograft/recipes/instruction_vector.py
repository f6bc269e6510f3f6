"""Instruction vectors: what of a task's forgetting is the instruction's, and a tuning that keeps the way it acts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neurograft.core.card import method
from neurograft.core.ranges import above, least
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._everything import everything
from neurograft.recipes._training import training


@method(
    paper="instruction-vector",
    kinds={"head"},
    needs={"contrast"},
    task="text-generation",
    departs="The guidance is the authors' own trainer's of June 2024, four days before the preprint: heads each at its "
    "own layer, the student's vector taken out (sign=-1) and given back; whether the paper's tables were made with "
    "this sign is not known, sign=1 is the other reading. Heads are found on the model at hand, where the trainer has "
    "ten fixed ones. Rank, learning rate and batch are those of the authors' follow-up, which updates q and v alone; "
    "families that fuse q, k and v cannot. Padding is left out of the divergence. The follow-up's anchor on the heads' "
    "outputs is not built. On a tiny decoder the divergence keeps the old tasks, the student's intervention does not "
    "add to it, and a vector put back after plain tuning restores next to nothing; the proof's record has the table.",
)
def instruction_vector(
    *,
    instructed: str | None = None,
    heads: int | None = None,
    measure: str = "probability",
    examples: int | None = 100,
    layer: int | None = None,
    at: str = "residual",
    weight: float = 1.0,
    sign: int = -1,
    temperature: float = 2.0,
    reduce: str = "sum",
    end_weight: float = 0.0,
    floor: float = 0.0,
    roles: Sequence[str] = ("q", "k", "v"),
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.1,
    lr: float = 1e-4,
    epochs: float = 10.0,
    batch: int = 32,
    warmup: float = 0.0,
) -> Recipe:
    """Find the heads that carry an instruction, make its vector, and tune with guidance by it.

    theta = sum over the best heads of W_o^h hbar_h, hbar_h the head's mean at the last prompt token. Loss =
    cross-entropy of the model with sign * alpha(t) hbar added + weight * KL(it || the base with hbar added). The
    outcome's state holds `vector` (the head means) and `inserted` (theta in the residual stream), grafts that make a
    prompt without the instruction be answered by it, at the last token of every pass as in generation; `graft` is what
    was trained. `audits.instruction_split`, which puts a vector where a labelled row's prompt ends, and
    `audits.vector_drift` measure what was forgotten.

    Args:
        instructed: file of rows with `positive` (instructed prompts) and `negative` (the same without the
            instruction), prompt/completion each, both with the instructed answer; if None, the data's own rows must
            have these columns.
        heads: how many; 10 if None, or all of a model that has fewer.
        measure: what ranks the heads, "probability" of the answer's first token or "nll".
        examples: prompts of each side that rank the heads, one run for each head and batch of them; None for all.
        layer: block at which theta is added; as 9 of 32 if None.
        at: "residual", behind the block, or "attention", behind its attention (follow-up).
        weight: of the divergence.
        sign: of the student's vector: -1, 1, or 0 for none.
        temperature: of the divergence.
        reduce: "sum" over positions, as published, or "mean".
        end_weight: of the divergence at the last prompt token alone (follow-up: 20).
        floor: a divergence counts only above it (follow-up: 0.1).
        roles: matrices that get an update; the follow-up takes q and v, which fused families have not alone.
        r: its rank.
        alpha: its scale is alpha / r.
        dropout: on its input.
        lr: learning rate, constant.
        epochs: passes over the data.
        batch: examples in a batch.
        warmup: share of the steps.
    """
    least(r=(r, 1), roles=(len(roles), 1))
    above(temperature=(temperature, 0))
    source: dict[str, Any] = {} if instructed is None else {"data": instructed}
    guidance = {"vector": "$vector", "weight": weight, "sign": sign, "temperature": temperature, "reduce": reduce}
    guidance |= {"end_weight": end_weight, "floor": floor}
    by = ("causal_effect", {"measure": measure})
    add = {"kind": "add", "positions": "last"}
    schedule = "constant_with_warmup" if warmup else "constant"
    return Recipe(
        "instruction_vector",
        (
            {"do": "locate", "by": by, "units": "head", "limit": examples, **source},
            {"do": "neurograft.pipeline.instructed", "count": heads, "layer": layer, "at": at, **source},
            {"do": "intervene", "where": "$heads", "value": "$means", **add, "as": "vector"},
            {"do": "intervene", "where": "$stream", "value": "$theta", **add, "as": "inserted"},
            *everything("column", {"roles": list(roles)}, scores="matrices"),
            {
                "do": "tune",
                "adapter": ("lora", {"r": r, "alpha": alpha, "dropout": dropout}),
                "objective": ("guided", guidance),
                "args": training(lr=lr, epochs=epochs, batch=batch, warmup=warmup, schedule=schedule),
            },
        ),
        paper="instruction-vector",
    )
