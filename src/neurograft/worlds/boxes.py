"""The box world: which object is in which box, asked at the end; every token stands at a fixed place.

    <bos> box object box object ... box holds -> object

The query's label is one token before the end. Shape letters: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neurograft.core.context import IGNORE
from neurograft.core.errors import RequestError, one_of
from neurograft.core.seeds import generator

PAD, BOS, HOLDS = range(3)
FIRST = 4  # the first label; labels come before objects
LABELS, OBJECTS = 12, 16
VOCABULARY = FIRST + LABELS + OBJECTS
QUERY, BEHIND = "end-1", "mention+1"  # places: the label asked for, and the object behind its earlier mention
VARIABLES = ("position", "label", "object")


def boxes(
    *, count: int = 8, batch: int = 32, boxes: int = 4, queries: int = 1, holds: float = 1.0, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Return batches of scenes with queries, labels on the answers alone.

    Args:
        count: batches.
        batch: rows.
        boxes: boxes of a scene.
        queries: questions of a row, each with its answer behind it.
        holds: share of the batches with the word "holds" between label and answer.
        seed: names the rows.

    Example:
        >>> row = boxes(count=1, batch=1, boxes=2)[0]
        >>> row["input_ids"].shape, int((row["labels"] != -100).sum())
        (torch.Size([1, 8]), 1)
    """
    rng, found = generator(seed, "boxes", boxes, queries), []
    for _ in range(count):
        labels, objects = scenes(batch, boxes, rng)
        asked = torch.randint(boxes, (batch, queries), generator=rng)
        word = float(torch.rand((), generator=rng)) < holds
        found.append(told(labels, objects, labels.gather(1, asked), objects.gather(1, asked), word=word))
    return found


def scenes(rows: int, boxes: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return labels and objects of rows of boxes, int64 [rows, boxes] each, no two alike in a row.

    Raises:
        RequestError: more boxes than labels.
    """
    if not 1 <= boxes < LABELS:
        raise RequestError(f"{boxes} boxes", expected=f"1 to {LABELS - 1}", do="take fewer")
    labels = torch.rand(rows, LABELS, generator=rng).argsort(1)[:, :boxes] + FIRST
    return labels, torch.rand(rows, OBJECTS, generator=rng).argsort(1)[:, :boxes] + FIRST + LABELS


def told(labels: Tensor, objects: Tensor, query: Tensor, answer: Tensor, *, word: bool = True) -> dict[str, Tensor]:
    """Return scenes as a batch: labels and objects [B, boxes], queries and answers [B, queries]."""
    b, q = query.shape
    body = torch.stack([labels, objects], 2).reshape(b, -1)
    asked = [query, torch.full_like(query, HOLDS), answer] if word else [query, answer]
    tail = torch.stack(asked, 2).reshape(b, -1)
    tokens = torch.cat([torch.full((b, 1), BOS), body, tail], 1)
    wanted = torch.full_like(tokens, IGNORE)
    last = 1 + body.shape[1] + len(asked) * torch.arange(1, q + 1) - 1
    wanted[:, last] = answer
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": wanted}


def corrupted(*, count: int = 8, batch: int = 32, boxes: int = 4, seed: int = 0) -> dict[str, list[dict[str, Tensor]]]:
    """Return scenes as `positive`, and as `negative` other scenes whose query no box answers, row for row.

    Example:
        >>> found = corrupted(count=1, batch=2)
        >>> query = found["negative"][0]["input_ids"][:, [-3]]
        >>> bool((found["negative"][0]["input_ids"][:, :-3] == query).any())
        False
    """
    rng, found = generator(seed, "boxes corrupted", boxes), _sides()
    for _ in range(count):
        labels, objects = scenes(batch, boxes, rng)
        asked = torch.randint(boxes, (batch, 1), generator=rng)
        found["positive"].append(told(labels, objects, labels.gather(1, asked), objects.gather(1, asked)))
        labels, objects = scenes(batch, boxes + 1, rng)
        labels, strange = labels[:, :boxes], labels[:, boxes:]
        found["negative"].append(told(labels, objects[:, :boxes], strange, objects[:, boxes:]))
    return found


def counterfactual(
    variable: str, *, count: int = 8, batch: int = 32, boxes: int = 4, seed: int = 0
) -> dict[str, list[dict[str, Tensor]]]:
    """Return pairs whose answer changes if and only if a component carries a variable of the second prompt.

    `positive` are the base prompts, labelled with the answer wanted after patching, `negative` the others:
    "position": another scene, another box asked for: wanted is the base's object in the box at that place;
    "label": the scene's boxes in another order, another label asked for: the base's object in the box of that label;
    "object": another scene with a box at the same place asked for: the other scene's object.

    Raises:
        RequestError: an unknown variable.
    """
    one_of(variable, VARIABLES, what="variable")
    if boxes < 2 and variable != "object":
        raise RequestError(f"{boxes} boxes for {variable!r}", expected="another box to ask for", do="take two or more")
    rng, found = generator(seed, "boxes counterfactual", variable, boxes), _sides()
    for _ in range(count):
        labels, objects = scenes(batch, boxes, rng)
        asked = torch.randint(boxes, (batch, 1), generator=rng)
        shift = torch.randint(1, max(2, boxes), (batch, 1), generator=rng)
        other = (asked + shift) % boxes
        if variable == "label":
            order = torch.rand(batch, boxes, generator=rng).argsort(1)
            strange = scenes(batch, boxes, rng)[1]
            wanted, query = objects.gather(1, other), labels.gather(1, other)
            scene = (labels.gather(1, order), strange)
            there = (scene[0] == query).long().argmax(1, keepdim=True)
        else:
            scene = scenes(batch, boxes, rng)
            there = other if variable == "position" else asked
            query = scene[0].gather(1, there)
            wanted = objects.gather(1, other) if variable == "position" else scene[1].gather(1, asked)
        found["positive"].append(told(labels, objects, labels.gather(1, asked), wanted))
        found["negative"].append(told(*scene, query, scene[1].gather(1, there)))
    return found


def rows(batches: dict[str, Sequence[dict[str, Tensor]]]) -> list[dict[str, Any]]:
    """Return pairs of batches as rows of `positive` and `negative` token lists, as a user's file holds them."""
    sides = [[b for side in batches[name] for b in _each(side)] for name in ("positive", "negative")]
    return [{"positive": a, "negative": b} for a, b in zip(*sides)]


def _sides() -> dict[str, list[dict[str, Tensor]]]:
    return {"positive": [], "negative": []}


def _each(batch: dict[str, Tensor]) -> list[dict[str, Any]]:
    return [{k: v[i].tolist() for k, v in batch.items()} for i in range(len(batch["input_ids"]))]
