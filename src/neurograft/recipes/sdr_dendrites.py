"""Sparse codes on dendrites: a neuron stores codes on few synapses, and what that costs."""

from __future__ import annotations

from neurograft.core.card import method
from neurograft.pipeline.recipe import Recipe


@method(
    paper="sdr-dendrites",
    departs="Active cells fail, not synapses: the same chance for a segment that stores one code. Foreign codes are "
    "taken as random ones of their own activity.",
)
def sdr_dendrites(
    *,
    n: int = 2000,
    segments: int = 1,
    s: int = 20,
    theta: int | None = None,
    nu: float = 0.3,
    trials: int = 1000,
    straight_through: bool = False,
) -> Recipe:
    """Store a file's codes on a neuron's dendritic segments and compare its errors with the closed forms.

    Recognise iff |D and A| >= theta. FP = sum_{b >= theta} C(s, b) C(n - s, a - b) / C(n, a); FN = P(Bin(s, 1 - nu) <
    theta); M codes on a segment take n (1 - (1 - s / n)^M) synapses; the neuron errs as 1 - (1 - FP)^segments. The
    model is `neurograft.networks.dendritic_neuron`; the data are rows of `codes`, 0 or 1 [n], and maybe a `label`.

    Args:
        n: cells: the width of the codes.
        segments: of the neuron.
        s: synapses for each stored code.
        theta: threshold; None for the best one, argmin FP + FN.
        nu: chance that an active cell fails.
        trials: stored codes with failing cells, and foreign codes, that are tried.
        straight_through: make a network that can be trained further.
    """
    options = {"n": n, "segments": segments, "s": s, "theta": min(8, s) if theta is None else theta}
    return Recipe(
        "sdr_dendrites",
        ({"do": "neurograft.pipeline.recognised", "nu": nu, "theta": theta, "trials": trials},),
        paper="sdr-dendrites",
        network=("neurograft.networks.dendritic_neuron", {**options, "straight_through": straight_through}),
    )
