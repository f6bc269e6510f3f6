"""Cones: the few attention weights that, shut, make a pretrained diffusion model draw a subject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neurograft.core.card import method
from neurograft.core.errors import RequestError, one_of
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training

# Keys and values of the attention to the prompt, and of all attention, as diffusers' blocks call them.
LAYERS: Mapping[str, Sequence[str]] = {
    "cross": ("*attn2.to_k/weight", "*attn2.to_v/weight"),
    "all": ("*attn1.to_[kv]/weight", "*attn2.to_[kv]/weight"),
}


@method(
    paper="cones",
    kinds={"weight"},
    departs="Images and prompts arrive encoded, as the denoiser takes them. The paper gives no bar tau, so a share of "
    "the weights is shut, unless tau= asks for its way. Which of self- and cross-attention it means is not stated: its "
    "unofficial port takes both, here it is cross-attention unless layers='all'. Which weights move in the few further "
    "steps is inferred: all keys and values that are not shut. The attention guidance for images of several subjects "
    "and the appendix's faster algorithm are not built. On a small UNet one percent shut draws the subject, but the "
    "other classes suffer more than its card allows, and ten percent still draw it; its proof has the numbers.",
)
def cones(
    *,
    layers: str = "cross",
    fraction: float = 0.01,
    tau: float | None = None,
    steps: int = 1000,
    rho: float = 2e-5,
    prior: float = 1.0,
    scheduler: Any = None,
    batch: int = 2,
    tune_steps: int = 0,
    lr: float = 1e-5,
) -> Recipe:
    """Shut the entries of `to_k` and `to_v` with the highest G = sum over steps of theta * dL/dtheta.

    L is DreamBooth's loss, on 3 to 5 images of the subject with a prompt "V* class" and images of the class in the
    columns `prior_*`; theta shrinks meanwhile, see `locators.shutting`. The graft is a mask of the pretrained weights,
    indices and no values: V* should be a word the model knows and hardly uses, for shutting silences an unknown word
    and the loss falls without any subject in it. Too large a share destroys the layer: sweep it upwards from 0.002.
    Several subjects: one run each, then `a + b` of the grafts, which shuts what either does.

    Args:
        layers: "cross" for attention to the prompt (`attn2`), "all" for self-attention too.
        fraction: share of these entries that is shut.
        tau: shut those with G > tau instead.
        steps: backward passes.
        rho: rate at which weights shrink on the path; sweep it where the loss is not of Stable Diffusion's size.
        prior: weight of the class images.
        scheduler: config or folder of the noise; see `objectives.denoising`.
        batch: images in a step, as many again of the class.
        tune_steps: DreamBooth steps with the mask on, for several subjects; 0 for none.
        lr: their learning rate, constant.

    Raises:
        RequestError: unknown layers, a share outside of (0, 1], or fewer than 0 steps of tuning.
    """
    one_of(layers, LAYERS, what="attention to shut")
    if not 0 < fraction <= 1 or tune_steps < 0:
        raise RequestError(
            f"fraction={fraction}, tune_steps={tune_steps}",
            expected="a share in (0, 1], and 0 steps or more",
            do="0.01",
        )
    objective = ("denoising", {"prior": prior, "scheduler": scheduler})
    take: dict[str, Any] = {"fraction": fraction} if tau is None else {"by": ("threshold", {"above": tau})}
    recipe: list[dict[str, Any]] = [
        {
            "do": "locate",
            "by": ("shutting", {"steps": steps, "rho": rho, "batch_size": batch}),
            "units": "weight",
            "match": list(LAYERS[layers]),
            "objective": objective,
            "batch_size": batch,
        },
        {"do": "select", **take},
        {"do": "edit", "by": "shut", "where": "$where"},
    ]
    if tune_steps:
        args = training(lr=lr, epochs=1, batch=batch, warmup=0.0, schedule="constant", max_steps=tune_steps)
        recipe += [
            {"do": "select", "fraction": 1.0, "as": "all"},
            {
                "do": "tune",
                "where": "$all",
                "protect": "$where",
                "objective": objective,
                "args": args,
                "on": "graft",
                "as": "tuned",
            },
            {"do": "neurograft.pipeline.summed", "of": ["graft", "tuned"]},
        ]
    return Recipe("cones", tuple(recipe), paper="cones")
