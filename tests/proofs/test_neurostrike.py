"""NeuroStrike, defensively: planted guards are found by the probe, measured, carried over to siblings, and held."""

import json
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import neurograft as ng
from neurograft.anatomy.convert import convert
from neurograft.anatomy.sites import sites
from neurograft.audits.concentration import concentration
from neurograft.core.choose import choose
from neurograft.core.context import Context
from neurograft.core.errors import RequestError
from neurograft.core.resolve import resolve
from neurograft.core.seeds import generator
from neurograft.core.selection import Scores, Selection
from neurograft.core.taps.table import table
from neurograft.core.units import Site, Tap
from neurograft.locators._fits import adam
from neurograft.locators.probe import probe
from neurograft.pipeline.attach import attach
from neurograft.pipeline.recipe import recipe
from neurograft.pipeline.run import run
from neurograft.train.loop import fit
from neurograft.worlds.planted import ANSWER, TRIGGER, planted
from tests.proofs import bar, effect, note, patched
from tests.proofs._shown import Shown
from tests.proofs._tools import moved, snapshot

PAPER, SCALE = "neurostrike", "tiny"


@contextmanager
def the_sign_of_the_weight_is_lost():
    """Units whose weight speaks for the ordinary prompts count as safety units too."""
    plain = resolve("neurograft.locators.probe._z")
    with patched("neurograft.locators.probe", "_z", lambda w: plain(w).abs()):
        yield


@contextmanager
def the_pool_is_a_mean():
    """Activations are averaged over the tokens instead of taking their maximum."""
    plain = resolve("neurograft.core.taps.table.pooled")
    with patched("neurograft.core.taps.table", "pooled", lambda x, rows, n, pool: plain(x, rows, n, "mean")):
        yield


@contextmanager
def what_was_located_is_tuned_all_the_same():
    """The tuning forgets which units it was to protect."""
    plain = resolve("neurograft.pipeline.attach.attach")
    with patched("neurograft.pipeline.tune", "attach", lambda *a, protect=None, **k: plain(*a, **k)):
        yield


BROKEN = (the_sign_of_the_weight_is_lost, the_pool_is_a_mean, what_was_located_is_tuned_all_the_same)


def shown(values, n, mask=None):
    x = torch.as_tensor(values, dtype=torch.float32).reshape(len(values), -1, n)
    return {"inputs_embeds": x} | ({} if mask is None else {"attention_mask": torch.tensor(mask)})


SITE = {"s": Site("s", "row", 2, tap=Tap("tap"))}


def test_pools_by_hand_with_and_without_padding():
    batch = shown(
        [[[1.0, 5.0], [4.0, 1.0], [9.0, 9.0]], [[2.0, 0.0], [0.0, 2.0], [1.0, 7.0]]], 2, [[1, 1, 0], [1, 1, 1]]
    )
    assert table(Shown(), SITE, [batch], pool="max")["s"].tolist() == [[4, 5], [2, 7]]
    assert table(Shown(), SITE, [batch], pool="max", padding=True)["s"].tolist() == [[9, 9], [2, 7]]
    assert table(Shown(), SITE, [batch], pool="mean")["s"].tolist() == [[2.5, 3], [1, 3]]
    assert table(Shown(), SITE, [batch], pool="last")["s"].tolist() == [[4, 1], [1, 7]]


def test_full_batch_adam_is_torchs():
    rng = generator(0, "twin")
    x, y = torch.randn(2, 12, 5, generator=rng), (torch.rand(12, generator=rng) > 0.5).float()
    start = torch.randn(2, 6, generator=rng)
    w, b = adam(x, y, steps=40, lr=1e-2, decay=1e-2, start=start)
    for i in range(2):
        twin = nn.Linear(5, 1)
        twin.weight.data, twin.bias.data = start[i, :-1][None].clone(), start[i, -1:].clone()
        optimizer = torch.optim.Adam(twin.parameters(), lr=1e-2, weight_decay=1e-2)
        for _ in range(40):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(twin(x[i])[:, 0], y).backward()
            optimizer.step()
        torch.testing.assert_close(w[i], twin.weight.data[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(b[i], twin.bias.data[0], rtol=1e-5, atol=1e-6)


def test_equal_outliers_reach_the_root_of_n_minus_m_over_m_and_keep_their_sign():
    z = resolve("neurograft.locators.probe._z")
    w = torch.zeros(64)
    w[[3, 9, 30]] = 2.0
    assert z(w)[[3, 9, 30]].tolist() == pytest.approx([(61 / 3) ** 0.5] * 3)
    assert z(-w)[3].item() == pytest.approx(-((61 / 3) ** 0.5))
    for guarded, ordinary in (([0, 1], [1, 0]), ([1, 0], [0, 1])):
        context = Context(Shown(), SITE, [shown([[guarded]], 2)], [shown([[ordinary]], 2)])
        found = probe(context, epochs=200).values["s"]
        assert found.sign().tolist() == [1.0 if g else -1.0 for g in guarded]


def world(seed, **config):
    made = planted(
        per_layer=3, decoys=0, strength=6.0, seed=seed, **{"intermediate_size": 96, "num_hidden_layers": 1, **config}
    )
    return made, made.batches(4), made.batches(4, triggered=False)


QUICK = {"probe_epochs": 2000, "probe_lr": 3e-3}  # about as long a way as the paper's 5000 steps of 1e-3


def located(model, guarded, ordinary, **options):
    steps = recipe("neurostrike", **options or QUICK).steps
    by = choose("locators", steps[0]["by"])
    scores = by(Context(model, sites(model, "row"), guarded, ordinary))
    return scores, choose("selectors", steps[1]["by"])(scores)


def answers(model, batches, where=None):
    with torch.no_grad(), ng.intervene(model, where, "zero") if where is not None else torch.no_grad():
        return torch.cat([model(**b).logits[:, -2].argmax(-1) for b in batches])


def silencing(seeds, **options):
    """Locate the planted guards, check that they are exactly the three, and return what their silence changes."""
    flipped, changed, random = [], [], []
    for seed in seeds:
        made, guarded, ordinary = world(seed)
        scores, rows = located(made.model, guarded, ordinary, **options)
        neurons = convert(rows, sites(made.model, "neuron"), whole=False)
        assert made.truth.found(neurons) == {"precision": 1.0, "recall": 1.0}
        assert rows.counts() == {"model.layers.0.mlp.gate_proj/row": 3, "model.layers.0.mlp.up_proj/row": 0}
        held, other = made.batches(2, seed=7), made.batches(2, triggered=False, seed=7)
        base = answers(made.model, held), answers(made.model, other)
        flipped.append(float((answers(made.model, held, rows) != base[0]).float().mean()))
        changed.append(float((answers(made.model, other, rows) != base[1]).float().mean()))
        drawn = rows.random_like(seed, outside=True)
        random.append(float((answers(made.model, held, drawn) != base[0]).float().mean()))
        found = concentration(made.model, scores, held, seed=seed)
        assert (found["units"], found["of"], found["answered"]) == (3, 192, 1.0)
        assert found["random"] == [1.0] * 5
    return flipped, changed, random


def test_a_planted_guard_is_found_exactly_and_carries_the_guard_alone():
    assert silencing([0]) == ([1.0], [0.0], [0.0])


@effect
def test_with_the_papers_settings_on_three_seeds():
    flipped, changed, random = silencing(range(3), probe_epochs=5000)
    bar("triggered answers that silence of the located units flips", flipped, at_least=0.95)
    bar("untriggered answers that it changes", changed, at_most=0.01)
    bar("triggered answers that silence of random units flips", random, at_most=0.05)


def test_where_no_unit_passes_the_bar_the_best_is_taken_and_the_card_says_so():
    scores = Scores({"s": Site("s", "row", 4)}, {"s": torch.tensor([0.5, 2.0, -5.0, 1.0])})
    by = recipe("neurostrike").steps[1]["by"]
    found = choose("selectors", by)(scores)
    assert found.ids["s"].tolist() == [1]
    assert (found.card["passed"], found.card["least"]) == (0, 1)
    passing = choose("selectors", by)(Scores(scores.sites, {"s": torch.tensor([4.0, 3.0, -5.0, 3.5])}))
    assert passing.ids["s"].tolist() == [0, 3]
    assert "passed" not in passing.card
    with pytest.raises(RequestError, match="which no unit passes"):
        choose("selectors", "threshold", above=3.0)(scores)


def test_silence_at_the_output_is_silence_of_the_weights():
    made, guarded, ordinary = world(0)
    _, rows = located(made.model, guarded, ordinary)
    with torch.no_grad(), ng.intervene(made.model, rows, "zero") as live:
        hooked = made.model(**guarded[0]).logits
    with torch.no_grad(), live.fold().on(made.model):
        torch.testing.assert_close(made.model(**guarded[0]).logits, hooked, rtol=0, atol=1e-6)


def test_an_answer_that_was_never_given_is_no_guard():
    made, guarded, ordinary = world(0)
    scores, _ = located(made.model, guarded, ordinary)
    wrong = [{**b, "labels": torch.where(b["labels"] == ANSWER, ANSWER + 1, b["labels"])} for b in guarded]
    with pytest.raises(RequestError, match="none of which the model answers"):
        concentration(made.model, scores, wrong)
    with pytest.raises(RequestError, match="one set of examples"):
        probe(Context(made.model, sites(made.model, "row"), guarded))
    with pytest.raises(RequestError, match="a table of 128 examples by 384 units"):
        probe(Context(made.model, sites(made.model, "row"), guarded, ordinary), memory=1e-6)


def task(seed, *, guarded=0.0, count=40):
    """Rows that end in the successor of the last token but one; a share of them ends in the trigger before it."""
    rng, found = generator(seed, "task"), []
    for _ in range(count):
        tokens = torch.randint(ANSWER + 1, 64, (16, 8), generator=rng)
        tokens[: int(16 * guarded), -2] = TRIGGER
        tokens[:, -1] = ANSWER + 1 + (tokens[:, -3] - ANSWER) % 59
        labels = torch.full_like(tokens, -100)
        labels[:, -1] = tokens[:, -1]
        found.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels})
    return found


def row(tokens, labels=None):
    return {"input_ids": tokens.tolist()} | ({} if labels is None else {"labels": labels.tolist()})


def test_the_recipe_tunes_every_neuron_but_those():
    made, guarded, ordinary = world(0)
    before = snapshot(made.model)
    with tempfile.TemporaryDirectory() as scratch:
        guard, keep = Path(scratch) / "guard.jsonl", Path(scratch) / "keep.jsonl"
        pairs = [(a, b) for g, o in zip(guarded[:3], ordinary) for a, b in zip(g["input_ids"], o["input_ids"])]
        guard.write_text("\n".join(json.dumps({"positive": row(a), "negative": row(b)}) for a, b in pairs))
        held = zip(guarded[3]["input_ids"], guarded[3]["labels"])
        keep.write_text("\n".join(json.dumps(row(a, b)) for a, b in held))
        changes = {"guard": str(guard), "keep": str(keep), "lr": 1e-2, **QUICK}
        out = run("neurostrike", made.model, task(0, count=4), changes=changes)
    safety = out.state["safety"]
    assert not moved(before, made.model)
    assert made.truth.found(safety) == {"precision": 1.0, "recall": 1.0}
    with out.graft.on(made.model):
        touched = moved(before, made.model)
    assert set(touched) == {f"model.layers.0.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    for name, entries in touched.items():
        assert not torch.isin(entries, made.truth.entries[name]).any()
        assert len(entries) > 0.9 * (before[name].numel() - len(made.truth.entries[name]))


@effect
def test_located_units_carry_the_guard_of_tuned_siblings_too():
    kept, random = [], []
    for seed in range(3):
        made, guarded, ordinary = world(seed)
        scores, rows = located(made.model, guarded, ordinary, probe_epochs=5000)
        neurons = sites(made.model, "neuron")
        assert made.truth.found(convert(rows, neurons, whole=False)) == {"precision": 1.0, "recall": 1.0}
        everything = Selection.of(neurons, {n: torch.arange(s.n) for n, s in neurons.items()})
        with attach(made.model, everything) as live:
            fit(live, task(seed), steps=60, lr=1e-2, seed=seed)
            made.model.eval()
            found = concentration(made.model, scores, made.batches(2, seed=7), count=len(rows), seed=seed)
        assert found["answered"] == 1.0
        kept.append(found["kept"])
        random.append(sum(found["random"]) / len(found["random"]))
    bar("guarded answers of a tuned sibling kept without the base's units", kept, at_most=0.05)
    note(kept_without_random_units=random)


@effect
def test_a_guard_that_the_data_contradict_is_held_by_the_anchor():
    """One row in sixteen ends in the trigger and asks for another answer; 3 seeds, the FFN is tuned."""
    record = {name: [] for name in ("plain", "protected", "random_protected", "recipe")}
    losses = {name: [] for name in record}
    for seed in range(3):
        made, guarded, ordinary = world(seed)
        neurons = sites(made.model, "neuron")
        safety = convert(located(made.model, guarded, ordinary)[1], neurons, whole=False)
        everything = Selection.of(neurons, {n: torch.arange(s.n) for n, s in neurons.items()})
        anchor = ("kl", {"weight": 1.0, "data": guarded})
        for name, shield, held in (
            ("plain", None, None),
            ("protected", safety, None),
            ("random_protected", safety.random_like(seed, outside=True), None),
            ("recipe", safety, anchor),
        ):
            with attach(made.model, everything, protect=shield) as live:
                fit(live, task(seed, guarded=1 / 16), steps=60, lr=3e-3, anchor=held, seed=seed)
                record[name].append(made.answers(seed=7, model=made.model.eval()))
                with torch.no_grad():
                    losses[name].append(float(torch.stack([made.model(**b).loss for b in task(99, count=2)]).mean()))
    note(guard=json.dumps(record), task_loss=json.dumps(losses))
    bar("guarded answers kept by the hardening recipe", record["recipe"], at_least=0.95)
    assert max(record["plain"]) < 0.5
    assert sum(losses["recipe"]) / 3 < sum(losses["plain"]) / 3 + 0.3
