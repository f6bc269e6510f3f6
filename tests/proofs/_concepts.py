"""A small diffusion model that draws shapes, and how well it draws a subject it has never seen."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurograft.core.seeds import generator
from neurograft.worlds.shapes import NOISE, SUBJECTS, denoiser, shapes
from tests.proofs._tools import rows_in

WORDS = {"checkered": "rare0", "dotted": "rare1"}


def subject(name: str, count: int = 5) -> list[dict[str, Tensor]]:
    """Return rows of a subject under its rare word, each with a prior image of its class."""
    own = shapes(name, word=WORDS[name], count=count, seed=20)
    other = shapes(SUBJECTS[name][0], count=count, seed=21)
    batch = {**own, **{f"prior_{k}": v for k, v in other.items()}}
    return rows_in(batch)


def noise_loss(model: nn.Module, batch: Mapping[str, Tensor], rng: torch.Generator) -> Tensor:
    """Return the mean squared error of the noise that a model says was added."""
    from diffusers import DDPMScheduler

    clean = batch["sample"]
    eps = torch.randn(clean.shape, generator=rng)
    times = torch.randint(NOISE["num_train_timesteps"], (len(clean),), generator=rng)
    noisy = DDPMScheduler(**NOISE).add_noise(clean, eps, times)
    return F.mse_loss(model(noisy, times, encoder_hidden_states=batch["encoder_hidden_states"]).sample, eps)


@cache
def trained(seed: int, steps: int = 800, lr: float = 2e-3, batch: int = 32) -> nn.Module:
    """Return a UNet2DConditionModel that draws six shapes; shared, to be left as found."""
    model, rng = denoiser(seed), generator(seed, "cones training")
    pool = shapes(count=4096, seed=1000 + seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 50, (steps - step) / (0.5 * steps))
        rows = torch.randint(len(pool["sample"]), (batch,), generator=rng)
        noise_loss(model, {k: v[rows] for k, v in pool.items()}, rng).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def losses(model: nn.Module, draws: int = 4) -> dict[str, float]:
    """Return the loss on new pictures: of each subject under its word, under its class alone, and of the classes."""
    asked = {name: shapes(name, word=word, count=64, seed=6) for name, word in WORDS.items()}
    asked |= {f"{name} as its class": shapes(name, count=64, seed=6) for name in WORDS}
    asked["classes"] = shapes(count=96, seed=5)
    rngs = {name: generator(0, "cones losses") for name in asked}
    return {n: sum(float(noise_loss(model, b, rngs[n])) for _ in range(draws)) / draws for n, b in asked.items()}
