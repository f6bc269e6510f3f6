"""Texts, answers and conversations as the tokens a model takes, with labels on what is to be said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.context import IGNORE, shifts
from neurograft.core.errors import RequestError
from neurograft.core.prompts.continued import continued, opened
from neurograft.core.seeds import generator

MASKED = 0.15


def tokens_of(processor: Any, text: Any, max_length: int, index: int) -> dict[str, Tensor]:
    """Return the tokens of a row's text as the tokenizer gives them; RequestError if it is no text."""
    text = _text(text, index)
    tokenizer = getattr(processor, "tokenizer", processor)
    found = tokenizer(text, truncation=True, max_length=max_length)
    return {k: torch.tensor(v) for k, v in found.items() if k in ("input_ids", "attention_mask", "token_type_ids")}


def some(made: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """Return a row's tokens; RequestError if there are none."""
    if not len(made["input_ids"]):
        raise RequestError(f"row {index}, whose text is empty", expected="at least one token", do="drop the row")
    return made


def _text(text: Any, index: int) -> str:
    if not isinstance(text, str):
        raise RequestError(
            f"{text!r}, a {type(text).__name__}, where text belongs (row {index})",
            expected="text",
            do="clean that row of the data",
        )
    return text


def translated(source: Any, target: Any, processor: Any, max_length: int, index: int) -> dict[str, Tensor]:
    """Encode a text for an encoder, and its answer as a decoder's, which some tokenizers write in other tokens."""
    tokenizer = getattr(processor, "tokenizer", processor)
    answer = tokenizer(text_target=_text(target, index), truncation=True, max_length=max_length)["input_ids"]
    return {**tokens_of(processor, source, max_length, index), "labels": torch.tensor(answer)}


def completed(
    prompt: Any, completion: Any, model: nn.Module, processor: Any, max_length: int, index: int
) -> dict[str, Tensor]:
    """Encode a prompt and its completion, as texts or as two parts of a conversation; the completion has labels."""
    if isinstance(prompt, (list, tuple)) and isinstance(completion, (list, tuple)):
        return chat([*prompt, *completion], processor, max_length, index)
    prompt, completion = _text(prompt, index), _text(completion, index)
    if getattr(model.config, "is_encoder_decoder", False):
        return translated(prompt, completion, processor, max_length, index)
    tokenizer = getattr(processor, "tokenizer", processor)
    asked = opened(tokens_of(processor, prompt, max_length, index)["input_ids"].tolist(), tokenizer.eos_token_id)
    head = torch.tensor(asked, dtype=torch.int64)
    tail = torch.tensor(continued(tokenizer, prompt, asked, completion), dtype=torch.int64)
    if tokenizer.eos_token_id is not None:
        tail = torch.cat([tail, torch.tensor([tokenizer.eos_token_id])])
    tokens = torch.cat([head, tail])[:max_length]
    labels = torch.cat([torch.full_like(head, IGNORE), tail])[:max_length]
    return _checked({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}, index)


def chat(messages: Any, processor: Any, max_length: int, index: int) -> dict[str, Tensor]:
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


def plain_text(
    text: str, model: nn.Module, processor: Any, max_length: int, index: int, seed: int
) -> dict[str, Tensor]:
    """Encode a text that is its own label, where the model predicts text; with some tokens masked if it fills gaps."""
    made = some(tokens_of(processor, text, max_length, index), index)
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
