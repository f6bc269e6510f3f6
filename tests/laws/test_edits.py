"""Laws of the room `edits`, over every method found in its folder."""

import pytest
import torch

from neurograft.anatomy.sites import sites
from neurograft.core.choose import choose, methods, option_names
from neurograft.core.errors import RequestError
from neurograft.core.selection import Selection
from neurograft.pipeline.edit import edit
from neurograft.pipeline.rollback import part, rollback
from neurograft.worlds.pico import pico, pico_batch

ASKED = [
    {"prompt": [5, 6, 7, 3], "subject": [6], "target_new": [9], "rephrase": [[6, 7, 3], [7, 6]], "locality": [8, 9]},
    {"prompt": [5, 8, 7], "subject": [8], "target_new": [10, 11]},
]
ASKING = [name for name in methods("edits") if "requests" in choose("edits", name).card.needs]
CASES = [(name, family) for name in ASKING for family in ("llama", "gpt2")]


def quick(name):
    """A method with the cheapest setting of what it lets one choose."""
    cheap = {"steps": 2, "epochs": 1, "iterations": 4}
    known = option_names(choose("edits", name).function)
    return choose("edits", name, **{k: v for k, v in cheap.items() if k in known})


def trace(model):
    return {
        "bits": {n: p.detach().clone() for n, p in model.named_parameters()},
        "rest": [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "flags": [(p.requires_grad, p.grad is None) for p in model.parameters()],
    }


def same(a, b):
    bits = all(torch.equal(a["bits"][n], b["bits"][n]) for n in a["bits"])
    return bits and a["rest"] == b["rest"] and a["flags"] == b["flags"]


@pytest.mark.parametrize(("name", "family"), CASES)
def test_the_model_is_left_as_found_and_the_graft_comes_off(name, family):
    model = pico(family).train()
    next(model.parameters()).requires_grad_(False)
    before, random = trace(model), torch.get_rng_state()
    graft = edit(model, ASKED, by=quick(name), seed=3)
    assert same(before, trace(model))
    assert torch.equal(torch.get_rng_state(), random)
    assert [r["target"] for r in graft.card["requests"]] == [[9], [10, 11]]
    assert {"reliability", "rephrase", "locality"} <= graft.card.keys()
    with graft.on(model):
        assert not same(before, trace(model))
    assert same(before, trace(model))
    assert edit(model, ASKED, by=quick(name), seed=3).identity == graft.identity


@pytest.mark.parametrize(("name", "family"), CASES)
def test_requests_come_apart_where_that_is_claimed(name, family):
    model = pico(family)
    graft = edit(model, ASKED, by=quick(name))
    if "separable" not in choose("edits", name).card.claims:
        with pytest.raises(RequestError, match="share"):
            part(graft, [0])
        return
    one, rest = part(graft, [1]), rollback(graft, [1])
    for tensor, delta in graft.deltas.items():
        total = one.deltas[tensor].product() + rest.deltas[tensor].product()
        torch.testing.assert_close(total, delta.product(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", methods("edits"))
def test_no_request_is_refused(name):
    with pytest.raises(RequestError):
        edit(pico("llama"), [], by=name)


@pytest.mark.parametrize("name", sorted(set(methods("edits")) - set(ASKING)))
def test_edits_of_data_alone_leave_the_model_and_come_off(name):
    model = pico("llama").train()
    before, data = trace(model), [pico_batch(model, seed=i) for i in range(4)]
    kind = min(choose("edits", name).card.kinds)
    found = sites(model, kind, at="residual" if kind == "layer" else None)
    where = Selection.of(found, {next(iter(found)): [0]})
    graft = edit(model, data, by=quick(name), where=where)
    assert same(before, trace(model))
    with torch.no_grad():
        plain = model.eval()(**data[0]).logits
        with graft.on(model):
            assert not torch.equal(model(**data[0]).logits, plain)
        assert torch.equal(model(**data[0]).logits, plain)
    with pytest.raises(RequestError, match="no selection"):
        edit(model, data, by=name)
