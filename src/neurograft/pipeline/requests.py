"""Edit requests as people write them, turned into tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from neurograft.core.errors import RequestError
from neurograft.core.prompts.continued import continued, opened
from neurograft.core.prompts.requests import Request
from neurograft.pipeline._columns import need
from neurograft.pipeline.rows import read_rows

KEYS = "prompt, target_new (+ subject, rephrase, locality)"


def as_requests(
    requests: Any, model: nn.Module, processor: Any, *, contexts: Sequence[str] = (), limit: int | None = None
) -> list[Request]:
    """Return edit requests as tokens.

    A request is a dict with `prompt`; `target_new` (or `completion`), which continues the prompt as it is written,
    so mind the space between; and `subject`, words of the prompt whose last token carries the key, the prompt's last
    token if left out. `rephrase` (one or several prompts with the same answer) and `locality` (prompts whose answers
    are to stay) are used for measuring alone. Texts may be given as token lists instead, then all of them.

    Args:
        requests: an iterable of dicts, or what `read_rows` takes.
        model: its config names the token that ends an answer.
        processor: tokenizer for texts.
        contexts: texts to put before every prompt, beside the bare one; they end with the space they need.
        limit: use at most so many.

    Raises:
        RequestError: missing or empty texts, a subject that is not in its prompt, tokens outside the vocabulary.
    """
    rows = read_rows(requests, limit=limit)
    return [as_request(row, model, processor, i, contexts=contexts) for i, row in enumerate(rows)]


def as_request(
    row: Mapping[str, Any], model: nn.Module, processor: Any, index: int, *, contexts: Sequence[str] = ()
) -> Request:
    """Return one request as tokens; see `as_requests`."""
    row = {k: _plain(v) for k, v in row.items()}  # it goes onto the card
    prompt: Any = row.get("prompt")
    target, subject = target_of(row), row.get("subject")
    end = _end(model, processor)
    if _kind(prompt, index) != _kind(target, index) or _kind(prompt, index) in ("", "nothing"):
        raise RequestError(
            f"request {index} with {', '.join(k for k, v in row.items() if v is not None) or 'nothing'}"
            + (" and an empty text" if "" in (_kind(prompt, index), _kind(target, index)) else ""),
            expected=f"{KEYS}, all of them texts or all of them token lists",
            do="give every request a prompt and what is to be said next",
        )
    if _kind(prompt, index) == "tokens":
        asked, said = _ids(prompt), _ids(target)
        if contexts:
            raise RequestError("contexts= with prompts of tokens", expected="texts", do="leave contexts out")
        at = len(asked) - 1 if subject is None else _place(asked, subject, index)
        made = Request((asked,), (at,), said, end, dict(row))
    else:
        need(processor, row, index)
        tokenizer = getattr(processor, "tokenizer", processor)
        texts = [prompt, *(f"{c}{prompt}" for c in contexts)]
        asked_all, places = zip(*[_asked(tokenizer, t, len(t) - len(prompt), subject, end, index) for t in texts])
        said = continued(tokenizer, prompt, asked_all[0], target)
        made = Request(asked_all, places, said, end, dict(row))
    _check(made, model, index)
    return made


def target_of(row: Mapping[str, Any]) -> Any:
    """Return what a request wants to be said, or None."""
    return row["completion"] if row.get("target_new") is None and "completion" in row else row.get("target_new")


def _plain(value: Any) -> Any:
    """Return tensors, arrays and their numbers as plain lists and numbers."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _kind(value: Any, index: int) -> str:
    """Return "text" or "tokens", "" for an empty one, "nothing" for None."""
    if value is None:
        return "nothing"
    if not isinstance(value, (str, list)):
        raise RequestError(
            f"{value!r} in request {index}, of type {type(value).__name__}",
            expected="a text, or a list of tokens",
            do="put numbers that are to be read as text in quotes",
        )
    return "" if not len(value) else "text" if isinstance(value, str) else "tokens"


def _asked(
    tokenizer: Any, text: str, start: int, subject: Any, end: int | None, index: int
) -> tuple[tuple[int, ...], int]:
    ids = opened(_ids(tokenizer(text)["input_ids"]), end)
    if subject is None:
        return ids, len(ids) - 1
    found = _where(text, str(subject).strip(), start)
    if found < 0:
        raise RequestError(
            f"the subject {subject!r} of request {index}, whose prompt is {text[start:]!r}",
            expected="words of the prompt",
            do="write the subject as the prompt does, or leave it out to key the edit at the prompt's last token",
        )
    stop = found + len(str(subject).strip())
    if getattr(tokenizer, "is_fast", False):
        spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"][: len(ids)]
        return ids, max(i for i, (a, b) in enumerate(spans) if a < stop and b > found)
    return ids, len(opened(_ids(tokenizer(text[:stop])["input_ids"]), end)) - 1


def _where(text: str, subject: str, start: int) -> int:
    """Return where a subject begins, as a word of its own if it stands as one anywhere; -1 if it is not there."""
    first = at = text.find(subject, start) if subject else -1
    while at >= 0:
        around = text[max(at - 1, start) : at] + text[at + len(subject) :][:1]
        if not any(c.isalnum() for c in around):
            return at
        at = text.find(subject, at + 1)
    return first


def _place(asked: tuple[int, ...], given: Any, index: int) -> int:
    subject = _ids(given) if _kind(given, index) == "tokens" else ()
    for i in range(len(asked) - len(subject) + 1):
        if subject and asked[i : i + len(subject)] == subject:
            return i + len(subject) - 1
    raise RequestError(
        f"the subject {given!r} of request {index}, whose prompt is {list(asked)[:12]}",
        expected="tokens that stand in the prompt side by side",
        do="give the subject's own tokens",
    )


def _check(request: Request, model: nn.Module, index: int) -> None:
    size = getattr(getattr(getattr(model, "config", None), "get_text_config", lambda: None)(), "vocab_size", None)
    tokens = [t for p in request.prompts for t in p] + list(request.target)
    odd = max(tokens) if min(tokens) >= 0 else min(tokens)
    if size and not 0 <= odd < size:
        raise RequestError(
            f"token {odd} in request {index} for a vocabulary of {size}",
            expected="this model's own tokenizer",
            do="encode with the tokenizer saved beside the model",
        )


def _end(model: nn.Module, processor: Any) -> int | None:
    known = getattr(getattr(processor, "tokenizer", processor), "eos_token_id", None)
    known = getattr(getattr(model, "config", None), "eos_token_id", None) if known is None else known
    return known[0] if isinstance(known, list) else known


def _ids(value: Any) -> tuple[int, ...]:
    return tuple(int(t) for t in value)
