"""Encoded examples side by side, as one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.context import IGNORE
from neurograft.core.errors import RequestError


def collator(
    model: nn.Module, processing_class: Any = None
) -> Callable[[Sequence[Mapping[str, Tensor]]], dict[str, Tensor]]:
    """Return what joins encoded examples into a batch: tokens padded on the right, labels with -100, the rest with 0.

    Args:
        model: its config names the padding token.
        processing_class: its padding token, if the config has none.
    """
    config = getattr(model, "config", None)
    known = [getattr(config, "pad_token_id", None)]
    known.append(getattr(getattr(processing_class, "tokenizer", processing_class), "pad_token_id", None))
    eos = getattr(config, "eos_token_id", None)
    known.append(eos[0] if isinstance(eos, list) else eos)
    pad = next((int(p) for p in known if p is not None), 0)

    def join(examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        keys = examples[0].keys()
        odd = next((e.keys() ^ keys for e in examples if e.keys() != keys), None)
        if odd:
            raise RequestError(
                f"examples of one batch that differ in {', '.join(sorted(odd))}",
                expected="the same columns in every row",
                do="fill the column in, or split the data",
            )
        fill = {k: IGNORE if k == "labels" else pad if k.endswith("input_ids") else 0 for k in keys}
        made = {k: _stacked(k, [e[k] for e in examples], fill[k]) for k in keys}
        if "input_ids" in made and "attention_mask" not in made and made["input_ids"].dim() == 2:
            lengths = torch.tensor([len(e["input_ids"]) for e in examples])
            made["attention_mask"] = (torch.arange(made["input_ids"].shape[1]) < lengths[:, None]).long()
        return made

    return join


def _stacked(name: str, values: list[Tensor], pad: int) -> Tensor:
    if len({tuple(v.shape) for v in values}) == 1:
        return torch.stack(values)
    if any(v.dim() != values[0].dim() for v in values) or any(v.shape[1:] != values[0].shape[1:] for v in values):
        raise RequestError(
            f"{name} of shapes {sorted({tuple(v.shape) for v in values})[:4]} in one batch",
            expected="shapes that differ only in their first axis",
            do="bring the inputs to one size",
        )
    fill = 0.0 if values[0].is_floating_point() else pad
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)
