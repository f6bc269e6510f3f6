"""Whether an edited model answers as it was asked to, and otherwise as before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.context import IGNORE
from neurograft.core.grafts.graft import Graft
from neurograft.core.prompts.requests import Request, joined
from neurograft.pipeline.requests import as_request, target_of

AT_ONCE = 64
Read = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits, labels, last positions -> one value a row


def measured(model: nn.Module, graft: Graft, requests: Sequence[Request], processor: Any) -> dict[str, float]:
    """Return the shares of requests, of their rephrasings and of their locality prompts that are as they should be.

    A request is answered if every token of its target is the likeliest one; a locality prompt is left alone if the
    likeliest next token is the one it was before.

    Args:
        model: without the graft.
        graft: the edit.
        requests: as encoded.
        processor: tokenizer of the texts.

    Returns:
        `reliability`; `rephrase` and `locality` where requests have such prompts.
    """
    again = [_like(r, p, model, processor, i) for i, r in enumerate(requests) for p in _several(r.source, "rephrase")]
    apart = [_like(r, p, model, processor, i) for i, r in enumerate(requests) for p in _several(r.source, "locality")]
    before = said(model, apart)
    with graft.on(model):
        found = {"reliability": _share(answered(model, requests))}
        if again:
            found["rephrase"] = _share(answered(model, again))
        if apart:
            found["locality"] = _share(said(model, apart) == before)
    return found


def answered(model: nn.Module, requests: Sequence[Request], *, eos: bool = False) -> Tensor:
    """Return for each request whether the model says its target word for word, bool [n].

    Args:
        model: as it is to be asked.
        requests: the first prompt of each counts.
        eos: whether it must also end there.
    """

    def right(logits: Tensor, labels: Tensor, last: Tensor) -> Tensor:
        here = labels[:, 1:] != IGNORE
        return ((logits[:, :-1].argmax(-1) == labels[:, 1:]) | ~here).all(1)

    return _asked(model, requests, right, eos=eos)


def said(model: nn.Module, requests: Sequence[Request]) -> Tensor:
    """Return the likeliest token behind each request's first prompt, int64 [n]."""
    return _asked(model, requests, lambda logits, _, last: logits[torch.arange(len(last)), last].argmax(-1))


@torch.no_grad()
def _asked(
    model: nn.Module,
    requests: Sequence[Request],
    read: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    eos: bool = False,
) -> Tensor:
    device = next(p.device for p in model.parameters())
    found = []
    for i in range(0, len(requests), AT_ONCE):
        bare = [replace(r, prompts=r.prompts[:1], at=r.at[:1]) for r in requests[i : i + AT_ONCE]]
        rows = joined(bare, eos=eos, device=device)
        logits = model(input_ids=rows.batch["input_ids"], attention_mask=rows.batch["attention_mask"]).logits
        found.append(read(logits, rows.batch["labels"], rows.last).cpu())
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)


def _like(request: Request, prompt: Any, model: nn.Module, processor: Any, index: int) -> Request:
    return as_request({"prompt": prompt, "target_new": target_of(request.source)}, model, processor, index)


def _several(source: Any, name: str) -> list[Any]:
    found = source.get(name)
    if found is None:
        return []
    single = isinstance(found, (str, Tensor)) or (len(found) > 0 and isinstance(found[0], int))
    return [found] if single else list(found)


def _share(hits: Tensor) -> float:
    return float(hits.float().mean())
