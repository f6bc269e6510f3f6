"""Recipes of diffusion models run on denoisers that their proofs never saw, with a user's arrays, to one graft."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, PixArtTransformer2DModel
from tests._command import graft_of_command

import neurograft as ng
from neurograft.core.choose import option_names
from neurograft.core.resolve import resolve
from neurograft.worlds.pico import pico

# Recipes for denoisers, and what is asked of those that are not for denoisers alone.
ASKED = {"tune.objective": "denoising", "epochs": 1, "warmup": 0.0, "lr": 1e-2}
RECIPES = {
    "cones": {},
    "block_expansion": ASKED,
    "sara": {**ASKED, "t": 2e-2, "rank_weight": 0.0},
    "sct": {**ASKED, "place": "mlp", "skip": 0},
}
BRISK = {"steps": 2, "batch": 4}


def transformer():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
            norm_num_groups=1, cross_attention_dim=16, caption_channels=16, sample_size=4, patch_size=2,
            use_additional_conditions=False,
        )  # fmt: skip


# name: (model, what it calls images, their shape)
DENOISERS = {
    "unet": (lambda: pico("unet"), "sample", (4, 8, 8)),
    "pixart": (transformer, "hidden_states", (4, 4, 4)),
}


def arrays(name, images, shape):
    """What locators of activations run on says the time of the noise too; the objective draws its own."""
    rng = np.random.default_rng(0)
    one = {images: shape, "encoder_hidden_states": (3, 16)}
    both = {**one, **({f"prior_{k}": v for k, v in one.items()} if name == "cones" else {})}
    made = {column: rng.normal(size=(4, *size)).astype("float32") for column, size in both.items()}
    return made if name == "cones" else {**made, "timestep": np.array([3, 7, 11, 15])}


@pytest.mark.parametrize("denoiser", DENOISERS)
@pytest.mark.parametrize("name", RECIPES)
def test_it_runs_from_python_and_the_command_line(name, denoiser, tmp_path):
    make, images, shape = DENOISERS[denoiser]
    model, data = tmp_path / "pipeline" / "denoiser", tmp_path / "rows.npz"
    make().save_pretrained(model)
    DDPMScheduler(num_train_timesteps=50).save_pretrained(tmp_path / "pipeline" / "scheduler")
    np.savez(data, **arrays(name, images, shape))
    mine = option_names(resolve(f"neurograft.recipes.{name}"))
    changes = {k: v for k, v in BRISK.items() if k in mine} | RECIPES[name]
    graft = ng.run(name, str(model), str(data), changes=changes).graft
    assert graft.numel > 0
    assert graft.card["recipe"]["name"] == name
    same = graft_of_command(name, model, data, changes, tmp_path / "graft")
    assert same.identity == graft.identity
    net = type(make()).from_pretrained(model).eval()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    made = {k: torch.from_numpy(v) for k, v in arrays(name, images, shape).items() if not k.startswith("prior_")}
    given = {**made, "timestep": torch.tensor([3, 7, 11, 15])}
    with torch.no_grad():
        said = net(**given)[0]
        with same.on(net):
            assert any(not torch.equal(p, before[n]) for n, p in net.named_parameters()) is bool(same.deltas)
            assert not torch.equal(net(**given)[0], said)
        assert torch.equal(net(**given)[0], said)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
