"""`locate` and `select`: which units matter, and which of them do we take?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.anatomy.sites import sites
from neurograft.core.card import Card
from neurograft.core.choose import Choice, choose, option_names
from neurograft.core.context import IGNORE, Batch, Context, Step, shifts
from neurograft.core.errors import RequestError
from neurograft.core.grafts.graft import describe
from neurograft.core.prompts.examples import row_digests
from neurograft.core.selection import Scores, Selection
from neurograft.pipeline.grouped import grouped_rows, row_of
from neurograft.pipeline.inputs import as_batches, data_digest, processor_for
from neurograft.pipeline.models import Model, load_model
from neurograft.pipeline.rows import read_rows
from neurograft.pipeline.state import as_found

Target = Callable[[Any, Batch], Tensor] | str | tuple[str, str] | None


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
        against: a second model or a graft, for locators that compare two.
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
        RequestError: an unknown method, kind, site or option, data that the locator needs and did not get.
    """
    chosen = choose("locators", by)
    net = load_model(model, revision=revision, dtype=dtype, device_map=device_map)
    where = sites(net, units, at=at, layers=layers, match=match, block=block)
    reading = {"processing_class": processing_class, "batch_size": batch_size, "max_length": max_length, "limit": limit}
    groups: dict[str, list[Batch]] = {}
    if "groups" in chosen.card.needs and data is not None:
        groups = {name: as_batches(rows, net, **reading) for name, rows in grouped_rows(data).items()}
        sides = [b for group in groups.values() for b in group], list[Batch]()
    else:
        sides = located_data(data, net, **reading)
    batches, contrast = sides
    goal = target_of(target, net, processing_class)
    unlabelled = 0
    if "labels" in chosen.card.needs and goal is None and not contrast and not groups:
        batches, unlabelled = _labelled(batches, net)
    _check_needs(chosen.card, chosen.name, units, batches, contrast, goal, against, groups)
    with as_found(net):
        context = Context(
            net,
            where,
            batches,
            contrast,
            loss=bound(objective),
            target=goal,
            positions=positions,
            processor=processor_for(net, processing_class),
            against=against,
            seed=seed,
            groups=groups,
            asked=choose("objectives", objective),
        )
        scores: Scores = chosen(context)
    card = {
        "by": chosen.as_dict(),
        "units": units,
        "at": at,
        "objective": choose("objectives", objective).as_dict() if batches else None,
        "target": target if isinstance(target, (str, tuple, list)) else getattr(target, "__qualname__", None),
        "positions": positions if isinstance(positions, str) else "callable",
        "data": data_digest(batches) if batches else None,
        **({"unlabelled": unlabelled} if unlabelled else {}),
        "contrast": data_digest(contrast) if contrast else None,
        **({"groups": {name: data_digest(group) for name, group in groups.items()}} if groups else {}),
        "examples": row_digests([*batches, *contrast]),
        "model": describe(net),
        "seed": seed,
    }
    return replace(scores, card={**card, **scores.card})


def select(
    scores: Scores | str | Path,
    by: Choice = "top",
    *,
    fraction: float | None = None,
    count: int | None = None,
    per: str | None = None,
    **options: Any,
) -> Selection:
    """Take units by their scores.

    Args:
        scores: scores, or the file `scores.save` wrote.
        by: the selector, of `neurograft.selectors`.
        fraction: share of each group; 0.01 if neither it nor a count is given to a selector that needs one.
        count: number in each group.
        per: the group: "global", "layer", "site" or "row".
        **options: what else the selector offers, e.g. `above=3.0` of "threshold", `seed=1` of "random".

    Raises:
        RequestError: an unknown selector or option.
    """
    found = Scores.load(scores) if isinstance(scores, (str, Path)) else scores
    given = {"fraction": fraction, "count": count, "per": per}
    options |= {k: v for k, v in given.items() if v is not None}
    chosen = choose("selectors", by, **options)
    if "fraction" in option_names(chosen.function) and not {"fraction", "count"} & chosen.options.keys():
        chosen = choose("selectors", chosen, fraction=0.01)
    taken: Selection = chosen(found)
    return taken


def bound(objective: Choice) -> Callable[[nn.Module, Batch], Tensor]:
    """Return the objective as a loss of a model and a batch, in which every row counts alike."""
    chosen = choose("objectives", objective)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        found: Tensor = chosen(Step(model, batch, apart=True))
        return found

    return loss


def located_data(data: Any, model: nn.Module, **options: Any) -> tuple[list[Batch], list[Batch]]:
    """Return batches and contrast batches: rows with `positive` and `negative` are split into two sets."""
    if data is None:
        return [], []
    if isinstance(data, Mapping) and data.keys() == {"positive", "negative"}:
        return as_batches(data["positive"], model, **options), as_batches(data["negative"], model, **options)
    rows = read_rows(data)
    if all({"positive", "negative"} <= row.keys() for row in rows):
        sides = [[row_of(row[side]) for row in rows] for side in ("positive", "negative")]
        return as_batches(sides[0], model, **options), as_batches(sides[1], model, **options)
    return as_batches(rows, model, **options), []


def target_of(target: Target, model: nn.Module, processing_class: Any) -> Callable[[Any, Batch], Tensor] | None:
    """Return a target as a callable: one token's logit at the last real position, or the difference of two.

    Raises:
        RequestError: a word that is not one token.
    """
    if target is None or callable(target):
        return target
    tokenizer = processor_for(model, processing_class)
    words = (target,) if isinstance(target, str) else tuple(target)
    if tokenizer is None or not 1 <= len(words) <= 2:
        raise RequestError(
            f"target={target!r}" + (" and no tokenizer" if tokenizer is None else ""),
            expected="one or two tokens and a tokenizer, or a callable (outputs, batch) -> scalar",
            do="pass processing_class=tokenizer",
        )
    ids = [_single(tokenizer, word) for word in words]

    def logit(outputs: Any, batch: Batch) -> Tensor:
        logits = outputs.logits
        mask = batch.get("attention_mask")
        index = torch.arange(logits.shape[1], device=logits.device)
        last = (index * mask).max(dim=1).values if mask is not None else index[-1:].expand(len(logits))
        at = logits[torch.arange(len(logits), device=logits.device), last]
        found: Tensor = at[:, ids[0]].mean() - (at[:, ids[1]].mean() if len(ids) == 2 else 0.0)
        return found

    return logit


def _single(tokenizer: Any, word: str) -> int:
    found = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(found) != 1:
        raise RequestError(
            f"the target {word!r}, which is {len(found)} tokens",
            expected="a single token",
            do="choose a word the vocabulary has whole (mind the leading space)",
        )
    return int(found[0])


def _check_needs(
    card: Card,
    name: str,
    units: str,
    batches: list[Batch],
    contrast: list[Batch],
    target: Any,
    against: Any,
    groups: Any = (),
) -> None:
    if card.kinds and units not in card.kinds:
        raise RequestError(
            f"units={units!r} for {name}", expected=f"one of {', '.join(sorted(card.kinds))}", do="choose another kind"
        )
    have = {"batches": batches, "contrast": contrast, "target": target is not None, "against": against is not None}
    have["groups"] = groups
    have["labels"] = target is not None or all(_has_labels(b) for b in batches)
    how = {
        "batches": "give data",
        "contrast": "give rows with `positive` and `negative`",
        "groups": "give rows with a `group` column",
        "target": "pass target=",
        "against": "pass against=model or graft",
        "labels": "give labelled rows, or pass target=",
    }
    for need, found in have.items():
        if need in card.needs and not found:
            raise RequestError(f"no {need} for {name}", expected=f"{need}, which this locator needs", do=how[need])


def _labelled(batches: list[Batch], model: nn.Module) -> tuple[list[Batch], int]:
    """Return the batches without the rows that have no label to learn from, and how many these were."""
    found, left_out = [], 0
    for batch in batches:
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and labels.dim():
            asked = labels[:, 1:] if shifts(model) and labels.dim() == 2 else labels
            has = (asked != IGNORE).reshape(len(labels), -1).any(1)
            if not bool(has.all()):
                left_out += int((~has).sum())
                batch = _rows(batch, has)
        if batch:
            found.append(batch)
    return (found, left_out) if found else (batches, 0)


def _rows(batch: Batch, keep: Tensor) -> Batch:
    """Return some rows of a batch, nothing if there is none."""
    if not bool(keep.any()):
        return {}
    return {k: v[keep] if isinstance(v, Tensor) and v.dim() and len(v) == len(keep) else v for k, v in batch.items()}


def _has_labels(batch: Batch) -> bool:
    labels = batch.get("labels")
    return isinstance(labels, Tensor) and bool((labels != IGNORE).any())
