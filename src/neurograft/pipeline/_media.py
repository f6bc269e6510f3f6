"""Pictures and sounds as the numbers a model takes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neurograft.core.errors import RequestError
from neurograft.pipeline._columns import as_tensor, labelled, need


def pictured(image: Any, processor: Any, index: int) -> dict[str, Tensor]:
    """Encode a picture: a path, pixels or a PIL image; float pixels [channels, height, width] need no processor."""
    if processor is None:
        pixels = as_tensor(image, "image", index)
        if pixels.dim() != 3 or not pixels.is_floating_point():
            raise RequestError(
                f"the image of row {index} ({type(image).__name__}) and no image processor",
                expected="a processing_class, or float pixels [channels, height, width]",
                do="pass processing_class=image_processor",
            )
        return {"pixel_values": pixels}
    picture = getattr(processor, "image_processor", processor)
    if hasattr(picture, "vocab_size"):
        raise RequestError(
            f"the image of row {index} and a {type(picture).__name__}, which reads text",
            expected="a processor of images",
            do="pass processing_class=..., or save the whole processor beside the model: processor.save_pretrained",
        )
    found = picture(images=_pixels(image, index), return_tensors="pt")
    return {"pixel_values": found["pixel_values"][0]}


def _pixels(image: Any, index: int) -> Any:
    if isinstance(image, str):
        if not Path(image).is_file():
            raise RequestError(
                f"the image {image!r} of row {index}, where no file is",
                expected="a path from the working directory, pixels or a PIL image",
                do="check the path",
            )
        return _opened(image)
    return np.asarray(image) if isinstance(image, (list, tuple)) else image


def _opened(path: str) -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise RequestError(
            f"the image {path!r}, and Pillow is not installed", expected="Pillow", do="pip install pillow"
        ) from error
    return Image.open(path).convert("RGB")


def unpadded(examples: list[dict[str, Tensor]], model: nn.Module) -> list[list[dict[str, Tensor]]]:
    """Return the examples of a batch in as many batches as the model needs, in their order; one for almost all models.

    Where Wav2Vec2 and HuBERT normalise each channel over time (`feat_extract_norm="group"`), padding changes what the
    model makes of a sound, and no mask tells of it: only neighbours of one length share a batch.

    Args:
        examples: encoded rows.
        model: its config says how it normalises.

    Returns:
        Lists of rows, together `examples`.
    """
    config = getattr(model, "config", None)
    if getattr(config, "feat_extract_norm", None) != "group" or any("input_values" not in e for e in examples):
        return [examples]
    return [list(part) for _, part in groupby(examples, key=lambda e: e["input_values"].shape)]


def heard(row: Mapping[str, Any], model: nn.Module, processor: Any, index: int) -> dict[str, Tensor]:
    """Encode a sound, with its text or label if the row has one."""
    audio: Any = row["audio"]
    need(processor, row, index)
    rate = getattr(getattr(processor, "feature_extractor", processor), "sampling_rate", 16_000)
    wanted = rate
    if isinstance(audio, Mapping):
        audio, rate = audio.get("array"), audio.get("sampling_rate", rate)
    if audio is None or isinstance(audio, (str, bytes)):
        raise RequestError(
            f"the audio of row {index}, {audio!r:.60}",
            expected="its samples: a list of floats, or {'array': ..., 'sampling_rate': ...}",
            do="read the sound file first, as with soundfile.read(path) or datasets.Audio()",
        )
    if rate != wanted:
        raise RequestError(
            f"the audio of row {index} at {rate} samples a second",
            expected=f"{wanted}, as the processor says",
            do="resample it first",
        )
    extractor = getattr(processor, "feature_extractor", processor)
    if hasattr(extractor, "vocab_size"):
        raise RequestError(
            f"the audio of row {index} and a {type(extractor).__name__}, which reads text",
            expected="a processor with a feature extractor",
            do="pass processing_class=..., or save the whole processor beside the model: processor.save_pretrained",
        )
    found = extractor(np.asarray(audio, dtype=np.float32), sampling_rate=rate, return_tensors="pt")
    made = {k: v[0] for k, v in found.items()}
    if "text" in row:
        return {**made, "labels": torch.tensor(getattr(processor, "tokenizer", processor)(row["text"])["input_ids"])}
    return labelled(made, row, model, index)
