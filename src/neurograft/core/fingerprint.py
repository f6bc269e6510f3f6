"""Digests: which bytes a graft belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 22


def tensor_digest(tensor: Tensor) -> str:
    """Return a digest of a tensor's shape and numbers, the same for a bfloat16 tensor and its float32 copy.

    Narrow floats are hashed as float32, into which they convert exactly, so that a base may be loaded in a
    wider dtype than its file's without becoming another base. A float64 tensor is hashed as it is.

    Example:
        >>> x = torch.randn(3).bfloat16()
        >>> tensor_digest(x) == tensor_digest(x.float()) != tensor_digest(x.float() + 1)
        True
    """
    work = tensor.dtype if tensor.dtype == torch.float64 or not tensor.is_floating_point() else torch.float32
    state = hashlib.sha256(f"{tuple(tensor.shape)}:{work}".encode())
    flat = tensor.detach().reshape(-1)
    for part in flat.split(CHUNK):
        state.update(part.to("cpu", work).contiguous().numpy().tobytes())
    return state.hexdigest()


def digest(*values: Any) -> str:
    """Return a digest of plain data and tensors."""
    state = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            state.update(tensor_digest(value).encode())
        elif isinstance(value, Mapping):
            state.update(digest(*(v for key in sorted(value) for v in (key, value[key]))).encode())
        else:
            state.update(canonical(value))
        state.update(b"\x1f")
    return state.hexdigest()


def canonical(value: Any) -> bytes:
    """Return plain data as bytes that depend on nothing but its content."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
