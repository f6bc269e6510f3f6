"""What a card says of where a graft comes from: the base, and the versions it was made with."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn


def describe(model: nn.Module) -> dict[str, Any]:
    """Return what a card says of a base: class, name, revision, dtype."""
    config = getattr(model, "config", None)
    name = getattr(config, "name_or_path", None) or getattr(config, "_name_or_path", None) or None
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    return {
        "class": type(model).__name__,
        "name": name,
        "revision": getattr(config, "_commit_hash", None),
        "dtype": str(first.dtype).removeprefix("torch.") if first is not None else None,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def versions() -> dict[str, str]:
    """Return the versions of what a graft is made with, for its card."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("neurograft", "torch", "transformers", "peft", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
