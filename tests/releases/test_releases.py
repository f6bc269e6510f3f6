"""A file of every released format is read, and does what it did when it was written."""

import importlib.util
from pathlib import Path

import pytest
import torch

from neurograft.core.fingerprint import same_bits
from neurograft.core.grafts.graft import Graft
from neurograft.core.grafts.packing import FORMAT

HERE = Path(__file__).parent
FORMATS = sorted(p.name for p in HERE.glob("format*") if p.is_dir())


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make_release", HERE / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_present_format_is_among_them():
    assert f"format{FORMAT}" in FORMATS


@pytest.mark.parametrize("name", FORMATS)
def test_an_old_file_still_does_what_it_did(name, make):
    graft, model = Graft.load(HERE / name), make.Net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    shared = model.head.weight
    with graft.on(model):
        assert model.embed.weight[9].tolist() == [-0.25, -0.125, 0.0, 0.125, 0.25, 0.375]
        assert model.experts[1, :, 1].tolist() == [-0.5, -0.375, -0.25, -0.125]
        assert model.experts[0, :, 0].tolist() == [-1.0, -0.875, -0.75, -0.625]
        assert model.head.weight[0, 3] == -1.0
        assert model.head.weight[9, 5] == -0.875
        assert model.head.weight is not model.embed.weight
        # + 0.5 * ones(4, 2) @ eye(2, 6): half is added to the first two columns
        assert torch.equal(model.low.weight, before["low.weight"] + torch.tensor([0.5, 0.5, 0, 0, 0, 0]))
        assert model.mix.weight[0, :2].tolist() == [-1.0, -0.875]
        assert model.mix.weight[4:, 4:].tolist() == [[-0.5, -0.375], [-0.25, -0.125]]
        assert model.wide.weight.view(-1)[[0, 1, 300, 2399]].tolist() == [-1.0, -0.875, -0.75, -0.625]
        assert model.fresh.bias.tolist() == [0.5, -0.5]
    assert model.head.weight is shared
    assert all(same_bits(v, before[k]) for k, v in model.state_dict().items())
    assert graft.card["note"] == name.replace("format", "format ")


def test_what_is_written_now_is_the_checked_in_file_of_this_format(make, tmp_path):
    """The format of a release does not drift: same tensors, same text but for versions."""
    folder = make.graft(make.Net()).save(tmp_path / "now")
    assert (folder / "graft.safetensors").read_bytes() == (HERE / f"format{FORMAT}" / "graft.safetensors").read_bytes()
    assert Graft.load(folder).identity == Graft.load(HERE / f"format{FORMAT}").identity
