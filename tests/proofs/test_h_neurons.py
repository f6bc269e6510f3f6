"""H-Neurons: shares of the FFN's output, an L1 probe over all layers, and planted guess neurons turned up and down.

Asked and not reached: an AUROC above that of 20 random sets of as many neurons, each fitted anew. In so small a decoder
that a question has no known answer shows in most neurons, and the best random set of 2 to 9 tells it as well; with the
probe's own weights on random neurons it does not.
"""

import json
from contextlib import contextmanager

import pytest
import torch

import neurograft as ng
from neurograft.anatomy.sites import sites
from neurograft.audits.readout import readout
from neurograft.core.context import IGNORE, Context
from neurograft.core.errors import RequestError
from neurograft.core.resolve import resolve
from neurograft.core.seeds import generator
from neurograft.core.selection import Scores
from neurograft.core.taps.capture import capture
from neurograft.core.taps.cett import shares
from neurograft.core.taps.table import auroc
from neurograft.locators._fits import logistic
from neurograft.locators.probe import examples, probe
from neurograft.pipeline.run import run
from neurograft.worlds.facts import facts
from neurograft.worlds.pico import pico, pico_batch
from neurograft.worlds.planted import ANSWER, planted
from neurograft.worlds.tiny import fit, llama
from tests.proofs import bar, effect, note, patched
from tests.proofs._tools import moved, snapshot

PAPER, SCALE = "h-neurons", "identity"


@contextmanager
def what_a_neuron_writes_does_not_count():
    """Shares are of activations alone, without the norm of the column that writes them."""

    def bare(model, sites):
        return lambda name, x: x.abs() / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-8)

    with patched("neurograft.locators.probe", "shares", bare):
        yield


@contextmanager
def other_tokens_are_forgotten():
    """The probe compares wrong answers with right ones alone."""
    plain = resolve("neurograft.locators.probe.examples")
    forgetful = lambda context, **o: plain(context, **{**o, "others": False})  # noqa: E731
    with patched("neurograft.locators.probe", "examples", forgetful):
        yield


BROKEN = (what_a_neuron_writes_does_not_count, other_tokens_are_forgotten)


def test_shares_by_the_letter_and_their_sum():
    model = pico("llama")
    where, batch = sites(model, "neuron"), pico_batch(model)
    x = capture(model, where, batch)
    ffn = {}
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda m, a, y, i=i: ffn.__setitem__(i, y.detach()))
    with torch.no_grad():
        model(**batch)
    each = shares(model, where)
    for i, name in enumerate(where):
        down, a = model.model.layers[i].mlp.down_proj.weight.detach(), x[name].reshape(-1, 48)
        torch.testing.assert_close(sum(a[:, j, None] * down[:, j] for j in range(48)), ffn[i].reshape(-1, 32))
        whole = ffn[i].reshape(-1, 32).norm(dim=1)
        literal = torch.stack([a[:, j].abs() * down[:, j].norm() / (whole + 1e-8) for j in range(48)], 1)
        torch.testing.assert_close(each(name, a), literal, rtol=1e-4, atol=1e-6)
        assert (each(name, a).sum(1) > 1).all()
    with torch.no_grad():
        down = model.model.layers[0].mlp.down_proj.weight
        down.copy_(down[:, :1] * torch.rand(48, generator=generator(0, "parallel")))
    name = next(iter(where))
    torch.testing.assert_close(each(name, x[name].reshape(-1, 48).abs()).sum(1), torch.ones(x[name][..., 0].numel()))


def test_the_table_holds_shares_of_answers_and_other_tokens():
    model = pico("llama", num_hidden_layers=1)
    where = sites(model, "neuron")
    (name,) = where
    sides = []
    for seed in (0, 1):
        batch = {k: v.clone() for k, v in pico_batch(model, batch=3, seed=seed).items()}
        batch["labels"][:, :-2] = IGNORE
        batch["labels"][:, -2:] = batch["input_ids"][:, -2:]
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        sides.append(batch)
    options = {"pool": "answer", "statistic": "cett", "padding": False, "standardize": False, "memory": 1.0}
    context = Context(model, where, sides[:1], sides[1:])
    table = resolve("neurograft.locators.probe.examples")
    x, y = table(context, others=True, **options)
    assert y.tolist() == [1.0] * 3 + [0.0] * 9
    each = shares(model, where)
    wrong, right = (each(name, capture(model, where, b)[name]) for b in sides)
    literal = [wrong[:, -2:], wrong[:, :-2], right[:, -2:], right[:, :-2]]
    torch.testing.assert_close(x[name], torch.cat([v.mean(1) for v in literal]), rtol=1e-5, atol=1e-6)


def test_the_working_set_ends_where_liblinear_on_all_columns_does():
    from sklearn.linear_model import LogisticRegression

    rng = generator(0, "wide")
    x = torch.randn(80, 900, generator=rng)
    y = (x[:, :3].sum(1) + 0.5 * torch.randn(80, generator=rng) > 0).float()
    for C in (0.05, 0.3, 1.0):
        w, b = logistic(x, y, C=C, tol=1e-8, steps=5000)
        twin = LogisticRegression(solver="liblinear", l1_ratio=1.0, C=C, tol=1e-8, max_iter=5000, random_state=0)
        twin.fit(x.double().numpy(), y.numpy().astype(int))
        theirs = torch.from_numpy(twin.coef_[0]).float()
        torch.testing.assert_close(w, theirs, rtol=0, atol=2e-3)
        assert torch.equal(w > 1e-2, theirs > 1e-2)
        assert b == pytest.approx(float(twin.intercept_[0]), abs=2e-3)
    assert 0 < int((logistic(x, y, C=0.05)[0] != 0).sum()) < 30
    assert not (logistic(x, y, C=1e-6)[0]).any()


def guessing():
    """One neuron makes a planted model guess: the answer span is the trigger and what is said of it."""
    made = planted(per_layer=1, decoys=0, strength=1.0, seed=0, num_hidden_layers=1)
    sides = made.batches(4), made.batches(4, triggered=False)
    for batch in (*sides[0], *sides[1]):
        batch["labels"][:, -2:] = batch["input_ids"][:, -2:]
    return made, *sides


def said(model, batches):
    with torch.no_grad():
        logits = torch.cat([model(**b).logits[:, -2] for b in batches]).softmax(-1)
    return float(logits[:, ANSWER].mean())


def test_the_planted_guess_neuron_is_found_and_turned_up_and_down_by_the_recipe():
    made, wrong, right = guessing()
    before, held = snapshot(made.model), made.batches(2, seed=5)
    rates = {}
    for alpha in (0.0, 1.0, 2.0):
        data = {"positive": wrong, "negative": right}
        out = run("h_neurons", made.model, data, changes={"alpha": alpha, "C": 10.0})
        assert made.truth.found(out.where) == {"precision": 1.0, "recall": 1.0}
        assert list(out.graft.deltas) == ["model.layers.0.mlp.down_proj.weight"]
        with out.graft.on(made.model):
            changed = moved(before, made.model)
            rates[alpha] = said(made.model, held)
            with torch.no_grad():
                folded = made.model(**held[0]).logits
        assert bool(changed) == (alpha != 1.0)
        with torch.no_grad(), ng.intervene(made.model, out.where, "scale", factor=alpha):
            torch.testing.assert_close(made.model(**held[0]).logits, folded, rtol=1e-5, atol=1e-5)
    assert not moved(before, made.model)
    assert rates[0.0] + 0.1 < rates[1.0] < rates[2.0] - 0.1
    assert rates[1.0] == said(made.model, held)


def test_three_against_one_adds_the_other_tokens_of_both_sides_as_negatives():
    made, wrong, right = guessing()
    context = Context(made.model, sites(made.model, "neuron"), wrong, right)
    how = {"fit": "l1", "scope": "all", "pool": "answer", "statistic": "cett", "score": "weight"}
    three, one = probe(context, others=True, **how), probe(context, others=False, **how)
    assert (three.card["examples"], one.card["examples"]) == (256, 128)
    assert three.card["positive"] == one.card["positive"] == 64


def test_what_cannot_be_probed_is_said():
    model = pico("llama")
    batch = {**pico_batch(model)}
    context = Context(model, sites(model, "neuron", at="gate"), [batch], [batch])
    with pytest.raises(RequestError, match="shares of"):
        probe(context, statistic="cett")
    empty = {n: torch.zeros(s.n) for n, s in context.sites.items()}
    with pytest.raises(RequestError, match="all 0"):
        readout(model, Scores(context.sites, empty), [batch], [batch])


def own(model, batches):
    """Rows with the model's own answer, whose span begins at the separator that asks for it."""
    found = []
    for batch in batches:
        labels, ids = batch["labels"].clone(), batch["input_ids"].clone()
        at, rows = (labels != IGNORE).int().argmax(1), torch.arange(len(labels))
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
        ids[rows, at] = labels[rows, at] = logits[rows, at - 1].argmax(-1)
        labels[rows, at - 1] = ids[rows, at - 1]
        found.append({**batch, "input_ids": ids, "labels": labels})
    return found


def tuned(world, model, how, limit):
    """Fit on two thirds of the first quarters, and take the C that tells the rest apart best with few enough units."""
    where, best = sites(model, "neuron"), (0.0, None)
    sides = [
        [
            own(model, world.batches(range(a, b), phrasings=(0, 1, 2), batch=72))
            for a, b in ((s, s + 32), (s + 32, s + 48))
        ]
        for s in (96, 0)
    ]
    for C in (1.0, 3.0, 10.0, 30.0):
        found = probe(Context(model, where, sides[0][0], sides[1][0]), fit="l1", C=C, **how)
        units = sum(int((v != 0).sum()) for v in found.values.values())
        if 0 < units <= limit * sum(s.n for s in where.values()):
            told = readout(model, found, sides[0][1], sides[1][1], controls=0)["auroc"]
            best = max(best, (told, found), key=lambda pair: pair[0])
    return best[1]


@effect
def test_few_neurons_predict_guesses_as_well_as_all_do():
    """A tiny decoder knows 96 subjects, and met 96 others with a new answer each time; half of each is held out."""
    few, gap, share, best, shuffled = [], [], [], [], []
    for seed in range(3):
        world = facts(subjects=192, known=96, kinds=24, relations=1, seed=seed)
        model = llama(
            seed, vocab_size=world.vocabulary, num_hidden_layers=2, hidden_size=48, intermediate_size=256,
            num_key_value_heads=4,
        )  # fmt: skip
        some = {"phrasings": (0, 1, 2), "count": 150, "batch": 48}
        known = world.batches(range(96), seed=seed, **some)
        noisy = world.batches(range(96, 192), noise=1.0, seed=50 + seed, **some)
        fit(model, [b for pair in zip(known, noisy) for b in pair], lr=5e-3)
        assert world.accuracy(model, range(96)) > 0.9
        assert world.accuracy(model, range(96, 192)) < 0.2
        asked = {"phrasings": (0, 1, 2), "batch": 72}
        quarter = [own(model, world.batches(range(a, a + 48), **asked)) for a in range(0, 192, 48)]
        context = Context(model, sites(model, "neuron"), quarter[2], quarter[0], seed=seed)
        how = {"scope": "all", "pool": "answer", "statistic": "cett", "others": True, "score": "weight"}
        sparse = tuned(world, model, how, limit=0.02)
        dense = probe(context, fit="l2", **how)
        found = readout(model, sparse, quarter[3], quarter[1], seed=seed)
        few.append(found["auroc"])
        gap.append(readout(model, dense, quarter[3], quarter[1], controls=0)["auroc"] - found["auroc"])
        share.append(found["units"] / sum(s.n for s in context.sites.values()))
        shuffled.append(max(found["random"]))
        best.append(max(refitted(context, (quarter[3], quarter[1]), found["units"], seed)))
    note(auroc=few, auroc_of_shuffled_weights=shuffled, auroc_of_the_best_random_set=best, share=json.dumps(share))
    bar("share of the neurons with a weight", share, at_most=0.02)
    bar("AUROC of the dense probe above the sparse one's", gap, at_most=0.03)
    bar("AUROC above the best of 20 shuffles of its weights", [a - b for a, b in zip(few, shuffled)], at_least=0.0)
    bar(
        "AUROC above the best of 20 random sets fitted anew",
        [a - b for a, b in zip(few, best)],
        at_least=0.0,
        missed=True,
    )


def refitted(context, held, units, seed):
    """Return the held-out AUROC of probes fitted on random neurons alone."""
    options = {"pool": "answer", "statistic": "cett", "padding": False, "standardize": False, "memory": 1.0}
    x, y = examples(context, others=True, **options)
    there, asked = examples(Context(context.model, context.sites, *held), others=False, **options)
    wide, test = torch.cat(list(x.values()), 1), torch.cat(list(there.values()), 1)
    found = []
    for i in range(20):
        ids = torch.randperm(wide.shape[1], generator=generator(seed, "random set", i))[:units]
        w, _ = logistic(wide[:, ids], y, penalty="l2", C=100.0)
        found.append(auroc(test[:, ids] @ w, asked))
    return found
