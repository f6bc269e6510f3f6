"""Layers behind which the representation changes most, on any prompts, before any tuning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neurograft.core.card import method
from neurograft.core.context import Batch, Context, token_mask
from neurograft.core.errors import RequestError
from neurograft.core.numerics.linalg import linear_cka, mean_cca, principal
from neurograft.core.selection import Scores
from neurograft.core.taps.look import look
from neurograft.core.taps.tap import watch
from neurograft.locators._common import need_batches, scored


@method(
    paper="spectral-layers",
    kinds={"layer"},
    needs={"batches", "taps"},
    takes={"positions"},
    claims={"finite", "length"},
    departs="At the ends of the stack the window is as wide as there are layers. A window of layers is the one around "
    "the change point (around=True).",
)
def change_point(context: Context, *, window: int = 5, around: bool = False, components: Sequence[int] = ()) -> Scores:
    """Score each layer by 1 - delta_l, delta_l = mean of C[l - window // 2 .. l + window // 2, l].

    C[i, j] is the linear CKA of the outputs of layers i and j at the last token of the prompt, [n, d] over n prompts.
    A low delta is a change point: a critical layer.

    Args:
        context: model, layers tapped at the residual stream (at="residual"), batches of prompts; where labels mark an
            answer, the prompt ends before it.
        window: layers compared, itself among them; odd.
        around: score by nearness to the change point instead, the deltas breaking ties, so that the best k layers
            are a window around it.
        components: for each of these numbers k, also report the mean canonical correlation of the first k principal
            components with those of the neighbouring layers (`cca`).

    Returns:
        Scores; the card holds `delta`, `cka` [layers, layers], and `cca`.

    Raises:
        RequestError: no prompts or a single one, data without tokens, fewer than three layers, or an even window.
    """
    need_batches(context)
    if window < 3 or window % 2 == 0 or len(context.sites) < 2:
        raise RequestError(
            f"a window of {window} over {len(context.sites)} layers", expected="an odd window from 3, and some layers",
            do="give window=5 and all layers",
        )  # fmt: skip
    read = _outputs(context)
    names = list(read)
    cka = torch.tensor([[linear_cka(read[a], read[b]) for b in names] for a in names], dtype=torch.float64)
    side = window // 2
    near = [range(max(0, i - side), min(len(names), i + side + 1)) for i in range(len(names))]
    delta = torch.stack([cka[list(rows), i].mean() for i, rows in enumerate(near)])
    values = 1 - delta
    if around:
        distance = (torch.arange(len(names)) - int(delta.argmin())).abs()
        values = 1 - distance + 0.5 * values.clamp(0, 1)
    card = {
        "delta": delta.tolist(),
        "cka": cka.tolist(),
        "cca": {k: _neighbours(read, names, near, k) for k in components},
    }
    return scored(context, {n: values[i].reshape(1) for i, n in enumerate(names)}, card)


def _outputs(context: Context) -> dict[str, Tensor]:
    """Return what each layer passes on at the last prompt token, [n, d]."""
    kept: dict[str, list[Tensor]] = {name: [] for name in context.sites}

    def reader(name: str, x: Tensor) -> None:
        kept[name].append(x.reshape(len(x), -1).double().cpu())

    for batch in context.batches:
        wanted = ends(batch, positions=context.positions)
        with watch(context.model, context.sites, reader, mask=lambda seen, wanted=wanted: wanted), torch.no_grad():  # type: ignore[misc]
            look(context.model, batch)
    found = {name: torch.cat(parts) for name, parts in kept.items()}
    if len(next(iter(found.values()))) < 2:
        raise RequestError("a single prompt", expected="several, about 300", do="give more prompts")
    return found


def ends(batch: Batch, *, positions: object = "all") -> Tensor:
    """Return the last token of each prompt, bool [B, T]: before the first label behind it, else the last real one.

    Example:
        >>> labels = torch.tensor([[-100, -100, 5], [1, 1, 1]])
        >>> ends({"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": labels}).int().tolist()
        [[0, 1, 0], [0, 0, 1]]
    """
    if callable(positions):
        return token_mask(batch, positions)  # type: ignore[return-value]
    if token_mask(batch) is None:
        raise RequestError(
            "data without tokens",
            expected="prompts, at whose last token layers are compared",
            do="give texts, or choose layers by another locator",
        )
    last = token_mask(batch, "last")
    assert last is not None
    labels = batch.get("labels")
    if labels is None or labels.shape != last.shape:
        return last
    prompt = token_mask(batch, "prompt")
    assert prompt is not None
    index = torch.arange(last.shape[1], device=last.device)
    end = torch.where(prompt, index, -1).max(dim=1).values
    return torch.where((end >= 0)[:, None], index == end[:, None], last)


def _neighbours(read: dict[str, Tensor], names: Sequence[str], near: Sequence[range], k: int) -> list[float]:
    parts = []
    for name in names:
        directions, _ = principal(read[name], k)
        parts.append((read[name] - read[name].mean(0)) @ directions.t())
    found = []
    for i, rows in enumerate(near):
        others = [j for j in rows if j != i]
        found.append(sum(mean_cca(parts[i], parts[j]) for j in others) / len(others))
    return found
