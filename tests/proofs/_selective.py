"""What the proofs of selective tuning share: a recipe's choice, and the literal dense twin of compact training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.selection import Selection
from neurograft.pipeline.locate import locate
from neurograft.pipeline.recipe import recipe
from neurograft.pipeline.select import select
from neurograft.worlds.pico import pico_batch
from neurograft.worlds.tiny import Perceptron
from neurograft.worlds.vectors import vectors
from tests.proofs._tools import rows_in

Masks = Mapping[str, Tensor]


def chosen(name: str, model: nn.Module, data: Any = None, **options: Any) -> Selection:
    """Return what a recipe's first two steps choose."""
    steps = [{k: v for k, v in s.items() if k not in ("do", "as")} for s in recipe(name, **options).steps]
    return select(locate(model, data, **steps[0]), **steps[1])


def rows_of(model: nn.Module, count: int = 8) -> list[dict[str, Tensor]]:
    """Return examples of a pico model, one at a time."""
    batch = pico_batch(model, batch=count)
    return rows_in(batch)


def entries_of(where: Selection) -> dict[str, Tensor]:
    """Return parameter -> sorted flat entries of a selection."""
    found: dict[str, list[Tensor]] = {}
    for name, ids in where.ids.items():
        for part in where.sites[name].parts if len(ids) else ():
            found.setdefault(part.param, []).append(part.flat(ids).reshape(-1))
    return {name: torch.cat(flat).unique() for name, flat in found.items()}


def twins() -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """Return two equal networks in float64 and a batch, for a method and its literal twin.

    They have no norms, which transformers computes in float32 whatever the model's type.
    """
    batch = {k: v.double() if v.is_floating_point() else v for k, v in vectors(count=1)[0].items()}
    return Perceptron(24).double(), Perceptron(24).double(), batch


def weighed(sizes: list[int], *moments: str) -> type[torch.optim.AdamW]:
    """Return AdamW that notes after each step how many numbers its moments hold."""

    class Weighed(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            out = super().step(closure)
            sizes.append(sum(s[m].numel() for s in self.state.values() for m in moments))
            return out

    return Weighed


def adam_twin(
    model: nn.Module,
    loss: Callable[[], Tensor],
    masks_at: Callable[[int], Masks | None],
    *,
    steps: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    decay: float = 0.0,
    moments: str = "keep",
) -> None:
    """Train whole weights under masks, literally: dense gradients, dense moments, nothing outside of a mask moves.

    Args:
        model: changed in place.
        loss: of the model as it is.
        masks_at: step -> a new mask, bool of each weight's shape, or None to go on with the old one.
        steps: how many.
        lr: constant.
        betas: of AdamW.
        eps: of AdamW.
        decay: of the masked entries of matrices.
        moments: at a new mask, "keep" those of entries in both masks, or "drop" all and count from 1 again.
    """
    weights = dict(model.named_parameters())
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    count = dict.fromkeys(weights, 0)
    for step in range(steps):
        new = masks_at(step)
        for name, mask in (new or {}).items():
            stays = mask & masks.get(name, torch.zeros_like(mask))
            if name not in first or moments == "drop":
                first[name], second[name], count[name] = (
                    torch.zeros_like(mask.double()),
                    torch.zeros_like(mask.double()),
                    0,
                )
            first[name], second[name] = first[name] * stays, second[name] * stays
            masks[name] = mask
        model.zero_grad()
        loss().backward()
        with torch.no_grad():
            for name, mask in masks.items():
                grad, count[name] = weights[name].grad * mask, count[name] + 1
                first[name] = betas[0] * first[name] + (1 - betas[0]) * grad
                second[name] = betas[1] * second[name] + (1 - betas[1]) * grad**2
                rise = first[name] / (1 - betas[0] ** count[name])
                size = (second[name] / (1 - betas[1] ** count[name])).sqrt() + eps
                weights[name] -= lr * (rise / size + (decay if mask.dim() > 1 else 0.0) * weights[name]) * mask
    model.zero_grad()
