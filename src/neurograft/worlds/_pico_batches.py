"""Inputs for a model, read from its signature and config."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from neurograft.core.errors import RequestError
from neurograft.core.seeds import generator


def batch_for(model: Any, *, batch: int, length: int, seed: int) -> dict[str, Tensor]:
    """Return random inputs; see `neurograft.worlds.pico.pico_batch`."""
    taken = inspect.signature(model.forward).parameters
    rng, dtype = generator(seed, "pico_batch"), next(model.parameters()).dtype
    for first, make in _MAKERS.items():
        if first in taken:
            made = make(model, batch, length, rng)
            return {k: v.to(dtype) if v.is_floating_point() else v for k, v in made.items()}
    raise RequestError(
        f"{type(model).__name__}, which takes {', '.join(taken)}",
        expected=f"a model that takes one of {', '.join(_MAKERS)}",
        do="give a batch of your own",
    )


def _field(config: Any, *names: str, default: Any = None) -> Any:
    """Return the first of some fields that a config or one of its parts has."""
    parts = [config, *(getattr(config, p, None) for p in ("text_config", "vision_config", "decoder", "audio_config"))]
    for part in parts:
        for name in names:
            found = getattr(part, name, None)
            if found is not None:
                return found
    return default


def _texts(model: Any, batch: int, length: int, rng: torch.Generator) -> dict[str, Tensor]:
    config, name = model.config, type(model).__name__
    vocabulary = _field(config, "vocab_size", default=64)
    image = _field(config, "image_token_id", "image_token_index")
    highest = image if isinstance(image, int) and 3 < image < vocabulary else vocabulary
    tokens = torch.randint(3, highest, (batch, length), generator=rng)
    attention = torch.ones_like(tokens)
    attention[1:, length - 2 :] = 0
    tokens = tokens.masked_fill(attention == 0, _field(config, "pad_token_id", default=0))
    made = {"input_ids": tokens, "attention_mask": attention}
    return {**made, **_labels(model, name, tokens, attention, rng)}


def _labels(model: Any, name: str, tokens: Tensor, attention: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
    taken = inspect.signature(model.forward).parameters
    if "labels" not in taken:
        return {"decoder_input_ids": tokens} if "decoder_input_ids" in taken else {}
    if "Classification" in name and "Token" not in name:
        return {"labels": torch.randint(0, model.config.num_labels, tokens.shape[:1], generator=rng)}
    if "TokenClassification" in name:
        return {"labels": torch.randint(0, model.config.num_labels, tokens.shape, generator=rng)}
    return {"labels": tokens.masked_fill(attention == 0, -100)}


def _pixels(model: Any, batch: int, rng: torch.Generator) -> Tensor:
    config = getattr(model.config, "vision_config", None) or model.config
    size = _field(config, "image_size", default=16)
    high, wide = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(batch, _field(config, "num_channels", default=3), high, wide, generator=rng)


def _images(model: Any, batch: int, length: int, rng: torch.Generator) -> dict[str, Tensor]:
    taken = inspect.signature(model.forward).parameters
    pixels = _pixels(model, batch, rng)
    if "input_ids" not in taken:
        labels = {}
        if "labels" in taken and "Classification" in type(model).__name__:
            labels = {"labels": torch.randint(0, model.config.num_labels, (batch,), generator=rng)}
        return {"pixel_values": pixels, **labels}
    made = {"pixel_values": pixels, **_texts(model, batch, length, rng)}
    image = _field(model.config, "image_token_id", "image_token_index")
    if image is None:
        return made
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    shown = torch.full((batch, patches), image)
    made["input_ids"] = torch.cat([shown, made["input_ids"]], dim=1)
    made["attention_mask"] = torch.cat([torch.ones_like(shown), made["attention_mask"]], dim=1)
    if "labels" in made:
        made["labels"] = torch.cat([torch.full_like(shown, -100), made["labels"]], dim=1)
    return made


def _sounds(model: Any, batch: int, length: int, rng: torch.Generator) -> dict[str, Tensor]:
    config, name = model.config, type(model).__name__
    if hasattr(config, "num_mel_bins") and hasattr(config, "frequency_stride"):
        shape: tuple[int, ...] = (batch, config.max_length, config.num_mel_bins)
    else:
        ratio = 1
        for stride in config.conv_stride:
            ratio *= stride
        shape = (batch, ratio * (2 * length + 2) + sum(config.conv_kernel))
    made = {"input_values": torch.randn(shape, generator=rng)}
    if "Classification" in name:
        return {**made, "labels": torch.randint(0, config.num_labels, (batch,), generator=rng)}
    if "CTC" in name:
        return {**made, "labels": torch.randint(3, config.vocab_size, (batch, max(1, length // 2)), generator=rng)}
    return made


def _spectra(model: Any, batch: int, length: int, rng: torch.Generator) -> dict[str, Tensor]:
    config = model.config
    frames = 2 * getattr(config, "max_source_positions", 4 * length)
    made = {"input_features": torch.randn(batch, config.num_mel_bins, frames, generator=rng)}
    tokens = torch.randint(3, config.vocab_size, (batch, length), generator=rng)
    attention = torch.ones_like(tokens)
    attention[1:, length - 2 :] = 0
    return {**made, **_labels(model, type(model).__name__, tokens, attention, rng)}


def _episodes(model: Any, batch: int, length: int, rng: torch.Generator) -> dict[str, Tensor]:
    config = model.config
    sizes = {"states": config.state_dim, "actions": config.act_dim, "rewards": 1, "returns_to_go": 1}
    made = {name: torch.randn(batch, length, size, generator=rng) for name, size in sizes.items()}
    attention = torch.ones(batch, length, dtype=torch.int64)
    attention[1:, :2] = 0  # episodes are padded at their beginning
    return {**made, "timesteps": torch.arange(length).expand(batch, -1).clone(), "attention_mask": attention}


def _noisy(model: Any, batch: int, length: int, rng: torch.Generator) -> dict[str, Tensor]:
    config = model.config
    shape = (batch, config["in_channels"], config["sample_size"], config["sample_size"])
    steps = torch.randint(0, 1000, (batch,), generator=rng)
    if "class_labels" in inspect.signature(model.forward).parameters and "num_embeds_ada_norm" in config:
        classes = torch.randint(0, config["num_embeds_ada_norm"], (batch,), generator=rng)
        return {"hidden_states": torch.randn(shape, generator=rng), "timestep": steps, "class_labels": classes}
    words = torch.randn(batch, length, config["cross_attention_dim"], generator=rng)
    return {"sample": torch.randn(shape, generator=rng), "timestep": steps, "encoder_hidden_states": words}


# The argument that tells what a model takes, the more telling first.
_MAKERS = {
    "returns_to_go": _episodes,
    "timestep": _noisy,
    "pixel_values": _images,
    "input_values": _sounds,
    "input_features": _spectra,
    "input_ids": _texts,
}
