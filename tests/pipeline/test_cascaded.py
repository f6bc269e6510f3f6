"""The cascade's recipe on another shape of its network and a user's array file, from Python and the command line."""

import numpy as np
import pytest
import torch
from tests._command import graft_of_command

import neurograft as ng
from neurograft.networks.cascade import Cascade
from neurograft.worlds.faces import faces

NETWORK = "neurograft.networks.cascade"
SHAPE = {"labels": 4, "identities": 16, "windows": [24], "stride": 8, "localise": "threshold"}
BRIEF = {"towards": "pairs", "lnet_steps": 2, "identity_steps": 2, "attribute_steps": 2, "batch": 16}


def file(path, count=80, without=(), **changes):
    made = faces(count, attributes=4, world=9)
    arrays = {"pixel_values": made.pixel_values, "labels": made.labels, "identity": made.identity, **changes}
    np.savez(path / "data.npz", **{k: v.numpy() for k, v in arrays.items() if k not in without})
    return str(path / "data.npz"), made


def test_it_runs_from_python_and_the_command_line_to_one_graft(tmp_path):
    data, made = file(tmp_path)
    net = Cascade(**SHAPE)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    out = ng.run("lnet_anet", net, data, changes={**SHAPE, **BRIEF})
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    assert out.graft.card["recipe"]["name"] == "lnet_anet"
    assert len(out.state["accuracy"]) == len(out.state["readouts"]) == len(out.state["concepts"]["concepts"]) == 4
    assert ng.run("lnet_anet", NETWORK, data, changes={**SHAPE, **BRIEF}).graft.identity == out.graft.identity
    same = graft_of_command("lnet_anet", NETWORK, data, {**SHAPE, **BRIEF}, tmp_path / "graft")
    assert same.identity == out.graft.identity
    with torch.no_grad(), same.on(net):
        moved = {n.split(".")[0] for n, p in net.named_parameters() if not torch.equal(p, before[n])}
        assert moved == {"lnets", "anet", "svm"}
        assert net(made.pixel_values[:4]).logits.abs().sum() > 0
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_identities_may_lie_in_another_file_or_be_left_out(tmp_path):
    data, _ = file(tmp_path, without=("identity",))
    (tmp_path / "other").mkdir()
    other, _ = file(tmp_path / "other", without=("labels",))
    given = {**BRIEF, "identity_data": other}
    assert "concepts" in ng.run("lnet_anet", Cascade(**SHAPE), data, changes=given).state
    out = ng.run("lnet_anet", Cascade(**SHAPE), data, changes={**BRIEF, "pretrain": False})
    assert "concepts" not in out.state
    with pytest.raises(ng.RequestError, match="rows without identity"):
        ng.run("lnet_anet", Cascade(**SHAPE), data, changes=BRIEF)


def test_what_does_not_fit_is_said(tmp_path):
    data, made = file(tmp_path)
    for model, changes, match in (
        (torch.nn.Linear(2, 2), {}, "expected a cascade"),
        (Cascade(**{**SHAPE, "labels": 3}), {}, "for 3 attributes"),
        (Cascade(**{**SHAPE, "identities": 2}), {}, "identities from"),
        (Cascade(**SHAPE), {"held": 0.0}, "held back"),
    ):
        with pytest.raises(ng.RequestError, match=match):
            ng.run("lnet_anet", model, data, changes={**BRIEF, **changes})
    data, _ = file(tmp_path, labels=2 * made.labels - 1)
    with pytest.raises(ng.RequestError, match="labels from -1 to 1"):
        ng.run("lnet_anet", Cascade(**SHAPE), data, changes=BRIEF)
    alike = torch.ones_like(made.labels)
    data, _ = file(tmp_path, labels=alike)
    with pytest.raises(ng.RequestError, match="attribute 0, which all"):
        ng.run("lnet_anet", Cascade(**SHAPE), data, changes=BRIEF)
    with pytest.raises(ng.RequestError, match="windows that shrink"):
        Cascade(windows=(20, 24))
