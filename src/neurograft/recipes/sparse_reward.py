"""Sparse reward subsystem: the few residual channels that carry a model's estimate of its own success."""

from __future__ import annotations

from typing import Any

from neurograft.core.card import method
from neurograft.core.ranges import least, share
from neurograft.pipeline.recipe import Recipe


@method(
    paper="sparse-reward",
    kinds={"channel"},
    needs={"contrast"},
    task="text-generation",
    departs="The paper's body was not read; the loss, the optimiser and the dopamine statistic are inferred. An "
    "independent reproduction found that the probe holds and that the causal claim does not against channels matched "
    "in magnitude, so silence comes as an operation to be measured with `ng.evidence`, whose controls match magnitude "
    "and leave attention sinks out. Scoring candidate steps by a dopamine readout, and the search, are not here.",
)
def sparse_reward(
    *,
    of: str = "value",
    probe: str = "mlp",
    hidden: int = 1024,
    gamma: float = 1 - 1e-5,
    fraction: float = 0.01,
    alpha: float = 0.0,
    layers: tuple[int, ...] | None = None,
    ends: tuple[int, ...] = (),
    probe_epochs: int = 300,
    probe_lr: float = 1e-3,
    probe_decay: float = 1e-2,
    limit: int | None = None,
) -> Recipe:
    """Fit a value probe by temporal differences at each layer's boundary, take its best channels, scale them by alpha.

    V(s) = sigmoid(w2 . relu(W1 s)), target gamma * V(s_{t+1}), at the end the reward; a channel's score is the L1 norm
    of its column in W1. The graft is an operation: a residual channel is no weight of its own. How stable the channels
    are over data sets or tuned siblings is `Selection.overlap` of two selections; by chance k of d channels share
    k / (2 d - k) of their union.

    The data are rows with `positive` (prompt and a successful answer) and `negative` (prompt and a failed one).

    Args:
        of: "value", or "dopamine" for the channels of its step-wise prediction errors.
        probe: "mlp" or "linear".
        hidden: width of the MLP.
        gamma: discount.
        fraction: share of each layer's channels.
        alpha: what they are multiplied with; 0 is the paper's causal test.
        layers: only these blocks.
        ends: token ids that end a reasoning step; empty for every token of the answer.
        probe_epochs: full-batch steps of the probe's Adam.
        probe_lr: its step size.
        probe_decay: weight decay of the probe's first layer.
        limit: examples.
    """
    least(hidden=(hidden, 1), probe_epochs=(probe_epochs, 1))
    share(gamma=gamma)
    options: dict[str, Any] = {"of": of, "probe": probe, "hidden": hidden, "gamma": gamma, "ends": list(ends)}
    options |= {"epochs": probe_epochs, "lr": probe_lr, "decay": probe_decay}
    which = None if layers is None else list(layers)
    return Recipe(
        "sparse_reward",
        (
            {
                "do": "locate", "by": ("value", options), "units": "channel", "at": "residual", "layers": which,
                "limit": limit,
            },
            {"do": "select", "by": "top", "fraction": fraction, "per": "site"},
            {"do": "intervene", "kind": "scale", "factor": alpha},
        ),
        paper="sparse-reward",
    )  # fmt: skip
