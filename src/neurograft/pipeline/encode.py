"""From rows as people write them to what a model takes, one example at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neurograft.core.context import IGNORE, shifts
from neurograft.core.errors import RequestError
from neurograft.core.prompts.continued import continued, opened
from neurograft.core.seeds import generator
from neurograft.pipeline.grouped import COLUMN

READY = (
    "input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features", "decoder_input_ids",
    "sample", "states", "hidden_states",
)  # fmt: skip
COLUMNS = "text | text+label | prompt+completion | messages | source+target | image+label | audio+label|text"
MASKED = 0.15


def is_ready(row: Mapping[str, Any]) -> bool:
    """Say whether a row holds tensors for the model already."""
    return any(k in row for k in READY)


def encode(
    row: Mapping[str, Any], model: nn.Module, processor: Any, *, max_length: int, index: int, seed: int = 0
) -> dict[str, Tensor]:
    """Return one example as the model's inputs, unbatched tensors, labels included where the row has them.

    Args:
        row: columns as in `COLUMNS`, or the model's own inputs; a column `group` says where a row belongs.
        model: the model.
        processor: tokenizer, image processor or feature extractor; None for ready rows.
        max_length: longer texts are cut on the right.
        index: the row's number, for messages and for the masks of masked language modelling.
        seed: names the masks.

    Raises:
        RequestError: columns that are not understood, a missing processor, an answer cut off whole.
    """
    if is_ready(row):
        return {k: _tensor(v, k, index) for k, v in row.items() if v is not None and k != COLUMN}
    keys = row.keys()
    if "image" in keys:
        return _labelled(_image(row["image"], processor, index), row, model, index)
    if "audio" in keys:
        return _audio(row, model, processor, index)
    need(processor, row, index)
    if "messages" in keys:
        return _chat(row["messages"], processor, max_length, index)
    if "prompt" in keys and "completion" in keys:
        return _completion(row["prompt"], row["completion"], model, processor, max_length, index)
    if "source" in keys and "target" in keys:
        return _translated(row["source"], row["target"], processor, max_length, index)
    if "text" in keys and "label" in keys:
        return _labelled(_some(_tokens(processor, row["text"], max_length, index), index), row, model, index)
    if "text" in keys:
        return _plain_text(row["text"], model, processor, max_length, index, seed)
    raise RequestError(
        f"row {index} with the columns {', '.join(keys)}",
        expected=f"{COLUMNS}, or the model's own inputs",
        do="rename the columns",
    )


def need(processor: Any, row: Mapping[str, Any], index: int) -> None:
    """Raise if a raw row has nothing to encode it with."""
    if processor is None:
        raise RequestError(
            f"raw data (row {index}: {', '.join(row)}) and no tokenizer or processor",
            expected="a processing_class for raw data",
            do="pass processing_class=tokenizer, or save the tokenizer beside the model",
        )


def _tensor(value: Any, name: str, index: int) -> Tensor:
    try:
        found = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"the column {name!r} of row {index}, of type {type(value).__name__}",
            expected="numbers of one shape",
            do=f"leave it out, or give numbers ({error})",
        ) from error
    return found.float() if found.dtype == torch.float64 else found


def _text(text: Any, index: int) -> str:
    if not isinstance(text, str):
        raise RequestError(
            f"{text!r}, a {type(text).__name__}, where text belongs (row {index})",
            expected="text",
            do="clean that row of the data",
        )
    return text


def _tokens(processor: Any, text: Any, max_length: int, index: int) -> dict[str, Tensor]:
    text = _text(text, index)
    tokenizer = getattr(processor, "tokenizer", processor)
    found = tokenizer(text, truncation=True, max_length=max_length)
    return {k: torch.tensor(v) for k, v in found.items() if k in ("input_ids", "attention_mask", "token_type_ids")}


def _some(made: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    if not len(made["input_ids"]):
        raise RequestError(f"row {index}, whose text is empty", expected="at least one token", do="drop the row")
    return made


def _translated(source: Any, target: Any, processor: Any, max_length: int, index: int) -> dict[str, Tensor]:
    """Encode a text for an encoder, and its answer as a decoder's, which some tokenizers write in other tokens."""
    tokenizer = getattr(processor, "tokenizer", processor)
    answer = tokenizer(text_target=_text(target, index), truncation=True, max_length=max_length)["input_ids"]
    return {**_tokens(processor, source, max_length, index), "labels": torch.tensor(answer)}


def _labelled(made: dict[str, Tensor], row: Mapping[str, Any], model: nn.Module, index: int) -> dict[str, Tensor]:
    label = row.get("label")
    if label is None:
        return made
    if shifts(model):
        raise RequestError(
            f"row {index} with a label for a {type(model).__name__}, which has no classes",
            expected="prompt/completion rows for a language model",
            do="write the label as the completion, or load the model with a classification head",
        )
    if isinstance(label, str):
        names: Mapping[str, int] = getattr(model.config, "label2id", None) or {}
        if label not in names:
            raise RequestError(
                f"the label {label!r} of row {index}",
                expected=f"one of {', '.join(list(names)[:12])}",
                do="give numbers, or set config.label2id",
            )
        label = int(names[label])
    return {**made, "labels": _tensor(label, "label", index)}


def _completion(
    prompt: Any, completion: Any, model: nn.Module, processor: Any, max_length: int, index: int
) -> dict[str, Tensor]:
    if isinstance(prompt, (list, tuple)) and isinstance(completion, (list, tuple)):
        return _chat([*prompt, *completion], processor, max_length, index)
    prompt, completion = _text(prompt, index), _text(completion, index)
    if getattr(model.config, "is_encoder_decoder", False):
        return _translated(prompt, completion, processor, max_length, index)
    tokenizer = getattr(processor, "tokenizer", processor)
    asked = opened(_tokens(processor, prompt, max_length, index)["input_ids"].tolist(), tokenizer.eos_token_id)
    head = torch.tensor(asked, dtype=torch.int64)
    tail = torch.tensor(continued(tokenizer, prompt, asked, completion), dtype=torch.int64)
    if tokenizer.eos_token_id is not None:
        tail = torch.cat([tail, torch.tensor([tokenizer.eos_token_id])])
    tokens = torch.cat([head, tail])[:max_length]
    labels = torch.cat([torch.full_like(head, IGNORE), tail])[:max_length]
    return _checked({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}, index)


def _chat(messages: Any, processor: Any, max_length: int, index: int) -> dict[str, Tensor]:
    """Encode a conversation; only the last answer has labels."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if not isinstance(messages, (list, tuple)) or not all(
        isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages
    ):
        raise RequestError(
            f"the messages of row {index}, {messages!r:.60}",
            expected="a list of messages, each with role and content",
            do='write [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]',
        )
    if not messages or messages[-1].get("role") != "assistant":
        raise RequestError(
            f"the messages of row {index}, which do not end with the assistant",
            expected="a last message of role 'assistant'",
            do="append the answer that is to be learned",
        )
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError(
            f"messages (row {index}) and a tokenizer without a chat template",
            expected="a tokenizer with a chat template",
            do="give prompt/completion rows, or set tokenizer.chat_template",
        )
    whole = _ids(tokenizer.apply_chat_template(list(messages), tokenize=True))
    head = _ids(tokenizer.apply_chat_template(list(messages[:-1]), tokenize=True, add_generation_prompt=True))
    if whole[: len(head)] != head:
        raise RequestError(
            f"row {index}, whose prompt is no beginning of the whole conversation in this chat template",
            expected="a template that only appends",
            do="give prompt/completion rows",
        )
    tokens = torch.tensor(whole[:max_length])
    labels = tokens.clone()
    labels[: len(head)] = IGNORE
    return _checked({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}, index)


def _ids(found: Any) -> list[int]:
    return list(found["input_ids"] if hasattr(found, "keys") else found)


def _checked(made: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    if not bool((made["labels"] != IGNORE).any()):
        raise RequestError(
            f"row {index}, whose answer is empty or cut off",
            expected="at least one token of the answer",
            do="raise max_length, or drop the row",
        )
    return made


def _plain_text(
    text: str, model: nn.Module, processor: Any, max_length: int, index: int, seed: int
) -> dict[str, Tensor]:
    made = _some(_tokens(processor, text, max_length, index), index)
    tokens = made["input_ids"]
    if shifts(model):
        return {**made, "labels": tokens.clone()}
    tokenizer = getattr(processor, "tokenizer", processor)
    if type(model).__name__.endswith("ForMaskedLM"):
        return {**made, **_masked(tokens, tokenizer, generator(seed, "masked", index))}
    return made


def _masked(tokens: Tensor, tokenizer: Any, rng: torch.Generator) -> dict[str, Tensor]:
    """Hide 15 % of the tokens, always the same ones for one row and seed (8 of 10 masked, 1 changed, 1 kept)."""
    special = torch.isin(tokens, torch.tensor(tokenizer.all_special_ids))
    draw = torch.rand(len(tokens), generator=rng).masked_fill(special, 2.0)
    count = max(1, round(MASKED * int((~special).sum())))
    chosen = draw.argsort()[:count]
    chosen = chosen[draw[chosen] < 2.0]
    labels, inputs = torch.full_like(tokens, IGNORE), tokens.clone()
    labels[chosen] = tokens[chosen]
    how = torch.rand(len(chosen), generator=rng)
    changed = torch.randint(0, len(tokenizer), (len(chosen),), generator=rng)
    mask = torch.full_like(chosen, tokenizer.mask_token_id)
    inputs[chosen] = torch.where(how < 0.8, mask, torch.where(how < 0.9, changed, tokens[chosen]))
    return {"input_ids": inputs, "labels": labels}


def _image(image: Any, processor: Any, index: int) -> dict[str, Tensor]:
    if processor is None:
        pixels = _tensor(image, "image", index)
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


def _audio(row: Mapping[str, Any], model: nn.Module, processor: Any, index: int) -> dict[str, Tensor]:
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
    return _labelled(made, row, model, index)
