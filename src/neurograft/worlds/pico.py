"""Pico models: real model classes from tiny configs, and inputs that fit them."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.errors import one_of
from neurograft.core.seeds import seeded
from neurograft.worlds._pico_batches import batch_for
from neurograft.worlds._picos import DIFFUSERS, PICO
from neurograft.worlds._strangers import SMALL, STRANGERS


def families() -> list[str]:
    """Return the names `pico` knows; those of the diffusers library only where it is installed.

    Example:
        >>> "llama" in families()
        True
    """
    return sorted([*PICO, *(DIFFUSERS if find_spec("diffusers") else ())])


def strangers() -> list[str]:
    """Return the names of the pico models whose architectures have no family file.

    Example:
        >>> "mamba" in strangers(), set(strangers()) & set(families())
        (True, set())
    """
    return sorted(STRANGERS)


def pico(family: str, *, seed: int = 0, dtype: torch.dtype | None = None, **config: Any) -> nn.Module:
    """Build a tiny random model of a family, in evaluation mode.

    Args:
        family: one of `families()` or `strangers()`.
        seed: names the weights; the global generator is left where it was.
        dtype: of the parameters, float32 if None.
        **config: fields of the config to change.

    Raises:
        RequestError: an unknown family.

    Example:
        >>> pico("llama", num_hidden_layers=1).config.num_hidden_layers
        1
    """
    one_of(family, [*families(), *STRANGERS], what="pico family")
    with seeded(seed, "pico", family):
        model: Any = _diffusion(family, config) if family in DIFFUSERS else _transformer(family, config)
    if dtype == torch.float64 and getattr(model.config, "_experts_implementation", None):
        model.set_experts_implementation("eager")  # the grouped products of banks have no float64
    made: nn.Module = model.to(dtype or torch.float32).eval()
    return made


def _transformer(family: str, config: dict[str, Any]) -> nn.Module:
    name, fields = {**PICO, **STRANGERS}[family]
    found = getattr(importlib.import_module("transformers"), name)
    if family in STRANGERS:
        usual = found.config_class()
        fields = {**{k: v for k, v in SMALL.items() if hasattr(usual, k)}, **fields}
    made: nn.Module = found(found.config_class(**{**fields, **config}))
    return made


def _diffusion(family: str, config: dict[str, Any]) -> nn.Module:
    name, fields = DIFFUSERS[family]
    made: nn.Module = getattr(importlib.import_module("diffusers"), name)(**{**fields, **config})
    return made


def pico_batch(model: nn.Module | str, *, batch: int = 2, length: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Return random inputs for a model, with labels where it takes them; the second row of a text is padded.

    What a model takes is read from its signature and config, so this also serves tiny models of other families.

    Args:
        model: a model, or the name of a family.
        batch: rows.
        length: tokens a row; for image and text, beside the image's own.
        seed: names the numbers.

    Example:
        >>> sorted(pico_batch("t5"))
        ['attention_mask', 'input_ids', 'labels']
    """
    return batch_for(pico(model) if isinstance(model, str) else model, batch=batch, length=length, seed=seed)
