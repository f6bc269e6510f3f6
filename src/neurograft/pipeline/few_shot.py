"""A step of recipes: some rows of the data, with other rows shown before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from neurograft.core.errors import RequestError
from neurograft.core.prompts import examples
from neurograft.core.seeds import generator
from neurograft.pipeline.inputs import is_batch
from neurograft.pipeline.rows import Row, read_rows


def few_shot(
    state: Mapping[str, Any],
    *,
    shots: Sequence[int] = (0, 2, 4, 6),
    size: int = 20,
    between: str = "\n",
    name: str = "shown",
) -> dict[str, list[Row]]:
    """Return at most `size` rows under a name, each after a number of solved ones that is drawn from `shots`.

    What is shown are the first rows beyond these, and where the data end, the first of these themselves, never the
    row in question.

    Args:
        state: what the recipe has made so far, with its data: rows of prompt and completion, or of messages; for no
            shots also ready batches, of which `size` examples are taken.
        shots: numbers of solved rows, drawn once for each row from the run's seed.
        size: how many rows.
        between: text between two solved rows of prompt and completion.
        name: of the rows.

    Raises:
        RequestError: shots for ready batches or rows of another form, more shots than there are other rows, no
            number to draw.

    Example:
        >>> rows = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1+2=", "completion": "3"}]
        >>> few_shot({"data": rows, "common": {"seed": 0}}, shots=[1], size=1)["shown"]
        [{'prompt': '1+2=3\\n1+1=', 'completion': '2'}]
    """
    if not shots or min(shots) < 0 or size < 1:
        raise RequestError(
            f"shots={list(shots)}, size={size}", expected="numbers from 0, at least one row", do="shots=[0] for none"
        )
    rows = read_rows(state["data"])
    ready = any(is_batch(row) for row in rows)
    if max(shots) == 0:
        return {name: _first(rows, size) if ready else rows[:size]}
    if ready:
        raise RequestError(
            f"up to {max(shots)} shots before ready batches",
            expected="rows of texts `prompt` and `completion`, or of `messages`",
            do="give the texts themselves, or pass shots=[0]",
        )
    if max(shots) >= len(rows):
        raise RequestError(
            f"{max(shots)} shots out of {len(rows)} rows",
            expected=f"at least {max(shots) + 1} rows",
            do="give more rows, or pass fewer shots",
        )
    rng = generator(state["common"]["seed"], "shots")
    counts = torch.randint(len(shots), (min(size, len(rows)),), generator=rng).tolist()
    pool = [*range(size, len(rows)), *range(min(size, len(rows)))]
    made = []
    for i, n in enumerate(counts):
        others = [rows[j] for j in pool if j != i][: shots[n]]
        made.append(_shown(rows[i], others, between, i))
    return {name: made}


def _first(batches: Sequence[Row], size: int) -> list[Row]:
    """Return ready batches with so many examples, the last one cut."""
    found: list[Row] = []
    for batch in batches:
        n, left = examples.size(batch), size - sum(examples.size(b) for b in found)
        if left > 0:
            cut = [k for k, v in batch.items() if isinstance(v, torch.Tensor) and v.dim() and len(v) == n]
            found.append({k: v[:left] if k in cut else v for k, v in batch.items()})
    return found


def _shown(row: Row, others: Sequence[Row], between: str, index: int) -> Row:
    if "messages" in row:
        lead = [m for m in row["messages"] if m["role"] == "system"]
        turns = [m for o in others for m in o["messages"] if m["role"] != "system"]
        return {**row, "messages": [*lead, *turns, *row["messages"][len(lead) :]]}
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not isinstance(row.get("completion"), str):
        raise RequestError(
            f"shots before row {index} with the columns {', '.join(row)}",
            expected="texts `prompt` and `completion`, or `messages`",
            do="rename the columns, or pass shots=[0]",
        )
    return {**row, "prompt": "".join(f"{o['prompt']}{o['completion']}{between}" for o in others) + prompt}
