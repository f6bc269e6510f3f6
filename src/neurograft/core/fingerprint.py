"""Digests: which bytes a graft belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 22
PIECE = 1 << 18  # numbers of a float32 tensor that are copied at a time; the digest does not depend on it
_ZEROS = b"\x00"


def tensor_digest(tensor: Tensor) -> str:
    """Return a digest of a tensor's shape and numbers, the same for a bfloat16 tensor and its float32 copy.

    Narrow floats are hashed as the float32 they convert into exactly, so that a base may be loaded in a wider
    dtype than its file's without becoming another base. The upper and lower halves of the numbers are hashed in
    turn and lower halves of zeros only marked, which halves the time of bfloat16. Other dtypes are hashed as
    they are.

    Example:
        >>> x = torch.randn(3).bfloat16()
        >>> tensor_digest(x) == tensor_digest(x.float()) != tensor_digest(x.float() + 1)
        True
    """
    narrow = tensor.is_floating_point() and tensor.dtype != torch.float64
    state = hashlib.sha256(f"{tuple(tensor.shape)}:{torch.float32 if narrow else tensor.dtype}".encode())
    for part in tensor.detach().reshape(-1).split(CHUNK):
        here = part.cpu().contiguous()
        if not narrow:
            state.update(
                here.view(torch.uint8).numpy().tobytes() if here.dtype == torch.bool else here.numpy().tobytes()
            )
        elif here.dtype == torch.bfloat16:
            state.update(here.view(torch.int16).numpy())
            state.update(_ZEROS)
        else:
            halves = [p.float().view(torch.int16).view(-1, 2) for p in here.split(PIECE)]
            for half in halves:
                state.update(half[:, 1].contiguous().numpy())
            if any(bool(half[:, 0].any()) for half in halves):
                state.update(b"\x01")
                for half in halves:
                    state.update(half[:, 0].contiguous().numpy())
            else:
                state.update(_ZEROS)
    return state.hexdigest()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors are equal bit for bit: NaN equals itself, -0.0 is not 0.0.

    Example:
        >>> nan, zero = torch.tensor([float("nan")]), torch.tensor([0.0])
        >>> same_bits(nan, nan.clone()), same_bits(zero, -zero)
        (True, False)
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    x, y = a.detach().reshape(-1).cpu().contiguous(), b.detach().reshape(-1).cpu().contiguous()
    return torch.equal(x.view(torch.uint8), y.view(torch.uint8))


class Digested(str):
    """A tensor's digest where the tensor itself is not at hand: `digest` reads one as the other."""


def digest(*values: Any) -> str:
    """Return a digest of plain data and tensors."""
    state = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            state.update(tensor_digest(value).encode())
        elif isinstance(value, Digested):
            state.update(value.encode())
        elif isinstance(value, Mapping):
            state.update(digest(*(v for key in sorted(value) for v in (key, value[key]))).encode())
        else:
            state.update(canonical(value))
        state.update(b"\x1f")
    return state.hexdigest()


def canonical(value: Any) -> bytes:
    """Return plain data as bytes that depend on nothing but its content."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
