"""LocFT-BF with ranks for every request: literal gradients, ranks that come off, what then stays."""

import pytest
import torch
from torch.func import functional_call

import neurograft as ng
from neurograft.core.context import Context
from neurograft.edits._separate import Separate
from neurograft.pipeline._edited import answered
from neurograft.pipeline.requests import as_requests
from neurograft.worlds.pico import pico

ASKED = [
    {"prompt": [5, 6, 7, 3], "target_new": [9]},
    {"prompt": [5, 8, 7], "target_new": [10, 11, 12]},
    {"prompt": [12, 13, 14, 15], "target_new": [20]},
]
BY = ("locft_bf", {"separate": True, "lr": 0.02, "epochs": 60, "layers": [1]})
WEIGHTS = {
    "llama": "model.layers.1.mlp.down_proj.weight",
    "gpt2": "transformer.h.0.mlp.c_fc.weight",
    "opt": "model.decoder.layers.1.fc2.weight",
}


@pytest.mark.parametrize("family", WEIGHTS)
def test_each_part_follows_the_loss_of_its_own_request(family):
    model, name = pico(family), WEIGHTS[family]
    requests = as_requests(ASKED, model, None)
    train = Separate(Context(model, {}, requests=requests), "breadth", 0.01, 1, 64, 1e-2, True)
    with train.at(name) as weight:
        train.fit(weight, requests)
        assert train.ranks(requests) == [2, 4, 2]
        train.now = torch.randn(train.now.shape, generator=torch.Generator().manual_seed(0)) / 10
        with torch.no_grad():
            weight.copy_(train.laid(train.now))
        loss, gradient = train.traced(weight, requests)
        found = gradient()
        turned = family == "gpt2"
        start, whole = train.start, 0.0
        for row, request, span in zip(ASKED, requests, train.spans.values()):
            ids = torch.tensor([[*row["prompt"], *row["target_new"], request.end]])
            free = train.now.clone().requires_grad_(True)
            product = free @ train.keys
            changed = {name: start + (product.T if turned else product)}
            logp = functional_call(model, changed, kwargs={"input_ids": ids}).logits[0].log_softmax(-1)
            first = len(row["prompt"]) - 1
            own = -logp[torch.arange(first, ids.shape[1] - 1), ids[0, first + 1 :]].mean() / 3
            (slope,) = torch.autograd.grad(own, free)
            torch.testing.assert_close(found[:, span], slope[:, span], rtol=1e-3, atol=1e-6)
            whole += float(own.detach())
        assert abs(whole - float(loss.detach())) < 1e-5


def test_a_first_step_moves_an_answer_as_far_as_one_of_adam_on_the_whole_matrix():
    """For a single key: what leaves the matrix there moves by lr * |key|_1 everywhere, up or down."""
    model, ask = pico("llama"), [{"prompt": [5, 6, 7], "target_new": [9]}]
    options = {"lr": 0.01, "epochs": 1, "layers": [1], "eos": False}
    keys, moved = [], []
    module = model.model.layers[1].mlp.down_proj
    hook = module.register_forward_pre_hook(lambda m, x: keys.append(x[0][0, 2].detach()))
    model(torch.tensor([[5, 6, 7, 9]]))
    hook.remove()
    for separate in (True, False):
        with ng.edit(model, ask, by=("locft_bf", {**options, "separate": separate})).on(model):
            moved.append(module(keys[0]).detach())
        moved[-1] = moved[-1] - module(keys[0]).detach()
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(moved[0].abs(), 0.01 * keys[0].abs().sum().expand(32), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_single_edit_comes_off_and_the_others_stay_to_the_bit(family, tmp_path):
    model = pico(family)
    requests = as_requests(ASKED, model, None)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    graft = ng.Graft.load(ng.edit(model, ASKED, by=BY).save(tmp_path / "edit"))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    ((name, whole),) = graft.deltas.items()
    assert graft.card["ranks"] == [2, 4, 2]
    with graft.on(model):
        assert answered(model, requests).tolist() == [True] * 3
    for i, kept in ((0, [2, 3, 4, 5, 6, 7]), (1, [0, 1, 6, 7]), (2, [0, 1, 2, 3, 4, 5])):
        rest = ng.rollback(graft, [i])
        assert torch.equal(rest.deltas[name].A, whole.A[kept])
        assert torch.equal(rest.deltas[name].B, whole.B[:, kept])
        with rest.on(model):
            assert answered(model, requests).tolist() == [j != i for j in range(3)]
    last = ng.rollback(ng.rollback(graft, [0]), [0])
    assert (last.card["ranks"], last.card["requests"][0]["target"]) == ([2], [20])
    assert last.identity == ng.rollback(graft, [1, 0]).identity


def test_batches_and_earlier_edits_keep_their_own_ranks():
    model = pico("llama")
    one_by_one = ng.edit(model, ASKED, by=BY, batch=1)
    assert (one_by_one.card["ranks"], one_by_one.card["batches"]) == ([2, 4, 2], [1, 1, 1])
    first = ng.edit(model, ASKED[:1], by=BY)
    ((name, delta),) = ng.rollback(one_by_one, [1, 2]).deltas.items()
    torch.testing.assert_close(delta.product(), first.deltas[name].product())
    second = ng.edit(model, ASKED[1:2], by=BY, after=first)
    ((_, delta),) = ng.rollback(one_by_one, [0, 2]).deltas.items()
    torch.testing.assert_close(delta.product(), second.deltas[name].product(), rtol=1e-4, atol=1e-6)


def test_the_whole_matrix_says_how_it_could_have_been_taken_back():
    model = pico("llama")
    with pytest.raises(ng.RequestError, match="separate=True"):
        ng.rollback(ng.edit(model, ASKED, by=("locft_bf", {"epochs": 1})), [0])
    graft = ng.run("locft_bf", model, ASKED, changes={"epochs": 1, "separate": True, "order": "depth"}).graft
    assert len(ng.rollback(graft, [0]).card["requests"]) == 2
    swept = ng.edit(model, ASKED, by=("locft_bf", {"epochs": 2, "separate": True, "sweep": 2}))
    assert (len(swept.card["sweep"]), swept.card["ranks"]) == (6, [2, 4, 2])
