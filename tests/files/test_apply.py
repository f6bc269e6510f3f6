"""`apply`: a base and a stack of grafts become a checkpoint; nothing that was read is changed."""

import hashlib

import pytest
import torch

from neurograft.core.errors import RequestError
from neurograft.core.fingerprint import same_bits
from neurograft.core.grafts.delta import Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.region import Region
from neurograft.pipeline.apply import apply
from neurograft.worlds.pico import pico

UP = "model.layers.0.mlp.up_proj.weight"


def bytes_of(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def made(tmp_path):
    model = pico("llama", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    rows = Slice(Region.of((48, 32), "rows", [3]), torch.full((1, 32), 0.3))
    columns = Slice(Region.of((48, 32), "cols", [1]), torch.full((1, 48), -0.7))
    grafts = [Graft.made(model, {UP: rows}), Graft.made(model, {UP: columns}).scale(0.5)]
    folders = [g.save(tmp_path / f"graft{i}") for i, g in enumerate(grafts)]
    return model, grafts, folders


def test_a_stack_in_any_order_is_the_live_stack(made, tmp_path):
    model, grafts, folders = made
    before = {f: bytes_of(f) for f in (tmp_path / "base", *folders)}
    one = apply(tmp_path / "base", folders, tmp_path / "one")
    two = apply(tmp_path / "base", [grafts[1], str(folders[0])], tmp_path / "two")
    live = apply(model, grafts, tmp_path / "live", shard="10KB")
    assert len(list(live.glob("*.safetensors"))) > 1
    with grafts[0].on(model), grafts[1].on(model):
        wanted = {k: v.clone() for k, v in model.state_dict().items()}
    for folder in (one, two, live):
        found = type(model).from_pretrained(folder).state_dict()
        assert all(same_bits(found[k], wanted[k]) for k in wanted)
    assert {f: bytes_of(f) for f in before} == before
    assert "strength 0.5" in (one / "README.md").read_text()
    assert not same_bits(wanted[UP], model.get_parameter(UP))


def test_bad_requests_write_nothing(made, tmp_path):
    folders = made[2]
    for target, given, words in (
        (None, folders, "-o DIR"),
        (tmp_path / "x", [], "at least one"),
        (tmp_path / "base", folders, "lies in the input"),
        (folders[0] / "sub", folders, "lies in the input"),
        (tmp_path / "x", [folders[0], folders[0]], "second apply"),
        (tmp_path / "x", [tmp_path / "base"], "a graft"),
    ):
        with pytest.raises(RequestError, match=words):
            apply(tmp_path / "base", given, target)
    pico("llama", seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(RequestError, match="other numbers"):
        apply(tmp_path / "other", folders, tmp_path / "x")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("x")
    with pytest.raises(RequestError, match="holds something"):
        apply(tmp_path / "base", folders, tmp_path / "used")
    assert not (tmp_path / "x").exists()
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["mine"]
