"""Planted sparse deltas: a teacher that is its student plus a change of known support."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurograft.core.context import unlabelled
from neurograft.core.errors import RequestError, one_of
from neurograft.core.seeds import generator
from neurograft.core.selection import Selection
from neurograft.worlds.pico import pico_batch
from neurograft.worlds.truth import Truth

Pattern = Literal["noise", "same", "alternate"]


@dataclass(frozen=True)
class PlantedDelta:
    """A student, its teacher, where they differ, and inputs on which to learn and to measure.

    Args:
        student: the base.
        teacher: the base plus the planted change, frozen.
        truth: the support of the change.
        train: input batches without labels; the teacher's outputs are the labels.
        test: other input batches.
    """

    student: nn.Module
    teacher: nn.Module
    truth: Truth
    train: Sequence[dict[str, Tensor]]
    test: Sequence[dict[str, Tensor]]

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Return KL(teacher || model), the mean over the tokens of a batch that are not padding.

        An objective for `locate` and `tune`: `objective=world.loss`.
        """
        with torch.no_grad():
            wanted = self.teacher(**batch).logits.float().log_softmax(-1)
        got = model(**batch).logits.float().log_softmax(-1)
        each = F.kl_div(got, wanted, log_target=True, reduction="none").sum(-1)
        mask = batch.get("attention_mask")
        if mask is None or each.dim() == 1:
            return each.mean()
        return (each * mask).sum() / mask.sum()

    @torch.no_grad()
    def distance(self, model: nn.Module, batches: Iterable[dict[str, Tensor]] | None = None) -> float:
        """Return the mean KL to the teacher on the test batches; 0 where the teacher is reached."""
        return float(torch.stack([self.loss(model, b) for b in batches or self.test]).mean())


def planted_delta(
    student: nn.Module,
    where: Selection,
    *,
    scale: float = 1.0,
    pattern: Pattern = "noise",
    count: int = 8,
    batch: int = 16,
    batches: Sequence[dict[str, Tensor]] = (),
    seed: int = 0,
) -> PlantedDelta:
    """Move the selected units of a copy of the student, and return both with inputs.

    Args:
        student: a pico or tiny model in evaluation mode; it is not changed.
        where: the units that the teacher moves.
        scale: size of the change, in units of the parameter's root mean square.
        pattern: "noise" draws each number; "same" adds one sign; "alternate" adds neighbours of opposite sign,
            which cancel in a signed mean over a block.
        count: batches for training, and half as many for the test, if none are given.
        batch: rows in each.
        batches: inputs to use instead, the last third for the test; labels are dropped.
        seed: names the change and the inputs.

    Example:
        >>> from neurograft.core.units import Part, Site
        >>> from neurograft.worlds.pico import pico
        >>> name = "model.layers.0.mlp.down_proj"
        >>> site = Site("a", "column", 48, (Part.columns(name + ".weight", (32, 48)),))
        >>> world = planted_delta(pico("llama"), Selection.of({"a": site}, {"a": [5, 7]}), count=2)
        >>> world.distance(world.teacher), world.distance(world.student) > 0
        (0.0, True)
    """
    one_of(pattern, ("noise", "same", "alternate"), what="pattern")
    truth = Truth.of(where)
    if not truth.entries:
        raise RequestError("a selection that owns no numbers", expected="at least one unit", do="select units")
    teacher = deepcopy(student).requires_grad_(False)
    with torch.no_grad():
        for name, flat in truth.entries.items():
            weight = teacher.get_parameter(name)
            step = scale * weight.float().pow(2).mean().sqrt()
            weight.view(-1)[flat] += (step * _signs(name, flat, weight.shape, pattern, seed)).to(weight.dtype)
    given = [unlabelled(b) for b in batches]
    if not given:
        made = [pico_batch(student, batch=batch, seed=_seed(seed, i)) for i in range(count + max(1, count // 2))]
        given = [unlabelled(b) for b in made]
    cut = max(1, len(given) - max(1, len(given) // 3))
    return PlantedDelta(student, teacher, truth, given[:cut], given[cut:])


def _signs(name: str, flat: Tensor, shape: torch.Size, pattern: str, seed: int) -> Tensor:
    if pattern == "noise":
        return torch.randn(len(flat), generator=generator(seed, "planted_delta", name))
    if pattern == "same":
        return torch.ones(len(flat))
    row, column = flat // shape[-1], flat % shape[-1]
    return 1.0 - 2.0 * ((row + column) % 2)


def _seed(seed: int, index: int) -> int:
    return int(torch.randint(2**31, (), generator=generator(seed, "planted_delta.batch", index)))
