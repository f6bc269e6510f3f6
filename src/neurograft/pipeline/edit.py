"""`edit`: which change follows from requests, without training on data?"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neurograft.anatomy.sites import sites
from neurograft.core.choose import Choice, Chosen, choose
from neurograft.core.compact.mount import check_here
from neurograft.core.context import Batch, Context, shifts
from neurograft.core.errors import RequestError
from neurograft.core.grafts.graft import Graft
from neurograft.core.grafts.stack import Stack
from neurograft.core.prompts.requests import Request
from neurograft.core.selection import Selection
from neurograft.pipeline._edited import measured
from neurograft.pipeline.attach import Where, selection_of
from neurograft.pipeline.inputs import as_batches, data_digest, processor_for
from neurograft.pipeline.models import Model, load_model
from neurograft.pipeline.requests import as_requests
from neurograft.pipeline.state import as_found


def edit(
    model: Model,
    requests: Any,
    *,
    by: Choice = "nmke",
    where: Where = None,
    general: Any = None,
    after: Sequence[Graft | str | Path] | Graft | str | Path = (),
    layers: Sequence[int] | None = None,
    batch: int | None = None,
    contexts: Sequence[str] = (),
    processing_class: Any = None,
    batch_size: int = 32,
    max_length: int = 1024,
    limit: int | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    seed: int = 0,
) -> Graft:
    """Write facts into a model and return the change as a graft; the model is left as it was found.

    The graft's card holds how many of the requests the edited model answers, of their `rephrase` prompts too, and of
    the `locality` prompts the share that is answered as before. `rollback(graft, [i])` takes single edits back.

    Args:
        model: a module, a folder, a Hub id or a shipped model. Grafts that lie on a live one count as edited earlier.
        requests: dicts with prompt, target_new and subject (+ rephrase, locality), or a JSONL path; for edits that
            take none, such as "remove_components", the data they read; None for those that read nothing.
        by: the edit, of `neurograft.edits`.
        where: units the edit may use, for edits that can be told; or the path of a saved selection.
        general: data whose keys are to keep their values, for edits that protect some.
        after: earlier edits, or their folders; they lie on the model while this one is made.
        layers: whose matrices, for edits that choose layers.
        batch: so many requests at a time, each batch after the ones before it; all at once if None.
        contexts: texts put before every prompt, beside the bare one, for edits that average over contexts.
        processing_class: tokenizer of the texts; the one saved with the model if None.
        batch_size: examples in a batch of `general`.
        max_length: longer texts of `general` are cut.
        limit: use at most so many requests.
        revision: of a Hub id.
        dtype: load the weights so.
        device_map: as for `from_pretrained`.
        seed: root of every random number.

    Raises:
        RequestError: an unknown edit or option, requests that cannot be read, a model the edit cannot change.

    Example:
        >>> from neurograft.worlds.pico import pico
        >>> net = pico("llama")
        >>> graft = edit(net, [{"prompt": [5, 6, 7], "subject": [6], "target_new": [9]}], by=("nmke", {"mask": "none"}))
        >>> sorted(graft.deltas), graft.card["reliability"]
        (['model.layers.0.mlp.down_proj.weight'], 0.0)
    """
    chosen = choose("edits", by)
    if layers is not None:
        chosen = choose("edits", chosen, layers=list(layers))
    if batch is not None and batch < 1:
        raise RequestError(f"batch={batch}", expected="at least 1", do="leave it out for all requests at once")
    net, chosen_units = load_model(model, revision=revision, dtype=dtype, device_map=device_map), selection_of(where)
    check_here(net, chosen_units)
    processor = processor_for(net, processing_class)
    reading = {"processing_class": processor, "batch_size": batch_size, "max_length": max_length}
    if "requests" not in chosen.card.needs:
        _unread(chosen, general=general, batch=batch, contexts=contexts or None)
        read = [] if requests is None else as_batches(requests, net, limit=limit, **reading)
        return _by_data(chosen, net, read, chosen_units, after, seed)
    _predicts(net)
    asked = as_requests(requests, net, processor, contexts=contexts, limit=limit)
    kept = [] if general is None else as_batches(general, net, **reading)
    units = min(chosen.card.kinds, default="neuron")
    with as_found(net), ExitStack() as earlier:
        _lay(net, after, earlier)
        context = Context(net, sites(net, units), kept, processor=processor, seed=seed)
        size = batch or len(asked)
        chunks = [asked[i : i + size] for i in range(0, len(asked), size)]
        made = _in_turn(chosen, context, chosen_units, chunks)
        card = {
            "by": chosen.as_dict(),
            "batch": batch,
            "general": data_digest(kept) if kept else None,
            "after": sorted(Stack.of(net).grafts),
            "seed": seed,
            **measured(net, made, asked, processor),
        }
    return replace(made, card={**made.card, **card})


def _predicts(net: nn.Module) -> None:
    if hasattr(net, "config") and not shifts(net):
        raise RequestError(
            f"edit requests for {type(net).__name__}",
            expected="a causal language model, which says what follows a prompt",
            do="load the model as one, or take an edit that reads data, such as by='shut'",
        )


def _unread(chosen: Chosen, **given: Any) -> None:
    odd = [name for name, value in given.items() if value is not None]
    if odd:
        raise RequestError(
            f"{', '.join(odd)} for {chosen.name}, which reads no requests",
            expected="data and a selection",
            do=f"leave {odd[0]} out",
        )


def _by_data(
    chosen: Chosen, net: nn.Module, batches: list[Batch], where: Selection | None, after: Any, seed: int
) -> Graft:
    """Return what an edit makes of data alone."""
    if where is None:
        raise RequestError(
            f"{chosen.name} and no selection", expected="the units it changes", do="pass where=, or --where FILE"
        )
    with as_found(net), ExitStack() as earlier:
        _lay(net, after, earlier)
        made: Graft = chosen(Context(net, where.sites, batches, seed=seed), where)
        below = sorted(Stack.of(net).grafts)
    data = data_digest(batches) if batches else None
    card: dict[str, Any] = {"by": chosen.as_dict(), "data": data, "after": below, "requests": [], "seed": seed}
    return replace(made, card={**made.card, **card})


def _in_turn(chosen: Chosen, context: Context, where: Any, chunks: Sequence[Sequence[Request]]) -> Graft:
    """Make one graft for each chunk, the ones before it on the model, and return their sum."""
    made: list[Graft] = []
    with ExitStack() as laid:
        for chunk in chunks:
            graft: Graft = chosen(replace(context, requests=chunk), where)
            made.append(replace(graft, card={"requests": [r.as_dict() for r in chunk], **graft.card}))
            if len(made) < len(chunks):
                laid.enter_context(made[-1].on(context.model))
    total = made[0]
    for graft in made[1:]:
        total = total + graft
    asked = [r for g in made for r in g.card["requests"]]
    card = {k: v for k, v in total.card.items() if k != "sum_of"}
    if "ranks" in card:
        card["ranks"] = [r for g in made for r in g.card["ranks"]]
    return replace(total, card={**card, "requests": asked, "batches": [len(c) for c in chunks]})


def _lay(net: nn.Module, after: Any, stack: ExitStack) -> None:
    """Put the earlier edits on the model that do not lie there, until the stack is left."""
    for one in after if isinstance(after, (list, tuple)) else [after]:
        graft = one if isinstance(one, Graft) else Graft.load(one)
        if graft.identity not in Stack.of(net).grafts:
            stack.enter_context(graft.on(net))
