"""What the steps for a cascade share: the copy that is trained, its rows, and one stage of training.

Shape letters: N examples, P patches.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.context import Batch
from neurograft.core.errors import RequestError
from neurograft.core.seeds import derive, generator
from neurograft.networks.cascade import Cascade
from neurograft.pipeline.attach import attach
from neurograft.pipeline.inputs import as_batches
from neurograft.pipeline.state import as_found
from neurograft.train.loop import fit

State = Mapping[str, Any]
CHUNK = 256


def trained(
    part: nn.Module, tensors: Mapping[str, Tensor], loss: Any, *, steps: int, lr: float, batch: int, seed: int
) -> None:
    """Train every parameter of a module in place, with AdamW, on rows drawn at random.

    Args:
        part: the module.
        tensors: columns of the batches, all with N rows; of patches [N, P, ...] one is drawn for each row.
        loss: (module, batch) -> scalar.
        steps: optimizer steps; a twentieth of them is warm-up, then the rate falls to 0.
        lr: learning rate.
        batch: rows in a step.
        seed: names the draws.
    """
    count = len(next(iter(tensors.values())))

    def feed(draw: int, phase: Any) -> Batch:
        rng = generator(seed, "draw", draw)
        ids = torch.randint(count, (min(batch, count),), generator=rng)
        found = {k: v[ids.to(v.device)] for k, v in tensors.items()}
        x = found["pixel_values"]
        if x.dim() == 5:
            at = torch.randint(x.shape[1], (len(x),), generator=rng).to(x.device)
            found["pixel_values"] = x[torch.arange(len(x), device=x.device), at]
        return found

    with attach(part) as live:
        fit(live, feed, steps=steps, lr=lr, objective=loss, warmup=max(1, steps // 20), decay="linear", seed=seed)
        values = {n: v.detach().clone() for n, v in part.state_dict().items()}
    part.load_state_dict(values)


def copied(state: State) -> Cascade:
    """Return the network as trained so far: a copy of the model, made when first asked for."""
    net = state.get("tuned") or state["model"]
    if not isinstance(net, Cascade):
        raise RequestError(
            f"a {type(net).__name__}", expected="a cascade", do="give neurograft.networks.cascade, or one made with it"
        )
    return net if state.get("tuned") is not None else copy.deepcopy(net).eval()


def seed_of(state: State, *names: object) -> int:
    """Return the run's seed, or one derived from it and names."""
    seed = int(state.get("common", {}).get("seed", 0))
    return derive(seed, *names) if names else seed


def chunked(function: Any, x: Tensor) -> Tensor:
    """Return a function of N examples, taken some at a time without gradients."""
    with torch.no_grad():
        return torch.cat([function(part) for part in x.split(CHUNK)])


def rows_of(
    state: State, net: Cascade, held: float, need: tuple[str, ...] = ("labels",)
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the columns of the rows that are learned from, and of those held back.

    Raises:
        RequestError: a column is missing, labels other than 0 and 1, or too few rows.
    """
    with as_found(net):
        batches = as_batches(state["data"], net)
    for column in ("pixel_values", *need):
        if any(column not in b for b in batches):
            raise RequestError(f"rows without {column}", expected="it in every row", do="add the column")
    joined = {k: torch.cat([b[k] for b in batches]) for k in ("pixel_values", *need)}
    labels = joined.get("labels")
    if labels is not None and not bool(((labels == 0) | (labels == 1)).all()):
        raise RequestError(
            f"labels from {labels.min():g} to {labels.max():g}", expected="0 or 1 for each attribute", do="recode them"
        )
    count = len(joined["pixel_values"])
    order = torch.randperm(count, generator=generator(seed_of(state), "held back"))
    cut = round(held * count)
    if not 0 < cut < count:
        raise RequestError(
            f"{count} rows of which {held:g} are held back", expected="some of both", do="give more rows"
        )
    back, kept = order[:cut].sort().values, order[cut:].sort().values
    return tuple({k: v[i.to(v.device)] for k, v in joined.items()} for i in (kept, back))  # type: ignore[return-value]
