"""Laws of recipes about networks of their own: each runs on a second configuration and on a user's array file."""

import numpy as np
import pytest
import torch
from tests._command import graft_of_command

import neurograft as ng
from neurograft.core.resolve import resolve
from neurograft.pipeline.papers import card
from neurograft.pipeline.recipe import recipe, recipes
from neurograft.worlds.faces import faces

NAMES = [name for name in recipes() if recipe(name).network is not None]


def codes():
    """Twelve codes of 16 active cells out of 300."""
    order = torch.rand(12, 300, generator=torch.Generator().manual_seed(0)).argsort(1).argsort(1)
    return {"codes": (order < 16).numpy().astype(np.uint8)}


def scenes():
    """Eighty scenes with a face of four parts."""
    made = faces(80, attributes=4, world=9)
    return {name: getattr(made, name).numpy() for name in ("pixel_values", "labels", "identity")}


SHORT = {"lnet_steps": 2, "identity_steps": 2, "attribute_steps": 2, "batch": 16}
# recipe -> the options of a network that its proof does not use, and the arrays of a file
SECOND = {
    "lnet_anet": ({"labels": 4, "identities": 16, "windows": [24], "stride": 8, **SHORT}, scenes),
    "sdr_dendrites": ({"n": 300, "segments": 3, "s": 9, "nu": 0.1}, codes),
}


def test_every_recipe_without_a_task_that_names_a_network_is_here():
    assert set(NAMES) == set(SECOND)
    assert not any(card(name).task for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_on_a_second_configuration_with_an_array_file(name, tmp_path):
    changes, arrays = SECOND[name]
    np.savez(tmp_path / "data.npz", **arrays())
    network, options = recipe(name, **changes).network
    out = ng.run(name, network, str(tmp_path / "data.npz"), changes=changes)
    assert out.graft.numel > 0
    assert out.graft.card["recipe"]["name"] == name
    live = resolve(network)(**options)
    before = {n: p.detach().clone() for n, p in live.named_parameters()}
    assert ng.run(name, live, str(tmp_path / "data.npz"), changes=changes).graft.identity == out.graft.identity
    assert all(torch.equal(p, before[n]) for n, p in live.named_parameters())
    same = graft_of_command(name, network, tmp_path / "data.npz", changes, tmp_path / "graft")
    assert same.identity == out.graft.identity
    with same.on(live):
        assert any(not torch.equal(p, before[n]) for n, p in live.named_parameters())
    assert all(torch.equal(p, before[n]) for n, p in live.named_parameters())


def test_a_network_that_is_none_is_refused(tmp_path):
    np.savez(tmp_path / "data.npz", **codes())
    with pytest.raises(ng.RequestError, match="cannot be made so"):
        ng.run("sdr_dendrites", "neurograft.networks.dendritic_segment", str(tmp_path / "data.npz"))
    with pytest.raises(ng.RequestError, match="did you mean"):
        ng.run("sdr_dendrites", "neurograft.networks.dendritic", str(tmp_path / "data.npz"))
