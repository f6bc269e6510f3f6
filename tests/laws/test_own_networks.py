"""Law of recipes for networks of their own: each runs on a user's array file, on a second shape of its network.

Through `ng.run` and through the command line, without a model and with one by its dotted path.
"""

import sys

import numpy as np
import pytest
import torch

import neurograft as ng
from neurograft.cli import main
from neurograft.core.errors import RequestError
from neurograft.core.resolve import resolve
from neurograft.pipeline.models import load_model
from neurograft.pipeline.recipe import recipe, recipes
from neurograft.worlds.faces import faces


def scenes():
    made = faces(80, attributes=4, world=9)
    return {"pixel_values": made.pixel_values, "labels": made.labels, "identity": made.identity}


OWN = [name for name in recipes() if recipe(name).network is not None]
# recipe: options that make its second network and run briefly, and the arrays of a user's file
SECOND = {
    "lnet_anet": (
        {
            "labels": 4, "identities": 16, "windows": [24], "stride": 8, "localise": "threshold", "towards": "pairs",
            "lnet_steps": 2, "identity_steps": 2, "attribute_steps": 2, "batch": 16,
        },
        scenes,
    ),
}  # fmt: skip


def test_every_recipe_with_a_network_of_its_own_is_held_to_the_law():
    assert set(OWN) == set(SECOND)


@pytest.mark.parametrize("name", OWN)
def test_it_runs_on_a_users_arrays_from_python_and_the_command_line(name, tmp_path, monkeypatch, capsys):
    changes, arrays = SECOND[name]
    data = tmp_path / "data.npz"
    np.savez(data, **{k: v.numpy() for k, v in arrays().items()})
    graft = ng.run(name, None, str(data), changes=changes).graft
    assert graft.numel > 0
    assert graft.card["recipe"]["name"] == name
    words = [f"{k}={v}" for k, v in changes.items()]
    target = tmp_path / "graft"
    monkeypatch.setattr(sys, "argv", ["neurograft", "run", name, str(data), *words, "-o", str(target)])
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr()
    assert (end.value.code or 0) == 0, printed.err
    same = ng.Graft.load(target)
    assert same.identity == graft.identity
    net = load_model({"network": recipe(name, **changes).network})
    inputs = {k: torch.as_tensor(v[:4]) for k, v in arrays().items() if k == "pixel_values"}
    with torch.no_grad():
        said = net(**inputs).logits
        with same.on(net):
            assert not torch.equal(net(**inputs).logits, said)
        assert torch.equal(net(**inputs).logits, said)


def test_a_network_is_made_by_its_dotted_path():
    one, two = load_model("neurograft.networks.lnet", seed=3), load_model({"network": ["neurograft.networks.lnet", {}]})
    assert type(one) is type(two) is resolve("neurograft.networks.lnet.LNet")
    assert not torch.equal(one.tags.weight, two.tags.weight)
    for model, match in (
        ({"network": ["neurograft.networks.lnet", {"label": 3}]}, "labels"),
        ({"net": 1}, "dotted path"),
        ("neurograft.core.seeds.derive", "all it needs"),
        ("neurograft.networks.lent", "lent"),
    ):
        with pytest.raises(RequestError, match=match):
            load_model(model)
    with pytest.raises(RequestError, match="no model"):
        ng.run("dft", None, [{"text": "a"}])
