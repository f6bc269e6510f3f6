"""What a method is given to look at: batches, a second set to compare with, or several in groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from neurograft.core.card import Card
from neurograft.core.context import IGNORE, Batch, shifts
from neurograft.core.errors import RequestError
from neurograft.core.prompts.examples import row_digests
from neurograft.pipeline.grouped import grouped_rows, row_of
from neurograft.pipeline.inputs import as_batches, data_digest
from neurograft.pipeline.rows import read_rows

HOW = {
    "batches": "give data",
    "contrast": "give rows with `positive` and `negative`",
    "target": "pass target=",
    "against": "pass against=model or graft",
    "groups": "give rows with a `group` column",
    "labels": "give labelled rows, or pass target=",
}  # a need that a card may name -> how it is met


@dataclass(frozen=True)
class Given:
    """The data of a locator.

    Args:
        batches: model inputs, of all groups if there are some.
        contrast: a second set, for locators that compare.
        groups: several sets by name, for locators that compare more than two.
    """

    batches: list[Batch]
    contrast: list[Batch]
    groups: Mapping[str, list[Batch]] = field(default_factory=dict)

    @staticmethod
    def read(data: Any, model: nn.Module, *, in_groups: bool, **reading: Any) -> Given:
        """Read data as a locator wants them: in groups, or as one set or two; `reading` as for `as_batches`."""
        if not in_groups or data is None:
            return Given(*located_data(data, model, **reading))
        groups = {name: as_batches(rows, model, **reading) for name, rows in grouped_rows(data).items()}
        return Given([b for group in groups.values() for b in group], [], groups)

    def labelled(self, model: nn.Module) -> tuple[Given, int]:
        """Return one set without the examples that have no label to learn from, and how many these were."""
        if self.contrast or self.groups:
            return self, 0
        found, left_out = [], 0
        for batch in self.batches:
            has = _learnable(batch, model)
            if has is not None and not bool(has.all()):
                left_out += int((~has).sum())
                batch = _rows(batch, has)
            if batch:
                found.append(batch)
        return (replace(self, batches=found), left_out) if found else (self, 0)

    def check(self, card: Card, name: str, *, units: str, target: Any, against: Any) -> None:
        """Raise unless a locator's card allows these units, and all that it needs is there.

        Raises:
            RequestError: another kind of unit, or what is missing.
        """
        if card.kinds and units not in card.kinds:
            raise RequestError(
                f"units={units!r} for {name}",
                expected=f"one of {', '.join(sorted(card.kinds))}",
                do="choose another kind",
            )
        have = {"batches": self.batches, "contrast": self.contrast, "groups": self.groups}
        met = {need: bool(found) for need, found in have.items()}
        met |= {"target": target is not None, "against": against is not None}
        met["labels"] = target is not None or all(_has_labels(b) for b in self.batches)
        for need, how in HOW.items():
            if need in card.needs and not met[need]:
                raise RequestError(f"no {need} for {name}", expected=f"{need}, which this locator needs", do=how)

    def card(self) -> dict[str, Any]:
        """Return what a card says of the data: digests of each set, and of every example."""
        groups = {name: data_digest(group) for name, group in self.groups.items()}
        return {
            "data": data_digest(self.batches) if self.batches else None,
            "contrast": data_digest(self.contrast) if self.contrast else None,
            **({"groups": groups} if groups else {}),
            "examples": row_digests([*self.batches, *self.contrast]),
        }


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


def _learnable(batch: Batch, model: nn.Module) -> Tensor | None:
    """Say which rows of a batch have a label that the model is asked for, bool [B]; None if it has no labels."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or not labels.dim():
        return None
    asked = labels[:, 1:] if shifts(model) and labels.dim() == 2 else labels
    return (asked != IGNORE).reshape(len(labels), -1).any(1)


def _rows(batch: Batch, keep: Tensor) -> Batch:
    """Return some rows of a batch, nothing if there is none."""
    if not bool(keep.any()):
        return {}
    return {k: v[keep] if isinstance(v, Tensor) and v.dim() and len(v) == len(keep) else v for k, v in batch.items()}


def _has_labels(batch: Batch) -> bool:
    labels = batch.get("labels")
    return isinstance(labels, Tensor) and bool((labels != IGNORE).any())
