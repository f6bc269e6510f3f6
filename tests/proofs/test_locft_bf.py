"""LocFT-BF: shuffled edits against one after another, an end to every answer, a place found by trying."""

from contextlib import contextmanager
from functools import cache

import pytest
import torch

from neurograft.core.context import Context, Step
from neurograft.core.resolve import resolve
from neurograft.edits._places import places
from neurograft.edits._training import Training
from neurograft.pipeline._edited import answered
from neurograft.pipeline.edit import edit
from neurograft.pipeline.requests import as_requests
from neurograft.pipeline.rollback import part
from neurograft.pipeline.run import run
from neurograft.worlds.facts import facts
from neurograft.worlds.pico import pico
from tests.proofs import bar, effect, note, patched
from tests.proofs._tools import moved, snapshot

PAPER, SCALE = "locft-bf", "identity"


@contextmanager
def edits_come_one_after_another():
    """The order is depth-first whatever was asked."""
    fit = resolve("neurograft.edits._training.Training").fit

    def depth(self, weight, requests):
        self.order = "depth"
        return fit(self, weight, requests)

    with patched(resolve("neurograft.edits._training.Training"), "fit", depth):
        yield


@contextmanager
def answers_have_no_end():
    """No end of the answer is asked for."""
    plain = resolve("neurograft.core.prompts.requests.joined")
    with patched("neurograft.edits._training", "joined", lambda r, eos=False, **more: plain(r, **more)):
        yield


@contextmanager
def tokens_count_alike():
    """The loss is a mean over all tokens of a batch, so that long targets outweigh short ones."""

    def loss(self, batch):
        rows = resolve("neurograft.core.prompts.requests.joined")(batch, eos=self.eos)
        return Step(self.model, rows.batch).log_probs.neg().mean()

    with patched(resolve("neurograft.edits._training.Training"), "loss", loss):
        yield


BROKEN = (edits_come_one_after_another, answers_have_no_end, tokens_count_alike)

ASKED = [
    {"prompt": [5, 6, 7, 3], "target_new": [9]},
    {"prompt": [5, 8, 7], "target_new": [10, 11, 12]},
    {"prompt": [12, 13, 14, 15], "target_new": [20]},
]


def training(model, rows=ASKED, **options):
    requests = as_requests(rows, model, None)
    usual = {"order": "breadth", "lr": 0.01, "epochs": 2, "together": 64, "enough": 1e-2, "eos": True}
    return Training(Context(model, {}, requests=requests), **{**usual, **options}), requests


def test_the_loss_is_a_mean_over_requests_of_means_over_their_tokens():
    model = pico("llama")
    train, requests = training(model)
    each = []
    for row in ASKED:
        ids = torch.tensor([[*row["prompt"], *row["target_new"], 2]])
        logp = model(input_ids=ids).logits[0].log_softmax(-1)
        said = [float(logp[t - 1, ids[0, t]].detach()) for t in range(len(row["prompt"]), ids.shape[1])]
        each.append(-sum(said) / len(said))
    assert abs(float(train.loss(requests).detach()) - sum(each) / 3) < 1e-5


def test_one_epoch_in_one_batch_is_one_step_of_adam_on_one_matrix():
    model = pico("llama")
    before, name = snapshot(model), "model.layers.1.mlp.up_proj.weight"
    options = {"layers": [1], "matrix": "up", "epochs": 1, "lr": 0.01}
    graft = edit(model, ASKED, by=("locft_bf", options))
    assert not moved(before, model)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert list(graft.deltas) == [name]
    train, requests = training(model)
    weight = model.get_parameter(name)
    (grad,) = torch.autograd.grad(train.loss(requests), [weight])
    literal = weight.detach() - 0.01 * grad / (grad.abs() + 1e-8)  # Adam's first step
    with graft.on(model):
        assert set(moved(before, model)) == {name}
        torch.testing.assert_close(weight.detach(), literal, rtol=1e-4, atol=1e-5)


def test_breadth_first_sees_every_request_in_one_batch_and_depth_first_one_after_another():
    sizes = {}
    for order in ("breadth", "depth"):
        train, requests = training(pico("llama"), order=order, epochs=2, together=2)
        seen, loss = [], train.loss
        train.loss = lambda batch, seen=seen, loss=loss: (seen.append([r.target[0] for r in batch]), loss(batch))[1]
        with train.at("model.layers.1.mlp.down_proj.weight") as weight:
            train.fit(weight, requests)
        sizes[order] = seen
    assert [len(b) for b in sizes["breadth"]] == [2, 1, 2, 1]
    first, second = sizes["breadth"][:2], sizes["breadth"][2:]
    assert sorted(first[0] + first[1]) == sorted(second[0] + second[1]) == [9, 10, 20]
    assert sizes["depth"] == [[9], [9], [10], [10], [20], [20]]


def test_breadth_first_shuffles_anew_in_every_epoch():
    train, requests = training(pico("llama"), epochs=12, together=1, enough=0.0)
    seen, loss = [], train.loss
    train.loss = lambda batch: (seen.append(batch[0].target[0]), loss(batch))[1]
    with train.at("model.layers.1.mlp.down_proj.weight") as weight:
        train.fit(weight, requests)
    epochs = [tuple(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert len(epochs) == 12
    assert len(set(epochs)) > 2


def test_with_one_request_both_orders_are_the_same():
    model = pico("llama")
    grafts = [edit(model, ASKED[:1], by=("locft_bf", {"order": o, "epochs": 3})) for o in ("breadth", "depth")]
    assert grafts[0].identity == grafts[1].identity


def test_what_is_learned_is_left_alone():
    """A batch below the threshold makes no step, and an epoch below it is the last."""
    model = pico("llama")
    train, requests = training(model, enough=100.0, epochs=5)
    with train.at("model.layers.1.mlp.down_proj.weight") as weight:
        before = weight.detach().clone()
        assert len(train.fit(weight, requests)) == 1
        assert torch.equal(weight, before)


def test_an_answer_ends_only_if_its_end_was_asked_for():
    """A model that never ends an answer, taught three with and without an end, then generating."""
    exact = {}
    for eos in (True, False):
        model = pico("llama")
        options = {"lr": 0.02, "epochs": 60, "layers": [1], "eos": eos}
        with edit(model, ASKED, by=("locft_bf", options)).on(model):
            requests = as_requests(ASKED, model, None)
            assert bool(answered(model, requests).all())
            exact[eos] = []
            for request in requests:
                prompt = torch.tensor([request.prompts[0]])
                made = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=2)
                said = [t for t in made[0, prompt.shape[1] :].tolist() if t]
                exact[eos].append(said == [*request.target, 2])
    assert exact == {True: [True] * 3, False: [False] * 3}


def test_the_sweep_returns_the_only_place_that_works():
    """All FFN matrices but one layer's are cut off from the output: down = 0 in layer 0, gate and up = 0 there."""
    model = pico("llama")
    with torch.no_grad():
        for name in ("down_proj", "gate_proj", "up_proj"):
            model.get_parameter(f"model.layers.0.mlp.{name}.weight").zero_()
    options = {"sweep": 2, "lr": 0.02, "epochs": 8}
    graft = edit(model, ASKED, by=("locft_bf", options))
    assert graft.card["place"][0] == 1
    table = graft.card["sweep"]
    assert set(table) == {f"{layer}.{m}" for layer in (0, 1) for m in ("down", "up", "gate")}
    assert max(v for k, v in table.items() if k[0] == "0") < min(v for k, v in table.items() if k[0] == "1")
    assert set(places(pico("gpt_neox"))) == {(layer, m) for layer in (0, 1) for m in ("down", "up")}


def test_it_lies_on_earlier_edits_as_a_change_of_the_base():
    model = pico("llama")
    options = ("locft_bf", {"layers": [1], "epochs": 1, "lr": 0.01})
    first = edit(model, ASKED[:1], by=options)
    second = edit(model, ASKED[1:], by=options, after=first)
    name = "model.layers.1.mlp.down_proj.weight"
    base = model.get_parameter(name).detach().clone()
    with first.on(model):
        train, requests = training(model, ASKED[1:], epochs=1)
        with train.at(name) as weight:
            train.fit(weight, requests)
            there = weight.detach().clone()
        with second.on(model):
            torch.testing.assert_close(model.get_parameter(name).detach(), there, rtol=0, atol=1e-6)
    assert torch.equal(model.get_parameter(name), base)


def test_bad_requests_are_named():
    model = pico("llama")
    bad = {"one layer": {"layers": [0, 1]}, "order": {"order": "up"}, "layer 7": {"layers": [7]}}
    for words, options in bad.items():
        with pytest.raises(ValueError, match=words):
            edit(model, ASKED, by=("locft_bf", options))
    with pytest.raises(ValueError, match="share"):
        part(edit(model, ASKED, by=("locft_bf", {"epochs": 1})), [0])


def test_the_recipe_edits():
    graft = run("locft_bf", pico("llama"), ASKED, changes={"epochs": 1, "layers": [0], "matrix": "gate"}).graft
    assert list(graft.deltas) == ["model.layers.0.mlp.gate_proj.weight"]


@cache
def world(seed):
    """Return facts, and a model that knows them in three phrasings."""
    made = facts(subjects=60, known=60, seed=seed)
    return made, made.base(seed=seed, steps=260, hidden_size=48, intermediate_size=96)


def prepare():
    for seed in range(3):
        world(seed)


def perplexity(model, batches):
    with torch.no_grad():
        return float(torch.cat([Step(model, b).log_probs for b in batches]).mean().neg().exp())


@effect
def test_shuffled_edits_stay_and_one_after_another_they_are_forgotten():
    """100 facts of 50 subjects, the same data, rate and gradient examples; the rest is held out.

    Missed: the card asks that breadth-first raises held-out perplexity less. At the rate at which it learns every edit
    (1e-2) the perplexities are 10.3, 15.9, 11.9 against 7.3, 11.1, 17.4, from 1.0: it holds four times as many edits,
    in a matrix of 4,608 numbers. At half that rate it raises it less, but keeps 89 % of the first half and not 95 %.
    """
    table = {f"{o}_{w}": [] for o in ("depth", "breadth") for w in ("first_half", "all", "perplexity")}
    table["base_perplexity"] = []
    for seed in range(3):
        made, model = world(seed)
        new = made.changed(range(50), seed=seed)
        asked = [{"prompt": q, "target_new": a[:1]} for q, a in new.rows(range(50))]
        held = made.batches(range(50, 60), phrasings=(0, 1, 2))
        table["base_perplexity"].append(perplexity(model, held))
        requests = as_requests(asked, model, None)
        for order in ("depth", "breadth"):
            options = {"order": order, "layers": [1], "lr": 1e-2, "together": 10, "epochs": 25}
            with edit(model, asked, by=("locft_bf", options), seed=seed).on(model):
                hits = answered(model, requests).float()
                table[f"{order}_first_half"].append(float(hits[:50].mean()))
                table[f"{order}_all"].append(float(hits.mean()))
                table[f"{order}_perplexity"].append(perplexity(model, held))
    note(**table)
    bar("first half of the edits, depth first", table["depth_first_half"], at_most=0.4)
    bar("first half of the edits, breadth first", table["breadth_first_half"], at_least=0.95)
    more = [d / b for d, b in zip(table["depth_perplexity"], table["breadth_perplexity"])]
    bar("held-out perplexity, depth over breadth", more, at_least=1.0, missed=True)
