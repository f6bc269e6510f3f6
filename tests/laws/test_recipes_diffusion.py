"""Recipes of diffusion models run on denoisers that their proofs never saw, with a user's arrays, to one graft."""

import sys

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, PixArtTransformer2DModel

import neurograft as ng
from neurograft.cli import main
from neurograft.core.choose import option_names
from neurograft.core.resolve import resolve
from neurograft.worlds.pico import pico

RECIPES = ("cones",)
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


def arrays(images, shape):
    rng = np.random.default_rng(0)
    one = {images: shape, "encoder_hidden_states": (3, 16)}
    both = {**one, **{f"prior_{k}": v for k, v in one.items()}}
    return {name: rng.normal(size=(4, *size)).astype("float32") for name, size in both.items()}


@pytest.mark.parametrize("denoiser", DENOISERS)
@pytest.mark.parametrize("name", RECIPES)
def test_it_runs_from_python_and_the_command_line(name, denoiser, tmp_path, monkeypatch, capsys):
    make, images, shape = DENOISERS[denoiser]
    model, data, target = tmp_path / "pipeline" / "denoiser", tmp_path / "rows.npz", tmp_path / "graft"
    make().save_pretrained(model)
    DDPMScheduler(num_train_timesteps=50).save_pretrained(tmp_path / "pipeline" / "scheduler")
    np.savez(data, **arrays(images, shape))
    mine = option_names(resolve(f"neurograft.recipes.{name}"))
    changes = {k: v for k, v in BRISK.items() if k in mine}
    graft = ng.run(name, str(model), str(data), changes=changes).graft
    assert graft.numel > 0
    assert graft.card["recipe"]["name"] == name
    words = [f"{k}={v}" for k, v in changes.items()]
    monkeypatch.setattr(sys, "argv", ["neurograft", "run", name, str(model), str(data), *words, "-o", str(target)])
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr()
    assert (end.value.code or 0) == 0, printed.err
    same = ng.Graft.load(target)
    assert same.identity == graft.identity
    net = type(make()).from_pretrained(model).eval()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    with same.on(net):
        assert any(not torch.equal(p, before[n]) for n, p in net.named_parameters())
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
