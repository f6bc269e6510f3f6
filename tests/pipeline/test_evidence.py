"""Evidence: planted truth and planted nothing, hand-made effects, controls, data of its own, massive units."""

import json

import pytest
import torch

import neurograft as ng
from neurograft.anatomy.sites import sites
from neurograft.audits._silence import drawn, matched, silenced, sizes
from neurograft.audits.evidence import _compared, evidence, verdict
from neurograft.core.prompts.examples import row_digests, singles
from neurograft.core.seeds import generator
from neurograft.core.selection import Selection
from neurograft.core.taps.board import ATTRIBUTE
from neurograft.core.units import Site
from neurograft.pipeline._located_on import located_on
from neurograft.worlds.pico import pico, pico_batch

SITE = "model.layers.1.mlp/neuron"


def planted(units=(3, 30)):
    """A pico llama whose chosen neurons of the last layer alone drive the prediction, and data it predicts."""
    model = pico("llama", initializer_range=0.3)
    down = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(0.05)
        off = torch.ones(48, dtype=torch.bool)
        off[list(units)] = False
        down[:, off] *= 0.02
        down[:, ~off] *= 6
    batches = [pico_batch(model, batch=4, length=8, seed=s) for s in range(3)]
    for batch in batches:
        with torch.no_grad():
            said = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
        batch["labels"][:, 1:] = torch.where(batch["labels"][:, 1:] >= 0, said[:, :-1], -100)
    return model, batches


def choose(model, *units):
    return Selection.of(sites(model, "neuron"), {SITE: units})


def test_the_planted_units_beat_every_control_and_others_do_not():
    model, batches = planted()
    found = ng.evidence(model, choose(model, 3, 30), batches, controls=8, draws=300)
    assert found.verdict == "better than its controls"
    assert found.better
    assert found.sentence.startswith("Better than random and equally active units: silencing the 2 units")
    null = ng.evidence(model, choose(model, 5, 31), batches, controls=8, draws=300)
    assert not null.better
    assert null.sentence.startswith(("No better than random", "Matters less than random"))
    json.dumps(found.as_dict())
    assert found.as_dict()["provenance"]["disjoint"] is None
    again = ng.evidence(model, choose(model, 3, 30), batches, controls=8, draws=300)
    assert again.as_dict() == found.as_dict()


def test_effects_are_those_of_hand_silencing_and_the_model_is_as_found():
    model, batches = planted()
    where, before = choose(model, 3, 30), torch.get_rng_state()
    bits = {n: p.clone() for n, p in model.named_parameters()}
    model.train()
    found = ng.evidence(model, where, batches, controls=2, draws=50, limit=None).as_dict()
    assert model.training
    assert ATTRIBUTE not in vars(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())
    model.eval()
    losses = []
    for factor in (1.0, 0.0):
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[:, [3, 30]] *= factor
            total, count = 0.0, 0
            for batch in batches:
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                total += torch.nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
                )
                count += int((batch["labels"][:, 1:] >= 0).sum())
        losses.append(float(total) / count)
    assert found["effect"]["value"] == pytest.approx(losses[1] - losses[0], rel=1e-4)
    assert found["base_loss"] == pytest.approx(losses[0], rel=1e-4)
    assert found["effect"]["low"] < found["effect"]["value"] < found["effect"]["high"]


def test_silence_in_the_weights_equals_silence_at_the_tap_and_comes_off():
    model = pico("llama")
    batch, where = pico_batch(model), choose(model, 1, 7)
    bare = Selection.of(
        {n: Site(s.name, s.kind, s.n, s.parts, None, s.layer, s.at, s.writes) for n, s in where.sites.items()},
        where.ids,
    )
    plain = model(**batch).logits
    with silenced(model, where):
        tapped = model(**batch).logits
    with silenced(model, bare):
        weights = model(**batch).logits
    assert torch.allclose(tapped, weights, atol=1e-6)
    assert not torch.allclose(tapped, plain, atol=1e-7)
    assert torch.equal(model(**batch).logits, plain)
    whole = Selection.of(sites(model, "module"), {"model.layers.0.mlp.down_proj/module": [0]})
    with pytest.raises(ZeroDivisionError), silenced(model, Selection.of(whole.sites, whole.ids)):
        raise ZeroDivisionError
    assert torch.equal(model(**batch).logits, plain)


def test_controls_have_the_size_and_place_of_the_selection():
    where = Selection.of({"a": Site("a", "neuron", 40), "b": Site("b", "neuron", 10)}, {"a": [0, 1, 2], "b": [4]})
    size = {"a": torch.arange(40.0).flip(0), "b": torch.arange(10.0)}
    seen = set()
    for seed in range(40):
        near = matched(where, size, seed)
        assert near.counts() == where.counts()
        assert len(near & where) == 0
        # the largest of 40 are chosen: matches are the next largest, within 5 ranks (further once those are taken)
        assert set(near.ids["a"].tolist()) <= {3, 4, 5, 6, 7}
        seen |= set(near.ids["a"].tolist())
        assert drawn(where, seed).counts() == where.counts()
        assert len(drawn(where, seed) & where) == 0
        assert not {7, 8, 9} & set(drawn(where, seed, {"b": [7, 8, 9]}).ids["b"].tolist())
    assert len(seen) == 5
    most = Selection.of(where.sites, {"b": range(8)})
    assert matched(most, size, 0).counts()["b"] == drawn(most, 0).counts()["b"] == 8


def looked_for_everywhere(chosen, size, seed):
    """Slow twin of `matched` at one site: every unit is asked whether it is free and near."""
    n, rng, found = len(size), generator(seed, "matched", "a"), []
    order = size.argsort().tolist()
    rank = {unit: place for place, unit in enumerate(order)}
    free = {p for p in range(n) if 2 * len(chosen) > n or order[p] not in chosen}
    for unit in torch.tensor(chosen)[torch.randperm(len(chosen), generator=rng)].tolist():
        near = [p for p in range(n) if p in free and abs(p - rank[unit]) <= max(5, n // 50)]
        near = near or sorted(free, key=lambda p: abs(p - rank[unit]))[:1]
        free.remove(pick := near[int(torch.randint(len(near), (1,), generator=rng))])
        found.append(order[pick])
    return sorted(found)


@pytest.mark.parametrize(("n", "chosen"), [(30, [0, 29]), (400, [0, 1, 2, 200, 399]), (12, list(range(9)))])
def test_matches_are_those_of_a_search_over_all_units(n, chosen):
    size = torch.rand(n, generator=torch.Generator().manual_seed(n))
    where = Selection.of({"a": Site("a", "neuron", n)}, {"a": chosen})
    for seed in range(8):
        assert matched(where, {"a": size}, seed).ids["a"].tolist() == looked_for_everywhere(chosen, size, seed)


def test_controls_are_drawn_when_their_turn_comes(monkeypatch):
    model, batches = planted()
    made, turns = [], []
    for one in (matched, drawn):
        monkeypatch.setattr(f"neurograft.audits.evidence.{one.__name__}", lambda *a, of=one: made.append(1) or of(*a))

    def watched(plans, what):
        for plan in plans:
            assert len(made) == max(0, len(turns) - 1)
            turns.append(plan)
            yield plan

    evidence(model, choose(model, 3, 30), batches, controls=3, draws=20, progress=watched)
    assert len(made) == len(turns) - 1 >= 6


def test_massive_units_are_named_with_their_position():
    model = pico("llama")
    with torch.no_grad():
        trigger = model.model.embed_tokens.weight[5]
        trigger.mul_(10)
        for matrix in (model.model.layers[1].mlp.gate_proj.weight, model.model.layers[1].mlp.up_proj.weight):
            matrix[9] = 3 * trigger
    batches = [pico_batch(model, seed=s) for s in range(2)]
    for batch in batches:
        batch["input_ids"][batch["input_ids"] == 5] = 6
        batch["input_ids"][:, 0] = 5
    where = choose(model, 9, 10)
    size, massive = sizes(model, where, batches)
    assert [(m["site"], m["unit"], m["position"], m["sink"], m["chosen"]) for m in massive] == [
        (SITE, 9, 0, True, True)
    ]
    assert int(size[SITE].argmax()) == 9
    found = ng.evidence(model, choose(model, 10), batches, controls=6, draws=50).as_dict()
    assert found["massive"][0]["unit"] == 9
    assert set(found["families"]) == {"random", "magnitude", "no_sinks"}
    named = ng.evidence(model, where, batches, controls=2, draws=50)
    assert "Massive units are among them: 9." in named.sentence


def test_intervals_by_hand():
    # two examples of one place each; the selection adds 2 and 4, two controls add (1, 1) and (0, 2)
    effects = {
        "selection": [torch.tensor([2.0, 4.0], dtype=torch.float64)],
        "random": [torch.tensor([1.0, 1.0], dtype=torch.float64), torch.tensor([0.0, 2.0], dtype=torch.float64)],
    }
    found = _compared(effects, torch.ones(2, dtype=torch.float64), draws=4000, level=0.5, seed=0)
    assert found["effect"]["value"] == 3.0
    assert found["families"]["random"]["effects"] == [1.0, 1.0]
    assert found["families"]["random"]["difference"]["value"] == 2.0
    assert found["families"]["random"]["p_value"] == pytest.approx(1 / 3)
    # the bootstrap of the mean of (2, 4) is 2, 3, 4 with chances 1/4, 1/2, 1/4
    assert (found["effect"]["low"], found["effect"]["high"]) == (2.0, 4.0)


@pytest.mark.parametrize(("random", "magnitude", "word"), [
    ((-0.1, 0.2), (0.1, 0.2), "no better than random"),
    ((0.1, 0.2), (-0.1, 0.2), "no better than equally active units"),
    ((-0.2, -0.1), (0.1, 0.2), "less than random"), ((0.1, 0.2), (0.1, 0.2), "better than its controls"),
])  # fmt: skip
def test_verdicts(random, magnitude, word):
    def family(ends):
        return {"mean": 0.0, "difference": {"value": sum(ends) / 2, "low": ends[0], "high": ends[1]}}

    found = {
        "families": {"random": family(random), "magnitude": family(magnitude)}, "effect": {"value": 0.1},
        "units": 3, "level": 0.95, "controls": 20, "examples": 9, "massive": [],
    }  # fmt: skip
    said, sentence = verdict(found)
    assert said == word
    assert sentence.lower().startswith(("no better", "better than random", "matters less"))


def test_false_alarms_of_random_selections_are_rare():
    model, batches = planted()
    bells = 0
    for seed in range(12):
        where = choose(model, 3, 30).random_like(seed, outside=True)
        found = evidence(model, where, batches[:2], controls=6, draws=100, seed=seed)
        bells += found["verdict"] == "better than its controls"
    assert bells <= 2


def test_data_it_was_located_on_is_refused_or_dropped():
    model, batches = planted()
    scores = ng.locate(model, batches[:1], by="grad_x_act")
    where = scores.top(count=2)
    assert scores.card["examples"] == row_digests(batches[:1])
    with pytest.raises(ng.RequestError, match="4 examples on which this selection was located"):
        ng.evidence(model, where, batches, controls=2, draws=20)
    loose = ng.evidence(model, where, batches, controls=2, draws=20, overlap="drop").as_dict()
    assert loose["examples"] == 8
    assert (loose["provenance"]["dropped"], loose["provenance"]["disjoint"]) == (4, True)
    singly = [one for batch in batches for one in singles(batch)]
    with pytest.raises(ng.RequestError, match="4 examples"):
        ng.evidence(model, where, singly, controls=2, draws=20)
    assert ng.evidence(model, where, batches[1:], controls=2, draws=20, limit=3).as_dict()["examples"] == 3


def test_combined_selections_remember_the_data_of_both():
    model = pico("llama")
    rows = [
        {k: v[i] for k, v in b.items()}
        for s in range(3)
        for b in [pico_batch(model, batch=4, seed=s)]
        for i in range(4)
    ]
    one, two = (ng.locate(model, part, units="neuron").top(count=4) for part in (rows[:4], rows[4:8]))
    for both in (one | two, one - two, ~(one & two), (one | two) & one):
        assert len(located_on(both)) == 8
    with pytest.raises(ng.RequestError, match="4 examples on which this selection was located"):
        ng.evidence(model, one | two, rows[4:], controls=1)


def test_stability_over_halves_and_overlap_with_protected():
    model, batches = planted()
    where = ng.locate(model, batches[:1], by="grad_x_act").top(count=2)
    found = ng.evidence(
        model,
        where,
        batches[1:],
        controls=2,
        draws=20,
        stability=True,
        protected={"twin": where, "other": choose(model, 5)},
    ).as_dict()
    assert found["stability"]["halves"]["jaccard"] > 0.3
    assert found["protected"]["twin"]["jaccard"] == 1.0
    assert found["protected"]["other"]["shared"] == 0
    noise = ng.locate(model, batches[:1], by="noise").top(count=2)
    with pytest.raises(ng.RequestError, match="made by hand"):
        ng.evidence(model, choose(model, 3), batches, controls=2, draws=20, stability=True)
    called = []
    ng.evidence(
        model, noise, batches[1:], controls=2, draws=20, relocate=lambda half: called.append(len(half)) or noise
    )
    assert called == [4, 4]


def test_other_objectives_run_example_by_example_and_means_may_replace():
    model, batches = planted()
    where = choose(model, 3, 30)
    auto = ng.evidence(model, where, batches, controls=2, draws=20).as_dict()
    free = ng.evidence(
        model, where, batches, controls=2, draws=20, objective=lambda step: step.mean(-step.log_probs)
    ).as_dict()
    assert free["effect"]["value"] == pytest.approx(auto["effect"]["value"], rel=0.3)
    assert free["examples"] == auto["examples"]
    mean = ng.evidence(model, where, batches, controls=2, draws=20, silence="mean").as_dict()
    assert mean["effect"]["value"] != auto["effect"]["value"]


@pytest.mark.parametrize("family", ["bert", "vit", "t5", "mixtral"])
def test_other_families(family):
    model = pico(family)
    batches = [pico_batch(model, seed=s) for s in range(2)]
    where = sites(model, "neuron")
    found = ng.evidence(model, Selection.of(where, {next(iter(where)): [0, 1, 2]}), batches, controls=2, draws=20)
    assert found.as_dict()["examples"] == 4


def test_bad_requests():
    model, batches = planted()
    with pytest.raises(ng.RequestError, match="no unit"):
        ng.evidence(model, choose(model), batches)
    with pytest.raises(ng.RequestError, match="1 labelled examples"):
        ng.evidence(model, choose(model, 3), batches, limit=1)
    with pytest.raises(ng.RequestError, match="did you mean"):
        ng.evidence(model, choose(model, 3), batches, overlap="drp")
    with pytest.raises(ng.RequestError, match="no selection"):
        ng.evidence(model, None, batches)
