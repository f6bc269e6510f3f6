"""SMT: the blocks of the attention's matrices that the data pull at most."""

from __future__ import annotations

from collections.abc import Sequence

from neurograft.core.card import method
from neurograft.core.errors import one_of
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training

WARMUPS = ("probe", "rewind")


@method(
    paper="smt",
    kinds={"block"},
    task="text-generation",
    departs="Gradients are gathered without moving the model (warmup='probe'), or along the paper's short full "
    "fine-tune after which the model goes back to the base ('rewind'); the reference trains on from the warmed-up "
    "weights, whose change is dense and no graft of blocks. Blocks are as large as divides both sides, up to 64, "
    "unless block= says 256 as the paper. Learning-rate warm-up 0.",
)
def smt(
    *,
    fraction: float = 0.05,
    block: int | None = None,
    roles: Sequence[str] = ("q", "k", "v"),
    score: str = "abs_mean",
    per: str = "global",
    warmup: str = "probe",
    warmup_examples: int = 1600,
    warmup_lr: float = 1e-5,
    lr: float = 1e-4,
    epochs: float = 3.0,
    batch: int = 16,
) -> Recipe:
    """Cut matrices into blocks, score each by its gathered gradient, train the best.

    Args:
        fraction: share of the candidate blocks (the paper's 0.86 % of Llama-2-7B are 7 % of q, k, v).
        block: side of a block.
        roles: candidate matrices; the paper finds v to matter most and gives the MLP nothing.
        score: "abs_mean" |mean of the gradient|, the reference's default, blind to a block whose entries are pulled
            both ways; "mean_abs", which the text describes and which is not; "l1"; "l2".
        per: the quota: "global" over all matrices, or "site" for each.
        warmup: "probe" or "rewind".
        warmup_examples: examples the gradients are gathered over (the paper: 100 batches).
        warmup_lr: learning rate of the rewound fine-tune.
        lr: learning rate, linear.
        epochs: passes over the data.
        batch: examples in a batch; gradients are clipped to norm 1.
    """
    rate = warmup_lr if one_of(warmup, WARMUPS, what="warmup") == "rewind" else 0.0
    by = ("within", {"by": ("gradient", {"score": score, "warmup_lr": rate}), "roles": list(roles)})
    args = training(lr=lr, epochs=epochs, batch=batch, warmup=0.0, max_grad_norm=1.0)
    side = None if block is None else (block, block)
    return Recipe(
        "smt",
        (
            {"do": "locate", "by": by, "units": "block", "block": side, "limit": warmup_examples, "batch_size": batch},
            {"do": "select", "by": "top", "fraction": fraction, "per": per},
            {"do": "tune", "adapter": "slice", "args": args},
        ),
        paper="smt",
    )
