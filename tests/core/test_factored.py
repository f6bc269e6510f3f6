"""Low-rank changes of chosen rows: either orientation of a weight, and what has no factors."""

import pytest
import torch

from neurograft.anatomy.roles import with_roles
from neurograft.anatomy.sites import sites
from neurograft.core.errors import RequestError, RunError
from neurograft.core.grafts.delta import LowRank
from neurograft.core.selection import Selection
from neurograft.pipeline.attach import attach
from neurograft.train.loop import fit
from neurograft.worlds.pico import pico, pico_batch


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["row", "column"])
@pytest.mark.parametrize("ids", [[1, 4, 9], None])
def test_the_graft_gives_what_was_trained(family, kind, ids):
    model = pico(family)
    batch = pico_batch(model)
    name, site = next(iter(with_roles(model, sites(model, kind), ["down"]).items()))
    where = Selection.of({name: site}, {name: range(site.n) if ids is None else ids})
    part = site.parts[0]
    before = model.get_parameter(part.param).detach().clone()
    with attach(model, where, adapter=("slice_lora", {"rank": 2})) as live:
        fit(live, [batch], steps=3, lr=1e-2)
        change = model.get_parameter(part.param).detach() - before
        graft = live.graft()
    outside = torch.ones_like(before, dtype=torch.bool).reshape(-1)
    outside[part.flat(where.ids[name]).reshape(-1)] = False
    assert not change.reshape(-1)[outside].any()
    assert change.reshape(-1)[~outside].any()
    delta = next(d for d in graft.deltas.values() if isinstance(d, LowRank))
    assert delta.A.shape[0] == 2
    torch.testing.assert_close(delta.product(), change, rtol=1e-3, atol=1e-6)
    assert torch.equal(model.get_parameter(part.param), before)


def test_a_rank_is_no_larger_than_the_rows():
    model = pico("llama")
    name, site = next(iter(with_roles(model, sites(model, "row"), ["down"]).items()))
    with attach(model, Selection.of({name: site}, {name: [5, 6]}), adapter=("slice_lora", {"rank": 8})) as live:
        (theta,) = live.parameters()
        assert theta.shape == (2 + 48, 2)


def test_foreign_numbers_and_other_shapes_are_refused():
    model = pico("llama")
    name, site = next(iter(with_roles(model, sites(model, "row"), ["down"]).items()))
    where = Selection.of({name: site}, {name: [5, 6]})
    with attach(model, where, adapter="slice_lora"):
        state = {n: v.clone() for n, v in model.state_dict().items()}
        model.load_state_dict(state)  # what it holds already
        state[site.parts[0].param][5] += 1.0
        with pytest.raises(RunError, match="low-rank"):
            model.load_state_dict(state)
    blocks = sites(model, "block", block=(8, 8), match=name.replace("/row", "/block"))
    with pytest.raises(RequestError, match="whole rows or columns"):
        attach(model, Selection.of(blocks, {next(iter(blocks)): [0]}), adapter="slice_lora")
    with pytest.raises(RequestError, match="positive rank"):
        attach(model, where, adapter=("slice_lora", {"rank": 0}))
