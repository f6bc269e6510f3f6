"""What a diffusion model is trained for: to say which noise was added."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurograft.core.card import method
from neurograft.core.context import Step
from neurograft.core.errors import RequestError, extra, one_of
from neurograft.core.fingerprint import digest
from neurograft.core.seeds import generator

PRIOR = "prior_"
IMAGES = ("sample", "hidden_states")
# Stable Diffusion's noise, for a denoiser that stands alone.
STANDARD: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


@method(
    paper="cones",
    needs={"gradients"},
    claims={"denoising"},
    departs="Times and noises come from a generator named by the step and the rows, so that a resumed training meets "
    "the same ones, and evaluation always the same.",
)
def denoising(step: Step, *, prior: float = 1.0, scheduler: Any = None, seed: int = 0) -> Tensor:
    """Return mean ||eps - eps_theta(x_t, t, c)||^2 over the rows, and `prior` times the same over their prior images.

    x_t = sqrt(a_t) x + sqrt(1 - a_t) eps with eps ~ N(0, 1), t uniform and a_t of the scheduler; where that predicts
    "v_prediction" or "sample", the target is sqrt(a_t) eps - sqrt(1 - a_t) x or x. With images of a subject in the
    rows and images of its class in the columns `prior_*`, this is DreamBooth's loss, Cones' concept-implanting loss.

    Args:
        step: the batch: `sample` (or `hidden_states`, as the denoiser calls it) holds clean images or latents
            [B, C, H, W], the other columns what it is told, such as `encoder_hidden_states` [B, T, D]. A column
            `prior_<name>` takes the place of <name> for the prior image; without `prior_sample` there is none.
        prior: weight of the prior images.
        scheduler: noise: a config of `diffusers.DDPMScheduler`, or the folder of one; None for the one beside the
            model's folder (`../scheduler`), or Stable Diffusion's if there is none.
        seed: names times and noises.

    Raises:
        RequestError: no images, a scheduler that is none, or prior columns without images.
    """
    columns = {**step.batch, **step.extra}
    own = {k: v for k, v in columns.items() if not k.startswith(PRIOR)}
    other = {k.removeprefix(PRIOR): v for k, v in columns.items() if k.startswith(PRIOR)}
    noise = scheduled(step.model, scheduler)
    name = next((n for n in IMAGES if n in own), None)
    if name is None or (other and name not in other):
        raise RequestError(
            f"a batch of {', '.join(columns)}",
            expected=f"clean images as `{name or IMAGES[0]}`" + (f", and `{PRIOR}{name}`" if other else ""),
            do="give rows with the columns that the denoiser takes",
        )
    loss = _loss(step, own, name, noise, seed)
    return loss + prior * _loss(step, {**own, **other}, name, noise, seed) if other and prior else loss


def _loss(step: Step, columns: Mapping[str, Any], name: str, noise: Any, seed: int) -> Tensor:
    clean: Tensor = columns[name]
    rng = generator(seed, "denoising", step.step, digest({name: clean.detach().cpu()}))
    eps = torch.randn(clean.shape, generator=rng).to(clean)
    times = torch.randint(len(noise.alphas_cumprod), (len(clean),), generator=rng).to(clean.device)
    noisy = noise.add_noise(clean, eps, times)
    said = step.call(**{**columns, name: noisy, "timestep": times})
    said = said.sample if hasattr(said, "sample") else said[0]
    if said.shape[1] == 2 * clean.shape[1]:
        said = said[:, : clean.shape[1]]  # the rest says how sure it is
    kind = one_of(noise.config.prediction_type, ("epsilon", "v_prediction", "sample"), what="prediction of a scheduler")
    wanted = clean if kind == "sample" else eps if kind == "epsilon" else noise.get_velocity(clean, eps, times)
    return F.mse_loss(said if said.dtype == torch.float64 else said.float(), wanted.to(said.dtype).to(said.device))


def scheduled(model: nn.Module, scheduler: Any = None) -> Any:
    """Return the `diffusers.DDPMScheduler` of a denoiser; see `denoising`.

    Raises:
        RequestError: diffusers is missing, or the folder or the config is no scheduler's.

    Example:
        >>> scheduled(nn.Identity(), {"num_train_timesteps": 100}).config.num_train_timesteps
        100
    """
    with extra("diffusers", what="a loss of diffusion"):
        from diffusers import DDPMScheduler
    if scheduler is None:
        home = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
        beside = Path(home).resolve().parent / "scheduler"
        scheduler = beside if home and (beside / "scheduler_config.json").is_file() else STANDARD
    if isinstance(scheduler, Mapping):
        known = set(inspect.signature(DDPMScheduler.__init__).parameters) - {"self"}
        for field in scheduler:
            if not str(field).startswith("_"):
                one_of(field, known, what="field of a scheduler")
        return DDPMScheduler(**{k: v for k, v in scheduler.items() if k in known})
    if not (Path(scheduler) / "scheduler_config.json").is_file():
        raise RequestError(
            f"scheduler={str(scheduler)!r}, where no scheduler_config.json is",
            expected="a scheduler's folder, or its config",
            do="give the folder `scheduler` of the pipeline, or {'num_train_timesteps': 1000, ...}",
        )
    return DDPMScheduler.from_pretrained(str(scheduler))
