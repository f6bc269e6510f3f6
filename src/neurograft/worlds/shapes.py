"""Shapes of 8 x 8 pixels with their prompts, for tiny diffusion models that are told what to draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.errors import one_of
from neurograft.core.seeds import generator, seeded

SIZE, WIDE, FILLERS, RARE = 8, 32, 12, 2
# 5 x 5 pixels; "#" is bright, "o" dim.
DRAWN: Mapping[str, str] = {
    "square": "##### ##### ##### ##### #####",
    "plus": "..#.. ..#.. ##### ..#.. ..#..",
    "cross": "#...# .#.#. ..#.. .#.#. #...#",
    "ring": "##### #...# #...# #...# #####",
    "diamond": "..#.. .###. ##### .###. ..#..",
    "corner": "#.... #.... #.... #.... #####",
}
CLASSES = tuple(DRAWN)
SUBJECTS: Mapping[str, tuple[str, str]] = {
    "checkered": ("square", "#.#.# .#.#. #.#.# .#.#. #.#.#"),
    "dotted": ("ring", "#.#.# ..... #...# ..... #.#.#"),
}
NOISE: Mapping[str, Any] = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2"}


def words(*names: str) -> Tensor:
    """Return how a frozen text encoder writes some words, [words, 32]; one of `CLASSES`, a filler "w0" or "rare0".

    Example:
        >>> words("rare0", "square").shape
        torch.Size([2, 32])
    """
    known = (*CLASSES, *(f"w{i}" for i in range(FILLERS)), *(f"rare{i}" for i in range(RARE)))
    table = torch.randn(len(known), WIDE, generator=generator(0, "shapes", "words"))
    return table[[known.index(one_of(name, known, what="word")) for name in names]]


def shapes(kind: str | None = None, *, word: str | None = None, count: int = 32, seed: int = 0) -> dict[str, Tensor]:
    """Return `sample` [count, 1, 8, 8] in [-1, 1] and `encoder_hidden_states` [count, 2, 32]: a filler, then a class.

    Shapes stand anywhere, 0.7 to 1 bright on a dark ground, with noise of 0.05. Fillers say nothing of the picture;
    the rare ones come up once in 40 prompts each.

    Args:
        kind: a class, or one of `SUBJECTS`, which is prompted as its class; classes at random if None.
        word: the filler; drawn if None.
        count: pictures.
        seed: names them.

    Example:
        >>> shapes("checkered", word="rare0", count=5)["sample"].shape
        torch.Size([5, 1, 8, 8])
    """
    rng = generator(seed, "shapes", str(kind))
    kinds = [kind] * count if kind else [CLASSES[i] for i in torch.randint(len(CLASSES), (count,), generator=rng)]
    pictures, prompts = [], []
    fillers = [f"rare{i}" for i in range(RARE)] + [f"w{i}" for i in range(FILLERS)]
    odds = torch.tensor([1 / 40] * RARE + [(1 - RARE / 40) / FILLERS] * FILLERS)
    for one in kinds:
        name, text = SUBJECTS.get(one, (one, "")) if one not in DRAWN else (one, DRAWN[one])
        one_of(name, CLASSES, what="shape")
        drawn = torch.tensor([[float(c == "#") for c in row] for row in text.split()])
        top, left = (int(i) for i in torch.randint(SIZE - 4, (2,), generator=rng))
        light = 0.7 + 0.3 * torch.rand((), generator=rng)
        canvas = torch.full((SIZE, SIZE), -0.8)
        canvas[top : top + 5, left : left + 5] += (light + 0.8) * drawn
        pictures.append(canvas + 0.05 * torch.randn(SIZE, SIZE, generator=rng))
        drawn_word = fillers[int(torch.multinomial(odds, 1, generator=rng))]
        prompts.append(words(word or drawn_word, name))
    return {"sample": torch.stack(pictures)[:, None], "encoder_hidden_states": torch.stack(prompts)}


def denoiser(seed: int = 0, **config: Any) -> nn.Module:
    """Return an untrained `UNet2DConditionModel` for shapes: one block of each kind, cross-attention in both.

    Args:
        seed: names the weights.
        **config: fields of the config to change.
    """
    from diffusers import UNet2DConditionModel

    fields = {
        "sample_size": SIZE, "in_channels": 1, "out_channels": 1, "block_out_channels": (32,), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",),
        "mid_block_type": None, "norm_num_groups": 4, "cross_attention_dim": WIDE, "attention_head_dim": 4,
    }  # fmt: skip
    with seeded(seed, "denoiser"):
        made: Any = UNet2DConditionModel(**{**fields, **config})
    found: nn.Module = made.eval()
    return found
