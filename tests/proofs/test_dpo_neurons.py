"""DPO neurons: exact shares of a change along a direction, eight groups that partition, patching beside ablation.

One bar is missed. In a tiny model with a class of bad words, DPO of gate and up rows lowers their log-probability.
Asked: pinning the four groups to their tuned means recovers 80 % of that; reached: 32 % over three seeds. The likely
reason: a mean holds nothing of what a neuron does token by token, which at this size is much of it; pinning all neurons
to their means recovers 61 %, at a higher cost. Tried: DPO of every parameter, whose effect goes around the neurons, so
that patches recover nothing; a higher rate; adding the difference of the means instead of pinning (42 % on one seed).
The order is the paper's: four groups, then TP- alone, then silence of the 5 % of neurons that write most along the
direction, which recovers nothing.
"""

import json
import tempfile
from contextlib import contextmanager, nullcontext
from functools import reduce
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import neurograft as ng
from neurograft.anatomy.sites import sites
from neurograft.audits.decompose_change import along, decompose_change, table
from neurograft.core.errors import RequestError
from neurograft.core.grafts.graft import Graft
from neurograft.core.kinds import LOWERING, RAISING
from neurograft.core.resolve import resolve
from neurograft.core.selection import Scores, Selection
from neurograft.core.taps.projection import Projection, projected
from neurograft.core.units import Site
from neurograft.pipeline.attach import attach
from neurograft.pipeline.run import run
from neurograft.train.loop import fit
from neurograft.worlds.languages import FIRST, OWN, languages
from neurograft.worlds.pico import pico, pico_batch
from neurograft.worlds.tiny import fit as learn
from neurograft.worlds.tiny import llama
from tests.proofs import bar, effect, note, patched

PAPER, SCALE = "dpo-neurons", "identity"


@contextmanager
def what_neurons_write_is_read_in_the_base_alone():
    """The changed model's down projection is taken to be the base's."""
    plain, first = resolve("neurograft.core.taps.projection._read"), []

    def stale(*args):
        found, vectors = plain(*args)
        first.append(vectors)
        return found, first[(len(first) - 1) // 2 * 2]

    with patched("neurograft.core.taps.projection", "_read", stale):
        yield


@contextmanager
def before_and_after_are_swapped():
    """Neurons that moved so that more is written count as lowering."""
    plain = resolve("neurograft.core.taps.projection.Projection")
    swapped = lambda p: plain(p.sites, p.after, p.before, p.along, p.along_after)  # noqa: E731
    groups = plain.groups
    with patched(plain, "groups", lambda self: groups(swapped(self))):
        yield


@contextmanager
def patches_hold_the_base_means():
    """What is pinned is what the base did anyway."""
    plain = resolve("neurograft.audits.decompose_change.along")

    class Stale:
        def __init__(self, found):
            self.groups, self.after, self.drop, self.sites = found.groups, found.before, found.drop, found.sites

    with patched("neurograft.pipeline.patched", "along", lambda *a, **k: Stale(plain(*a, **k))):
        yield


BROKEN = (what_neurons_write_is_read_in_the_base_alone, before_and_after_are_swapped, patches_hold_the_base_means)


def shaken(family, seed=0, only=""):
    """The same model with noise on the parameters whose names hold a word."""
    model, rng = pico(family), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if only in name:
                p.add_(0.05 * torch.randn(p.shape, generator=rng))
    return model


def direction(seed=0, d=32):
    return torch.randn(d, generator=torch.Generator().manual_seed(seed)) * 3


@torch.no_grad()
def written(model, batch, w, down):
    """Return the mean of (FFN output - bias) . w / ||w|| over real tokens, layer by layer, from plain hooks."""
    found, hooks = [], []
    for layer in model.model.layers:
        module = layer.mlp.get_submodule(down)
        bias = 0.0 if module.bias is None else module.bias

        def hook(m, args, out, bias=bias):
            real = batch["attention_mask"].bool()
            found.append(float(((out - bias)[real] @ (w / w.norm())).mean()))

        hooks.append(module.register_forward_hook(hook))
    model(**batch)
    for one in hooks:
        one.remove()
    return torch.tensor(found, dtype=torch.float64)


def test_the_parts_sum_to_the_change_of_the_projected_output():
    """Every parameter moved, down projections too; one family with biases."""
    for family, down in (("llama", "down_proj"), ("phi", "fc2")):
        base, tuned, w = pico(family), shaken(family), direction()
        batch = pico_batch(base, batch=4)
        found = along(base, tuned, [batch], direction=w)
        drops = torch.stack([d.sum() for d in found.drop().values()])
        literal = written(base, batch, w, down) - written(tuned, batch, w, down)
        torch.testing.assert_close(drops, literal, rtol=0, atol=1e-5)
        assert float(literal.abs().max()) > 1e-3
        report = decompose_change(base, tuned, [batch], direction=w)
        assert report["net"] == pytest.approx(float(literal.sum()), abs=1e-5)
        assert sum(g["drop"] for g in report["groups"].values()) == pytest.approx(report["net"], abs=1e-9)
        nothing = decompose_change(base, Graft(), [batch], direction=w)
        assert (nothing["net"], nothing["positive"]) == (0.0, 0.0)
        assert all(nothing["groups"][g]["units"] == 0 for g in LOWERING)


def test_the_groups_partition_and_lower_where_what_is_written_is_unchanged():
    base, w = pico("llama"), direction(1)
    batch = pico_batch(base, batch=4)
    with_down, without = shaken("llama", 1), shaken("llama", 1, only="gate_proj")
    for tuned in (with_down, without):
        groups = along(base, tuned, [batch], direction=w).groups()
        assert set(groups) == {*LOWERING, *RAISING}
        assert sum(len(g) for g in groups.values()) == 96
        assert len(reduce(lambda a, b: a | b, groups.values())) == 96
    shares = decompose_change(base, without, [batch], direction=w)["groups"]
    assert all(shares[g]["drop"] > 0 and shares[g]["lowers"] for g in LOWERING)
    assert all(shares[g]["drop"] <= 0 for g in RAISING)


def test_groups_and_shares_by_hand():
    """Eight neurons, one in each group; drops 1, 2, 3, 4 and -1, -1, -1, 0; v scaled by 2 in none."""
    before = torch.tensor([2.0, -1, 1, -5, 1, -3, 2, -1], dtype=torch.float64)
    after = torch.tensor([1.0, -3, 4, -1, 2, -2, 1, -1], dtype=torch.float64)
    v = torch.tensor([1.0, 1, -1, -1, 1, 1, -1, -1], dtype=torch.float64)
    site = {"s": Site("s", "neuron", 8)}
    found = Projection(site, {"s": before}, {"s": after}, {"s": v}, {"s": v})
    ids = {name: chosen.ids["s"].tolist() for name, chosen in found.groups().items()}
    assert ids == {name: [i] for i, name in enumerate((*LOWERING, *RAISING))}
    report = table(found, top=2)
    assert (report["net"], report["positive"]) == (7.0, 10.0)
    assert [report["groups"][g]["share"] for g in LOWERING] == [0.1, 0.2, 0.3, 0.4]
    assert [(n["unit"], n["drop"]) for n in report["neurons"]] == [(3, 4.0), (2, 3.0)]
    assert report["curve"] == {50: 2, 80: 3, 90: 3, 100: 4}


def row(tokens):
    return {"input_ids": tokens.tolist()}


def test_the_recipe_pins_the_four_groups_to_the_tuned_models_means():
    model, tuned = pico("llama"), shaken("llama")
    text = languages("ada", count=1, batch=12)[0]["input_ids"]
    data = [{**row(r), "labels": r.tolist()} for r in text[:4]]
    with tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch) / "probe.jsonl"
        probe.write_text(
            "\n".join(json.dumps({"positive": row(a), "negative": row(b)}) for a, b in zip(text[4:8], text[8:12]))
        )
        tuned.save_pretrained(Path(scratch) / "tuned")
        out = run(
            "dpo_neurons", model, data, changes={"post": str(Path(scratch) / "tuned"), "probe": str(probe), "C": 100.0}
        )
        assert "tune" not in [s["do"] for s in ng.recipe("dpo_neurons", post="x").steps]
        brisk = run("dpo_neurons", model, data, changes={"probe": str(probe), "lr": 1e-2, "groups": ["TP-"]})
    (w,) = out.state["direction"].values.values()
    batch = {"input_ids": text[:4], "attention_mask": torch.ones_like(text[:4])}
    twin = along(model, tuned, [batch], direction=w)
    four = reduce(lambda a, b: a | b, (twin.groups()[g] for g in LOWERING))
    assert out.where.digest == four.digest
    assert out.state["decomposition"]["net"] == pytest.approx(table(twin)["net"])
    seen = {}
    with torch.no_grad(), out.graft.on(model):
        hooks = [
            layer.mlp.down_proj.register_forward_pre_hook(lambda m, a, i=i: seen.update({i: a[0]}))
            for i, layer in enumerate(model.model.layers)
        ]
        model(**batch)
    for hook in hooks:
        hook.remove()
    for i in (0, 1):
        name = f"model.layers.{i}.mlp/neuron"
        pinned = seen[i][..., four.ids[name]]
        torch.testing.assert_close(pinned, twin.after[name][four.ids[name]].float().expand_as(pinned))
    assert brisk.state["where"].digest != out.where.digest


def test_bad_requests():
    base = pico("llama")
    batch = [pico_batch(base)]
    with pytest.raises(RequestError, match="no direction"):
        decompose_change(base, Graft(), batch)
    with pytest.raises(RequestError, match="length 0"):
        decompose_change(base, Graft(), batch, direction=torch.zeros(32))
    with pytest.raises(RequestError, match="a direction of 31 numbers"):
        decompose_change(base, Graft(), batch, direction=torch.ones(31))
    routed = pico("mixtral")
    with pytest.raises(RequestError, match="inside of an expert"):
        projected(routed, nullcontext(routed), sites(routed, "neuron"), [pico_batch(routed)], torch.ones(32))
    for groups, said in ((["TP"], "'TP'"), ([], "no groups")):
        with pytest.raises(RequestError, match=said):
            run("dpo_neurons", base, [{"positive": row(torch.arange(5)), "negative": row(torch.arange(9, 14))}] * 3,
                changes={"post": "none", "groups": groups})  # fmt: skip


BAD = slice(FIRST + 2 * OWN, FIRST + 3 * OWN)  # words of another language, which come in bursts


def spoilt(seed, count, *, start, stay, name):
    """Sentences of one language in which bad words come in bursts."""
    rng, found = torch.Generator().manual_seed(1000 * seed + name), []
    for batch in languages("ada", count=count, batch=16, world=seed, seed=name):
        tokens = batch["input_ids"].clone()
        bad, drawn = torch.zeros(tokens.shape, dtype=torch.bool), torch.rand(tokens.shape, generator=rng)
        for t in range(1, tokens.shape[1]):
            bad[:, t] = drawn[:, t] < torch.where(bad[:, t - 1], stay, start)
        tokens = torch.where(bad, torch.randint(BAD.start, BAD.stop, tokens.shape, generator=rng), tokens)
        found.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()})
    return found


def said(model, batch):
    logits = model(input_ids=batch["input_ids"]).logits[:, -2]
    return logits.log_softmax(-1).gather(1, batch["input_ids"][:, -1:])[:, 0]


def preferences(model, seed):
    """Return pairs of the language's own last word and a bad one, and DPO's loss on them, beta = 0.1."""
    rng, found = torch.Generator().manual_seed(seed + 7), []
    for batch in languages("ada", count=8, batch=16, world=seed, seed=900 + seed):
        good, bad = batch["input_ids"], batch["input_ids"].clone()
        bad[:, -1] = torch.randint(BAD.start, BAD.stop, (len(bad),), generator=rng)
        tokens = torch.cat([good, bad])
        labels = torch.full_like(tokens, -100)
        labels[:, -1] = tokens[:, -1]
        made = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
        with torch.no_grad():
            found.append({**made, "reference": said(model, made)})
    known = {int(b["input_ids"].double().mul(torch.arange(1, 17)).sum() * 16): b.pop("reference") for b in found}

    def dpo(net, batch):
        gain = said(net, batch) - known[int(batch["input_ids"].double().mul(torch.arange(1, 17)).sum() * 16)]
        chosen, rejected = gain.chunk(2)
        return -F.logsigmoid(0.1 * (chosen - rejected)).mean()

    return found, dpo


@effect
def test_patching_the_four_groups_beside_tp_alone_and_ablation():
    record = {"four": [], "tp": [], "ablated": [], "every": []}
    cost = {name: [] for name in record}
    for seed in range(3):
        model = learn(llama(seed, intermediate_size=256), spoilt(seed, 100, start=0.1, stay=0.8, name=1)).eval()
        clean = languages("ada", count=4, world=seed, seed=6)

        def measured(model=model, clean=clean):
            with torch.no_grad():
                logp = [model(input_ids=b["input_ids"]).logits.log_softmax(-1)[..., BAD] for b in clean]
                return (
                    float(torch.cat([x.logsumexp(-1).flatten() for x in logp]).mean()),
                    sum(float(model(**b).loss) for b in clean) / len(clean),
                )

        toxic = spoilt(seed, 4, start=0.9, stay=0.95, name=8)
        by = ("probe", {"fit": "l2", "score": "weight", "pool": "mean"})
        read = {"units": "channel", "at": "residual", "layers": [-1]}
        (w,) = ng.locate(model, {"positive": toxic, "negative": clean}, by=by, **read).values.values()
        base, where = measured(), sites(model, "neuron")
        everything = Selection.of(where, {n: torch.arange(s.n) for n, s in where.items()})
        pairs, dpo = preferences(model, seed)
        with attach(model, everything.of_parts(0, 1)) as live:
            fit(live, pairs, steps=60, lr=1e-3, objective=dpo, seed=seed)
            model.eval()
            graft, tuned = live.graft(), measured()
        found = along(model, graft, clean, direction=w)
        groups = found.groups()
        four = reduce(lambda a, b: a | b, (groups[g] for g in LOWERING))
        most = Scores(where, {n: v.float() for n, v in found.along.items()}).top(fraction=0.05)
        for name, chosen in (("four", four), ("tp", groups["TP-"]), ("every", everything), ("ablated", most)):
            values = {n: found.after[n][ids].float() for n, ids in chosen.ids.items() if len(ids)}
            how = {"kind": "zero"} if name == "ablated" else {"kind": "pin", "value": values}
            with ng.intervene(model, chosen, **how):
                now = measured()
            record[name].append((now[0] - base[0]) / (tuned[0] - base[0]))
            cost[name].append(now[1] - base[1])
    note(recovered=json.dumps(record), cost_in_nats=json.dumps(cost))
    bar("share of the change that patching the four groups recovers", record["four"], at_least=0.8, missed=True)
    less = [a - b for a, b in zip(record["four"], record["tp"])]
    bar("recovered by the four groups beyond TP- alone", less, at_least=0.05)
    less = [a - b for a, b in zip(record["four"], record["ablated"])]
    bar("recovered by the four groups beyond silence of the neurons that write most", less, at_least=0.05)
