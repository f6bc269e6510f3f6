"""Pico models: real transformers classes from tiny configs, and inputs that fit them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from neurograft.core.errors import one_of
from neurograft.core.seeds import derive, generator

VOCABULARY, IMAGE = 64, 16

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

# family: (config class, model class, config)
PICO: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _DECODER),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_DECODER, **_EXPERTS}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**_GPT2, "bos_token_id": 1, "eos_token_id": 2}),
    "bert": (
        "BertConfig",
        "BertForSequenceClassification",
        {**_ENCODER, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "num_labels": 3},
    ),
    "vit": (
        "ViTConfig",
        "ViTForImageClassification",
        {**_ENCODER, "image_size": IMAGE, "patch_size": 4, "num_channels": 3, "num_labels": 3},
    ),
}


def families() -> list[str]:
    """Return the names `pico` knows.

    Example:
        >>> "llama" in families()
        True
    """
    return sorted(PICO)


def pico(family: str, *, seed: int = 0, dtype: torch.dtype | None = None, **config: Any) -> nn.Module:
    """Build a tiny random model of a family, in evaluation mode.

    Args:
        family: one of `families()`.
        seed: names the weights; the global generator is left where it was.
        dtype: of the parameters, float32 if None.
        **config: fields of the config to change.

    Raises:
        RequestError: an unknown family.

    Example:
        >>> pico("llama", num_hidden_layers=1).config.num_hidden_layers
        1
    """
    config_class, model_class, fields = PICO[one_of(family, PICO, what="pico family")]
    made = getattr(transformers, config_class)(**{**fields, **config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "pico", family))
        model: nn.Module = getattr(transformers, model_class)(made)
    return model.to(dtype or torch.float32).eval()


def pico_batch(model: nn.Module, *, batch: int = 2, length: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Return random inputs with labels for a pico model; the second row of a text batch is padded.

    Args:
        model: from `pico`.
        batch: rows.
        length: tokens a row.
        seed: names the numbers.
    """
    rng, config, name = generator(seed, "pico_batch"), model.config, type(model).__name__
    if getattr(config, "image_size", None) and "Image" in name:
        pixels = torch.randn(batch, config.num_channels, config.image_size, config.image_size, generator=rng)
        return {"pixel_values": pixels, "labels": torch.randint(0, config.num_labels, (batch,), generator=rng)}
    tokens = torch.randint(3, VOCABULARY, (batch, length), generator=rng)
    attention = torch.ones_like(tokens)
    attention[1:, length - 2 :] = 0
    tokens = tokens.masked_fill(attention == 0, getattr(config, "pad_token_id", None) or 0)
    made = {"input_ids": tokens, "attention_mask": attention}
    if "SequenceClassification" in name:
        return {**made, "labels": torch.randint(0, config.num_labels, (batch,), generator=rng)}
    return {**made, "labels": tokens.masked_fill(attention == 0, -100)}
