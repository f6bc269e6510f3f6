"""SPARCOM: rates by hand on dense and routed models, planted experts, general and unique sets, alteration by tuning.

One bar is missed. Of two Markov languages that a base knows, one is tuned on further; asked: its neurons' share of
gained and lost exceeds the other's; reached -0.04 on the mean of three seeds, with either sign. The likely reason: the
other language, no longer rehearsed, drifts as far. Tried: tuning on a new grammar of the same words instead, where more
neurons are gained in the tuned language, yet the shares stay equal; bars of 0.8 and 0.9.
"""

from contextlib import contextmanager
from functools import cache

import pytest
import torch

import neurograft as ng
from neurograft.anatomy.sites import sites
from neurograft.audits.alteration import alteration
from neurograft.core.errors import RequestError
from neurograft.core.grafts.graft import Graft
from neurograft.core.resolve import resolve
from neurograft.core.selection import Selection
from neurograft.core.taps.rates import Rates, rates
from neurograft.core.units import Part, Site
from neurograft.core.venn import general, pairwise, unique
from neurograft.pipeline.attach import attach
from neurograft.pipeline.run import run
from neurograft.train.loop import fit
from neurograft.worlds.languages import languages
from neurograft.worlds.pico import pico
from neurograft.worlds.tiny import fit as learn
from neurograft.worlds.tiny import llama
from tests.proofs import bar, effect, note, patched

PAPER, SCALE = "sparcom", "identity"
TOPICS = ("maths", "code", "news")


@contextmanager
def experts_count_their_own_tokens_only():
    """A neuron's rate is divided by the tokens of its expert, so that experts look used by all."""
    with patched("neurograft.core.taps.rates", "routed", lambda site: False):
        yield


@contextmanager
def padding_counts():
    """Padded tokens count for the firing of a neuron."""
    plain = resolve("neurograft.core.taps.stream.observe")

    def all_of_it(model, where, batches, make, **how):
        return plain(model, where, [{"input_ids": b["input_ids"]} for b in batches], make, **how)

    with patched("neurograft.core.taps.rates", "observe", all_of_it):
        yield


@contextmanager
def unique_is_what_the_next_group_lacks():
    """Only one other category is taken away, not the union of all others."""

    def lazy(found):
        names = list(found)
        return {n: found[n] - found[names[(i + 1) % len(names)]] for i, n in enumerate(names)}

    with patched("neurograft.pipeline.specific", "unique", lazy):
        yield


BROKEN = (experts_count_their_own_tokens_only, padding_counts, unique_is_what_the_next_group_lacks)


def texts(topic, count=8, length=10, seed=0):
    """Rows of one topic's own words, the second half of them padded by two."""
    rng = torch.Generator().manual_seed(100 * seed + topic)
    tokens = torch.randint(4 + 20 * topic, 24 + 20 * topic, (count, length), generator=rng)
    mask = torch.ones_like(tokens)
    mask[count // 2 :, -2:] = 0
    return [{"input_ids": tokens.masked_fill(mask == 0, 3), "attention_mask": mask}]


POOL = {name: texts(i) for i, name in enumerate(TOPICS)}


def test_rates_equal_a_hand_count_and_padding_does_not_count():
    model = pico("llama")
    where = sites(model, "neuron", at="gate")
    found = rates(model, where, POOL)
    bare = {  # each row alone, its padding cut off
        topic: [
            {"input_ids": row[m.bool()][None]} for b in batches for row, m in zip(b["input_ids"], b["attention_mask"])
        ]
        for topic, batches in POOL.items()
    }
    assert found.tokens == (72, 72, 72)
    again = rates(model, where, bare)
    for i, layer in enumerate(model.model.layers):
        for k, topic in enumerate(TOPICS):
            fired = torch.zeros(48)
            hook = layer.mlp.gate_proj.register_forward_hook(lambda m, a, out, f=fired: f.add_((out[0] > 0).sum(0)))
            for row in bare[topic]:
                with torch.no_grad():
                    model(**row)
            hook.remove()
            name = f"model.layers.{i}.mlp/neuron@gate"
            assert (found.rate[name][k] * 72).round().tolist() == fired.tolist()
            assert torch.equal(found.rate[name], again.rate[name])


def test_routed_shares_add_up_to_top_k_and_no_rate_exceeds_its_experts_share():
    model = pico("mixtral")
    found = rates(model, sites(model, "neuron"), POOL)
    for layer in range(2):
        mine = [n for n in found.share if f"layers.{layer}." in n]
        total = torch.stack([found.share[n] for n in mine]).sum(0)
        assert total.tolist() == pytest.approx([model.config.num_experts_per_tok] * 3, abs=1e-12)
        assert all((found.rate[n] <= found.share[n][:, None]).all() for n in mine)
    inside = found.within()
    assert max(float(v.max()) for v in inside.values()) <= 1.0
    n = next(n for n in mine if 0 < float(found.share[n][0]) < 1)
    assert (inside[n][0] * found.share[n][0]).tolist() == pytest.approx(found.rate[n][0].tolist())


PLANTED = {"maths": (0, 1), "code": (1, 2), "news": (2, 3)}


def routed_world(seed=0):
    """A mixture of four experts whose routers read from a word's embedding which topic it is of."""
    model = pico("mixtral", seed=seed)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, :3] = 0
        for i in range(3):
            model.model.embed_tokens.weight[4 + 20 * i : 24 + 20 * i, i] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:3] = 0
            layer.mlp.experts.down_proj[:, :3] = 0
            layer.mlp.gate.weight.mul_(0.01)
            for i, topic in enumerate(TOPICS):
                for rank, expert in enumerate(PLANTED[topic]):
                    layer.mlp.gate.weight[expert, i] = 4.0 - rank
    return model


def test_planted_experts_are_located_with_their_overlap():
    for seed in range(3):
        out = run("sparcom", routed_world(seed), rows(), changes={"expert_share": 0.5, "lr": 1e-4})
        for topic, chosen in out.state["experts"].items():
            assert [ids.tolist() for ids in chosen.ids.values()] == [list(PLANTED[topic])] * 2
        overlaps = {(p["first"], p["second"]): p["jaccard"] for p in pairwise(out.state["experts"])}
        assert overlaps == pytest.approx({("maths", "code"): 1 / 3, ("maths", "news"): 0.0, ("code", "news"): 1 / 3})


def rows():
    return [
        {"input_ids": ids[m.bool()].tolist(), "labels": ids[m.bool()].tolist(), "group": topic}
        for topic, batches in POOL.items()
        for b in batches
        for ids, m in zip(b["input_ids"], b["attention_mask"])
    ]


def always_on(units=(5, 9)):
    model = pico("llama", mlp_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.bias[list(units)] = 100.0
    return model


def test_a_neuron_that_is_always_on_is_general_and_never_unique():
    for least in (0.6, 0.8, 0.9, 0.95, 1.0):
        model = always_on()
        out = run("sparcom", model, rows(), changes={"least": least})
        assert out.graft.numel == sum(p.numel() for p in model.parameters())
        assert all({5, 9} <= set(ids.tolist()) for ids in out.state["general"].ids.values())
        for topic, mine in out.state["unique"].items():
            assert not any({5, 9} & set(ids.tolist()) for ids in mine.ids.values())
            others = [out.state["specific"][o] for o in TOPICS if o != topic]
            assert mine.digest == (out.state["specific"][topic] - (others[0] | others[1])).digest
        for pair in out.state["pairs"]:
            assert pair["shared"] >= 4
            a, b = (out.state["specific"][pair[k]] for k in ("first", "second"))
            chance = sum(len(a.ids[n]) * len(b.ids[n]) / 48 for n in a.ids)
            assert pair["expected"] == pytest.approx(chance)
            assert pair["overlap"] == pair["shared"] / min(len(a), len(b))
        assert set(out.state["alteration"]) == set(TOPICS)


def test_experts_that_are_modules_of_their_own_are_located_too():
    """Two experts with a weight each; 3 of 4 tokens of one group and 1 of 4 of the other reach the second."""
    neurons = {f"e.{e}/neuron": Site(f"e.{e}/neuron", "neuron", 5, (Part.rows(f"e.{e}.up", (5, 3)),)) for e in (0, 1)}
    experts = {f"e.{e}": Site(f"e.{e}", "expert", 1, (Part(f"e.{e}.up", ((1, 15),), run=15),)) for e in (0, 1)}
    share = {"e.0/neuron": torch.tensor([0.25, 0.75]), "e.1/neuron": torch.tensor([0.75, 0.25])}
    found = Rates(("a", "b"), {n: torch.zeros(2, 5) for n in neurons}, share, (4, 4))
    for least, a, b in ((0.75, (0, 1), (1, 0)), (0.25, (1, 1), (1, 1)), (0.8, (0, 0), (0, 0))):
        chosen = found.experts(neurons, experts, least)
        assert [tuple(chosen[g].counts().values()) for g in ("a", "b")] == [a, b]
    with pytest.raises(RequestError, match="neurons of no expert"):
        found.experts(neurons, {}, 0.5)


def test_sets_by_hand():
    site = {"s": Site("s", "neuron", 6, layer=2)}
    a, b, c = (Selection.of(site, {"s": ids}) for ids in ([0, 1, 2], [0, 2, 3], [0, 3, 4]))
    found = {"a": a, "b": b, "c": c}
    assert general(found).ids["s"].tolist() == [0]
    assert {n: s.ids["s"].tolist() for n, s in unique(found).items()} == {"a": [1], "b": [], "c": [4]}
    first = pairwise(found)[0]
    assert (first["shared"], first["jaccard"], first["overlap"], first["expected"]) == (2, 0.5, 2 / 3, 1.5)


def test_alteration_by_hand_and_of_nothing():
    model, tuned = always_on((5, 9)), always_on((5, 7))
    with torch.no_grad():
        for layer in tuned.model.layers:
            layer.mlp.gate_proj.bias[9] = -100.0
    plain = [n for n, s in sites(model, "neuron", at="gate").items()]
    found = alteration(model, tuned, groups=POOL, least=1.0)
    base = rates(model, sites(model, "neuron", at="gate"), POOL)
    for k, topic in enumerate(TOPICS):
        there = sum(bool(base.rate[n][k, 7] >= 1.0) for n in plain)
        assert sum(found[topic]["gained"].values()) >= 2 - there
        assert found[topic]["lost"]["0"] >= 1
        assert found[topic]["moved"] > 0
    nothing = alteration(model, Graft(), groups=POOL, least=0.9)
    assert all(f["moved"] == 0.0 and not any(f["gained"].values()) for f in nothing.values())
    assert all(f["overlap"]["jaccard"] == 1.0 for f in nothing.values())


def test_bad_requests():
    model = pico("llama")
    with pytest.raises(RequestError, match="units='expert'"):
        run("sparcom", model, rows(), changes={"expert_share": 0.5})
    two_sided = pico("switch_transformers")
    with pytest.raises(RequestError, match="experts of an encoder-decoder"):
        rates(two_sided, sites(two_sided, "neuron"), POOL)
    with pytest.raises(RequestError, match="a column `group`"):
        run("sparcom", model, [{"input_ids": [5, 6], "labels": [5, 6]}])
    with pytest.raises(RequestError, match="1 selection"):
        general({"a": Selection.of({}, {})})


@cache
def base(seed):
    """A decoder that has seen two languages as often."""
    model = llama(seed, intermediate_size=256)
    data = [b for n in ("ada", "bel") for b in languages(n, count=40, batch=16, world=seed, seed=seed)]
    order = torch.Generator().manual_seed(seed)
    return learn(model, [data[i] for i in torch.randperm(len(data), generator=order).tolist()]).eval()


@effect
def test_tuning_on_one_category_alters_that_categorys_neurons_more():
    """Full tuning on new sentences of the one; 3 seeds, the published kind of bar, and silence of the unique sets."""
    more, harm = [], []
    moved = {"tuned": [], "other": []}
    for seed in range(3):
        model = base(seed)
        pool = {n: languages(n, count=4, world=seed, seed=50 + seed) for n in ("ada", "bel")}
        data = languages("ada", count=8, batch=16, world=seed, seed=77 + seed)
        with attach(model, adapter="dense") as live:
            fit(live, data, steps=40, lr=1e-3, seed=seed)
            model.eval()
            graft = live.graft()
        found = alteration(model, graft, groups=pool, least=0.8)
        moved["tuned"].append(found["ada"]["moved"])
        moved["other"].append(found["bel"]["moved"])
        more.append(found["ada"]["moved"] - found["bel"]["moved"])
        harm.append(silence(model, pool, seed))
    note(moved=str({k: [round(v, 3) for v in vs] for k, vs in moved.items()}))
    bar("share of neurons moved in the tuned category beyond that in the other", more, at_least=0.0, missed=True)
    bar("nats that silence of a category's unique neurons costs it beyond the other", harm, at_least=0.0)


def silence(model, pool, seed):
    """Return how much more its own unique neurons' silence costs a category than the other's do."""
    where = sites(model, "neuron", at="gate")
    mine = unique(rates(model, where, pool).often(where, 0.8))
    tests = {n: languages(n, count=2, world=seed, seed=1000 + seed) for n in pool}

    def losses():
        with torch.no_grad():
            return {n: sum(float(model(**b).loss) for b in batches) / len(batches) for n, batches in tests.items()}

    before, total = losses(), 0.0
    for own, other in (("ada", "bel"), ("bel", "ada")):
        with ng.intervene(model, mine[own], "zero"):
            after = losses()
        total += (after[own] - before[own]) - (after[other] - before[other])
    return total / 2
