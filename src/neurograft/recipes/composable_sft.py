"""Composable sparse fine-tuning: a lottery ticket of the numbers that full fine-tuning moves most, trained alone."""

from __future__ import annotations

from typing import Any

from neurograft.core.card import method
from neurograft.core.errors import RequestError
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._everything import everything
from neurograft.recipes._training import training

EVERYTHING, HEAD = "everything", "head"


@method(
    paper="composable-sft",
    kinds={"weight"},
    task="text-classification",
    departs="Frozen numbers never meet the optimizer; the reference zeroes their gradients, which weight decay would "
    "not respect, so it trains without. Changes below 1e-7 are kept. head='frozen' leaves out what is outside of the "
    "base model, for deltas of a language, where the reference trains masked-word heads along and drops them when "
    "the delta is put on. The optimizer and the learning-rate schedule start anew with each phase, as there.",
)
def composable_sft(
    *,
    fraction: float = 0.08,
    rounds: int = 1,
    head: str = "trained",
    on: str | None = None,
    l1: float = 0.0,
    lr: float = 5e-5,
    epochs: float = 3.0,
    sparse_epochs: float = 10.0,
    batch: int = 8,
    warmup: float = 0.0,
) -> Recipe:
    """Train everything but norms, keep the numbers that moved most, go back to the base and train those alone.

    Grafts of a task and of a language, made apart, are put on together: their changes add up.

    Args:
        fraction: share of the numbers of the base model without its norms, all matrices, embeddings and biases in one
            ranking: 0.08 for tasks, 0.04 for languages in the paper.
        rounds: how often the ranking is made; each adds its part of the fraction.
        head: "trained", whole, in both phases; "frozen" for languages.
        on: name of a graft that is on the model throughout, handed to `run` under that name: a task is learned on
            top of its language.
        l1: weight of the mean change in the loss: 0.1 for languages, 0 for tasks.
        lr: learning rate, linear.
        epochs: passes over the data that train everything.
        sparse_epochs: passes over the data that train what was kept.
        batch: examples in a batch.
        warmup: share of the steps.

    Raises:
        RequestError: a head that is neither, or no rounds.
    """
    if head not in ("trained", "frozen") or rounds < 1:
        raise RequestError(
            f"head={head!r}, rounds={rounds}", expected="'trained' or 'frozen', and 1 or more", do="change them"
        )
    base = {"of": "base", "without": ["norm"], "entries": True}
    tune: dict[str, Any] = {"do": "tune", "adapter": ("slice", {"tied": "untie"})}
    if l1:
        tune["anchor"] = ("pull", {"weight": l1})
    dense, sparse = (training(lr=lr, epochs=e, batch=batch, warmup=warmup) for e in (epochs, sparse_epochs))
    steps: list[dict[str, Any]] = [*everything("module", base, name=EVERYTHING)]
    both = [] if head == "frozen" else [HEAD]
    if both:
        steps += everything("module", {"of": "head"}, name=HEAD)
        steps.append({"do": "neurograft.pipeline.joined", "of": [EVERYTHING, HEAD], "name": EVERYTHING})
    moved = {"do": "locate", "by": ("within", {"by": "change", **base}), "units": "module"}
    under = [] if on is None else [on]
    for round_ in range(rounds):
        standing = [*under, *(["graft"] if round_ else [])]
        take = {"by": "outside", "of": "$ticket"} if round_ else {"by": "top"}
        steps += [
            {**tune, "where": f"${EVERYTHING}", "args": dense, "on": standing, "as": "full"},
            {**moved, "against": "$full", "on": standing},
            {"do": "select", **take, "fraction": fraction / rounds, "as": "new" if round_ else "ticket"},
        ]
        if round_:
            steps.append({"do": "neurograft.pipeline.joined", "of": ["ticket", "new"], "name": "ticket"})
        steps += [
            {"do": "neurograft.pipeline.joined", "of": ["ticket", *both]},
            {**tune, "args": sparse, "on": standing, "as": "more" if round_ else "graft"},
        ]
        if round_:
            steps.append({"do": "neurograft.pipeline.summed", "of": ["graft", "more"]})
    return Recipe("composable_sft", tuple(steps), paper="composable-sft")
