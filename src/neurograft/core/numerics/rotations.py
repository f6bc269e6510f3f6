"""Orthogonal maps from a few angles, for activations of w features written as rows: x @ R.

| form | numbers for a unit | map |
|---|---|---|
| rotary | w / 2 angles | a plane rotation of each pair of neighbours (2i, 2i + 1) |
| givens | w - 1 angles | plane rotations along a binary tree: neighbours, then pairs, then fours, ... |
| scale | 1 factor | x * factor, no rotation |
"""

from __future__ import annotations

import torch
from torch import Tensor

from neurograft.core.errors import RequestError, one_of

FORMS = ("rotary", "givens", "scale")


def numbers_of(form: str, width: int) -> int:
    """Return how many numbers a unit of `width` features takes.

    Raises:
        RequestError: an unknown form, or one that units of this width cannot have.

    Example:
        >>> [numbers_of(form, 8) for form in FORMS]
        [4, 7, 1]
    """
    one_of(form, FORMS, what="form of rotation")
    if (form == "rotary" and width % 2) or (form == "givens" and width < 2):
        raise RequestError(
            f"{form} rotations of units of {width} features",
            expected="an even number of features" if form == "rotary" else "at least two features",
            do="choose heads or whole outputs, or another form",
        )
    return {"rotary": width // 2, "givens": width - 1, "scale": 1}[form]


def rotations(angles: Tensor, form: str = "rotary") -> Tensor:
    """Return the rotation of each unit's angles.

    Args:
        angles: [k, w / 2] for "rotary", [k, w - 1] for "givens"; radians.
        form: "rotary" or "givens".

    Returns:
        Orthogonal matrices [k, w, w], in the dtype of the angles; zero angles give the identity.

    Raises:
        RequestError: an unknown form.

    Example:
        >>> rotations(torch.tensor([[torch.pi / 2]])).round(decimals=3).tolist()
        [[[-0.0, -1.0], [1.0, -0.0]]]
    """
    one_of(form, FORMS[:2], what="form of rotation")
    k, m = angles.shape
    width = 2 * m if form == "rotary" else m + 1
    made = torch.eye(width, dtype=angles.dtype, device=angles.device).repeat(k, 1, 1)
    for angle, i, j in zip(angles.T, *_planes(form, width)):
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        # A rotation in the plane (i, j) from the left touches two rows.
        high, low = made[:, i].clone(), made[:, j].clone()
        made[:, i], made[:, j] = cos * high - sin * low, sin * high + cos * low
    return made


def _planes(form: str, width: int) -> tuple[list[int], list[int]]:
    """Return the planes in the order of their angles; a tree over w leaves has w - 1 inner nodes."""
    if form == "rotary":
        return list(range(0, width, 2)), list(range(1, width, 2))
    steps = [2**r for r in range((width - 1).bit_length())]
    at = [(i, i + step) for step in steps for i in range(0, width - step, 2 * step)]
    return [i for i, _ in at], [j for _, j in at]
