"""One layer after another learns its share of what the last one's stream still lacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from torch import Tensor, nn

from neurograft.core.grafts.delta import LowRank
from neurograft.core.grafts.graft import Graft
from neurograft.core.prompts.requests import Rows
from neurograft.edits._memory import Memory, at_subjects


def in_order(
    model: nn.Module, found: Sequence[Memory], rows: Rows, goal: Tensor, solve: Callable[[Memory, Tensor], Tensor]
) -> dict[str, LowRank]:
    """Return D = sum_i r_i a_i^T of each layer, r = (goal - stream) / layers left, a = solve(layer, keys).

    A layer's keys, and what the stream of the last one still lacks, are read with the changes before it in place.

    Args:
        model: left as found.
        found: the layers' FFNs, in order.
        rows: the prompts.
        goal: what the stream behind the last layer should be at each subject, [n, d].
        solve: (FFN, its keys at the subjects [n, k], on the CPU) -> answers [n, k], such as
            `core.numerics.keyvalue.answers`.

    Returns:
        One rank for each request, by checkpoint tensor.
    """
    stream, deltas = found[-1].stream, dict[str, LowRank]()
    with ExitStack() as laid:
        for i, memory in enumerate(found):
            name = memory.keys.name
            read = at_subjects(model, {name: memory.keys, stream.name: stream}, rows)
            lacking = (goal - rows.mean(read[stream.name], len(goal))) / (len(found) - i)
            change = memory.change(model, solve(memory, rows.mean(read[name], len(goal)).cpu()), lacking)
            deltas |= change
            if memory is not found[-1]:
                laid.enter_context(Graft.made(model, change).on(model))
    return deltas
