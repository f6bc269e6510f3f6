"""`locate`: which units matter?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.anatomy.sites import sites
from neurograft.core.choose import Choice, Chosen, choose, methods
from neurograft.core.context import Batch, Context, Step
from neurograft.core.errors import RequestError
from neurograft.core.grafts.origin import describe
from neurograft.core.selection import Scores
from neurograft.pipeline._loaded import loaded
from neurograft.pipeline._target import Target, target_of
from neurograft.pipeline.given import Given
from neurograft.pipeline.inputs import processor_for
from neurograft.pipeline.models import Model, load_model
from neurograft.pipeline.state import as_found

AUTO = "neurograft.objectives.auto"


def locate(
    model: Model,
    data: Any = None,
    *,
    by: Choice = "grad_x_act",
    units: str = "neuron",
    at: str | None = None,
    objective: Choice = "auto",
    target: Target = None,
    positions: str | Callable[[Batch], Tensor] = "all",
    layers: Sequence[int] | None = None,
    match: str | None = None,
    block: tuple[int, int] | None = None,
    against: Any = None,
    processing_class: Any = None,
    batch_size: int = 8,
    max_length: int = 1024,
    limit: int | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    seed: int = 0,
) -> Scores:
    """Give every unit of a kind a number: how much it matters for these data.

    Args:
        model: a module, a folder, a Hub id or a shipped model.
        data: examples; rows with `positive` and `negative` for locators that compare, with `group` for those that
            compare more than two (or group -> rows); none for those that only look at the weights.
        by: the locator, of `neurograft.locators`.
        units: kind of unit, see `neurograft anatomy MODEL`.
        at: which of a kind's activations is meant.
        objective: the loss that gradients are taken of; "auto" is the model's own.
        target: attribute this instead of the loss: a callable (outputs, batch) -> scalar, a token whose logit at
            the last position counts, or two tokens whose difference does.
        positions: tokens that count: "all", "last", "answer", "prompt" or a callable.
        layers: only these blocks.
        match: only sites whose names match this pattern.
        block: (rows, columns) of units="block".
        against: a second model or a graft, live or by path, for locators that compare two; or a list of them.
        processing_class: tokenizer or processor for raw data; the one saved with the model if None.
        batch_size: examples in a batch.
        max_length: longer texts are cut.
        limit: use at most so many examples.
        revision: of a Hub id.
        dtype: load the weights so.
        device_map: as for `from_pretrained`.
        seed: root of every random number.

    Returns:
        Scores over all units of the kind, with provenance in `card`. Examples without a label tell nothing to a locator
        that needs labels and are left out, however they are batched; the card says how many as `unlabelled`.

    Raises:
        RequestError: an unknown method, kind, site or option, data that the locator needs and did not get, or what
            it makes no use of.
    """
    chosen, asked = choose("locators", by), choose("objectives", objective)
    _check_taken(chosen, asked, against=against, positions=None if positions == "all" else positions, target=target)
    net = load_model(model, revision=revision, dtype=dtype, device_map=device_map)
    where = sites(net, units, at=at, layers=layers, match=match, block=block)
    reading = {"processing_class": processing_class, "batch_size": batch_size, "max_length": max_length, "limit": limit}
    given = Given.read(data, net, in_groups="groups" in chosen.card.needs, **reading)
    goal = target_of(target, net, processing_class)
    unlabelled = 0
    if "labels" in chosen.card.needs and goal is None:
        given, unlabelled = given.labelled(net)
    given.check(chosen.card, chosen.name, units=units, target=goal, against=against)
    other = loaded(against)
    with as_found(net):
        context = Context(
            net,
            where,
            given.batches,
            given.contrast,
            loss=bound(objective),
            target=goal,
            positions=positions,
            processor=processor_for(net, processing_class),
            against=other,
            seed=seed,
            groups=given.groups,
            asked=asked,
        )
        scores: Scores = chosen(context)
    card = {
        "by": chosen.as_dict(),
        "units": units,
        "at": at,
        "objective": asked.as_dict() if given.batches else None,
        "target": target if isinstance(target, (str, tuple, list)) else getattr(target, "__qualname__", None),
        "positions": positions if isinstance(positions, str) else "callable",
        **({"unlabelled": unlabelled} if unlabelled else {}),
        **given.card(),
        "model": describe(net),
        "seed": seed,
    }
    return replace(scores, card={**card, **scores.card})


def _check_taken(chosen: Chosen, asked: Chosen, **given: Any) -> None:
    """Raise if a locator with a card would ignore something that was given to it."""
    given["objective"] = None if asked.name == AUTO and not asked.options else asked.name
    said = [name for name, value in given.items() if value is not None]
    odd = [name for name in said if name not in chosen.card.takes]
    if odd and hasattr(chosen.function, "card"):
        takers = [m for m in methods("locators") if odd[0] in choose("locators", m).card.takes]
        raise RequestError(
            f"{odd[0]}= for {chosen.name}, which makes no use of it",
            expected=f"a locator that does: {', '.join(takers)}",
            do=f"leave {odd[0]} out, or take one of them",
        )
    if {"objective", "target"} <= set(said):
        raise RequestError("objective and target", expected="one of them to attribute", do="leave one out")


def bound(objective: Choice) -> Callable[[nn.Module, Batch], Tensor]:
    """Return the objective as a loss of a model and a batch, in which every row counts alike."""
    chosen = choose("objectives", objective)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        found: Tensor = chosen(Step(model, batch, apart=True))
        return found

    return loss
