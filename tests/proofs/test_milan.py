"""MILAN: exemplars as by brute force, descriptions by weighted information, and tag-sensitive units of a misled CNN.

The card's captioner is trained here on synthetic pairs of a generic and a specific name; the CNN's units are described
by the closed vocabulary that is taught on synthetic scenes, which have neither digits nor these tags.

The CNN's size, the digits' contrast, the tags' colours and the query were picked on the first two of the three seeds,
over about ten settings: where digits are easy the network does not follow the tags and there is little to repair. The
gain is a mean; on one seed random units did as well. Right tags get lost with wrong ones, so accuracy on half-tagged
digits falls too (recorded). With 400 held-out digits instead of 200, ordering all units by what they cost, without any
description, gained more than the described ones on one seed of three (0.19 to 0.36 against 0.21 with 30 units).
"""

import itertools
import json
import tempfile
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import neurograft as ng
from neurograft.anatomy.sites import sites
from neurograft.core.choose import choose
from neurograft.core.context import Context
from neurograft.core.errors import RequestError
from neurograft.core.resolve import resolve
from neurograft.core.seeds import generator
from neurograft.core.selection import Selection
from neurograft.core.taps.describe import TokenWords, describe
from neurograft.core.taps.exemplars import exemplify
from neurograft.core.taps.reducers import Sample
from neurograft.core.taps.shown import Exemplified, Shown
from neurograft.core.units import Site, Tap
from neurograft.networks._speech import START, STOP, Vocabulary, beams
from neurograft.networks.captioner import Captioner, captioner
from neurograft.networks.pyramid import Pyramid
from neurograft.networks.saved import load_describer, save_describer
from neurograft.networks.word_scorer import word_scorer
from neurograft.pipeline.recipe import recipe
from neurograft.pipeline.run import run
from neurograft.worlds.pico import pico, pico_batch
from neurograft.worlds.scenes import scenes
from neurograft.worlds.tiny import accuracy
from tests.proofs import bar, effect, note, patched
from tests.proofs._tagged import misled

PAPER, SCALE = "milan", "tiny"


@contextmanager
def the_prior_is_forgotten():
    """Descriptions are chosen by p(d | E) alone, whatever lambda is."""
    with patched("neurograft.core.taps.describe", "weighed", lambda likelihood, prior, lam: likelihood):
        yield


@contextmanager
def masks_begin_at_the_median():
    """A unit counts as active where it is above its median instead of its 0.99 quantile."""
    plain = Sample.quantile
    with patched(Sample, "quantile", lambda self, q: plain(self, 0.5)):
        yield


@contextmanager
def the_units_that_cost_most_go_first():
    """Candidates are ordered by the accuracy lost, not by the accuracy left."""
    plain = resolve("neurograft.locators.spared.scored")

    def turned(context, values, card):
        return plain(context, {n: torch.where(v < 0, v, 1 - v) for n, v in values.items()}, card)

    with patched("neurograft.locators.spared", "scored", turned):
        yield


BROKEN = (the_prior_is_forgotten, masks_begin_at_the_median, the_units_that_cost_most_go_first)


class Shows(nn.Module):
    """A model whose channels are the pixels themselves, and whose classes are sums of them."""

    def __init__(self, weights=None):
        super().__init__()
        self.tap, self.weights = nn.Identity(), weights

    def forward(self, pixel_values, labels=None):
        maps = self.tap(pixel_values)
        sums = maps.flatten(2).mean(-1)
        return SimpleNamespace(logits=sums if self.weights is None else sums @ self.weights)


def channels(n):
    return {"s": Site("s", "channel", n, tap=Tap("tap", dim=1))}


def test_exemplars_level_and_masks_are_those_of_brute_force():
    """Fifty maps of ten by ten: 5,000 random activations of each of six units."""
    x = torch.randn(50, 6, 10, 10, generator=generator(0, "maps"))
    batches = [{"pixel_values": part} for part in x.split(8)]
    found = exemplify(Shows(), channels(6), batches)["s"]
    best = x.amax((2, 3)).topk(15, dim=0)
    assert torch.equal(found.values, best.values)
    assert torch.equal(found.examples, best.indices)
    everything = x.movedim(1, 0).reshape(6, -1)
    level = everything.quantile(0.99, dim=1)
    torch.testing.assert_close(found.level, level, rtol=0, atol=0)
    for unit in range(6):
        maps = x[best.indices[:, unit], unit]
        assert torch.equal(found.maps[unit], maps)
        wide = F.interpolate(maps[:, None], size=(20, 20), mode="bilinear")[:, 0]
        assert torch.equal(found.mask(unit, (20, 20)), wide > level[unit])
        assert torch.equal(found.shown(unit, batches).masks, maps > level[unit])


def test_a_streamed_quantile_is_within_a_hundredth():
    x = torch.randn(50, 6, 10, 10, generator=generator(0, "maps"))
    off = []
    for seed in range(3):
        found = exemplify(Shows(), channels(6), [{"pixel_values": x}], sampled=2500, seed=seed)["s"]
        rank = (x.movedim(1, 0).reshape(6, -1) <= found.level[:, None]).double().mean(1)
        off.append(float((rank - 0.99).abs().max()))
    bar("rank of the streamed 0.99 quantile off by, largest of six units", off, at_most=0.01)


def test_masks_are_upsampled_before_they_are_cut():
    """Two columns 0 and 1, drawn over four pixels: 0, 1/4, 3/4, 1."""
    maps = torch.tensor([[0.0, 1.0], [0.0, 1.0]])[None, None]
    shown = Exemplified(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long), torch.tensor([0.5]), maps)
    assert shown.mask(0, (4, 4))[0].tolist() == [[False, False, True, True]] * 4
    low = Exemplified(shown.values, shown.examples, torch.tensor([0.2]), maps)
    assert low.mask(0, (4, 4))[0].tolist() == [[False, True, True, True]] * 4


def test_where_the_level_is_the_maximum_the_places_at_it_count():
    maps = torch.tensor([[[1.0, 1.0, 0.0, -torch.inf]], [[2.0, 2.0, 2.0, -torch.inf]]])
    tied = Exemplified(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.long), torch.tensor([1.0, 2.0]), maps)
    assert tied.mask(0).tolist() == [[True, True, False, False]]
    assert not tied.mask(1).any()


def test_tokens_of_a_picture_are_its_patches_behind_what_stands_before_them():
    maps = torch.tensor([[9.0, 0.0, 1.0, 2.0, 3.0]])[None]  # a class token, then two by two patches
    shown = Exemplified(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long), torch.tensor([1.5]), maps)
    assert shown.mask(0, (2, 2))[0].tolist() == [[False, False], [True, True]]
    with pytest.raises(RequestError, match="square"):
        shown.mask(0, (2, 4))


class Says:
    """A describer with a table of texts: (log p(d | E), log p(d))."""

    identity = "table"

    def __init__(self, table):
        self.table = {text: tuple(torch.tensor(pair).log().tolist()) for text, pair in table.items()}

    def propose(self, shown, *, beam, length):
        found = sorted(self.table, key=lambda t: -self.table[t][0])[:beam]
        return [(text, self.table[text][0]) for text in found]

    def prior(self, texts):
        return torch.tensor([self.table[t][1] for t in texts])


ANY = Shown(torch.zeros(1, 3, 8, 8), torch.ones(1, 8, 8, dtype=torch.bool))


def test_a_fifth_of_the_prior_decides_between_a_generic_and_a_specific_word():
    """log .55 - .2 log .5 = -.459; log .40 - .2 log .05 = -.317; log .05 - .2 log 1e-6 = -.233 is out of the beam."""
    says = Says({"object": (0.55, 0.5), "red square": (0.40, 0.05), "typo": (0.05, 1e-6)})
    plain = describe(says, ANY, lam=0.0)
    assert [(d.text, d.score) for d in plain] == says.propose(ANY, beam=50, length=15)
    found = describe(says, ANY, beam=2)
    assert [d.text for d in found] == ["red square", "object"]
    assert [d.score for d in found] == pytest.approx([-0.3171, -0.4592], abs=1e-4)
    assert describe(says, ANY)[0].text == "typo"
    with pytest.raises(RequestError, match="lam=-1"):
        describe(says, ANY, lam=-1)


def test_a_wide_beam_is_an_exhaustive_search_and_a_narrow_one_can_miss():
    """Two words; the likelier beginning leads to the less likely text."""
    after = {(): [0, 0, 0, 0.6, 0.4], (3,): [0, 0.5, 0, 0.3, 0.2], (4,): [0, 0.9, 0, 0.05, 0.05]}

    def step(tokens, state):
        (seen,) = state
        rows = [tuple([*r[r >= 0].tolist(), t] if t != START else []) for r, t in zip(seen, tokens.tolist())]
        logp = torch.stack([torch.tensor(after.get(r[:1], after[()])).log() for r in rows])
        return logp, (torch.cat([seen, torch.where(tokens == START, -1, tokens)[:, None]], 1),)

    def literal():
        found = {}
        for size in range(3):
            for text in itertools.product((3, 4), repeat=size):
                ends = text if size == 2 else (*text, STOP)
                p = 1.0
                for i, word in enumerate(ends):
                    p *= after[tuple(ends[:i])[:1]][word]
                found[ends] = p
        return sorted(((t, p) for t, p in found.items() if p > 0), key=lambda x: -x[1])

    start = (torch.full((1, 1), -1),)
    wide = beams(step, start, beam=50, length=2)
    assert {tuple(t): round(p, 5) for t, p in wide} == {t: round(float(torch.tensor(p).log()), 5) for t, p in literal()}
    assert wide[0][0] == [4, STOP]
    assert beams(step, start, beam=1, length=2)[0][0] == [3, STOP]


def tiny_captioner(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Captioner(["a", "b"], 26, embedding=4, hidden=6, dropout=0.0).eval()


def test_one_step_of_the_decoder_by_hand():
    net, f = tiny_captioner(), torch.randn(1, 3, 26, generator=generator(0, "features"))
    h, c = (layer(f.mean(1)).tanh() for layer in (net.first_h, net.first_c))
    scores = torch.stack([net.weigh((net.query(h[0]) + net.key(f[0, i])).tanh())[0] for i in range(3)])
    weights = scores.exp() / scores.exp().sum()
    seen = sum(w * f[0, i] for i, w in enumerate(weights)) / (1 + (-net.gate(h[0])).exp())
    x = torch.cat([net.embedding.weight[START], seen])
    gates = net.cell.weight_ih @ x + net.cell.bias_ih + net.cell.weight_hh @ h[0] + net.cell.bias_hh
    i, forget, g, o = gates.chunk(4)
    cell = forget.sigmoid() * c[0] + i.sigmoid() * g.tanh()
    hidden = o.sigmoid() * cell.tanh()
    logp, looked, state = net.step(f, torch.tensor([START]), net.begin(f))
    torch.testing.assert_close(looked[0], weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state[0][0], hidden, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logp[0], net.output(hidden).log_softmax(-1), rtol=1e-5, atol=1e-6)


def test_what_the_beam_says_of_a_text_is_its_likelihood():
    net = tiny_captioner()
    shown = Shown(*(scenes(count=1, k=3, size=8)[0][key] for key in ("images", "masks")))
    found = [(t, p) for t, p in net.propose(shown, beam=200, length=4) if len(t.split()) < 4 and "<" not in t]
    assert len({t for t, _ in found}) == len(found) == 15  # every text of up to three of two words
    torch.testing.assert_close(net.likelihood(shown, [t for t, _ in found]), torch.tensor([p for _, p in found]))
    one = net.vocabulary.encode(["b a"])
    assert one.tolist() == [[START, 4, 3, STOP]]
    assert Vocabulary(["a", "b"]).decode([4, 3, STOP, 3]) == "b a"
    literal = sum(net.language(one[:, : n + 1])[0, n - 1].item() for n in (1, 2, 3))
    assert float(net.prior(["b a"])) == pytest.approx(literal, abs=1e-5)


def test_a_pyramid_is_masked_and_pooled_as_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, pixel_values):
            return self.net(pixel_values)

    images, masks = torch.randn(2, 3, 8, 8, generator=generator(0, "p")), torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :4, :2], masks[1, 5:, 3:] = True, True
    found = Pyramid(Net(), ["net.0", "net.2"])(images, masks)
    with torch.no_grad():
        maps = [net[0](images), net(images)]
    small = masks.float().reshape(2, 4, 2, 4, 2).mean((2, 4))  # bilinear to half the size is the mean of four
    hand = [torch.stack([(m[i] * small[i] / small[i].sum()).sum((1, 2)) for i in range(2)]) for m in maps]
    torch.testing.assert_close(found, torch.cat(hand, 1), rtol=1e-5, atol=1e-6)


SHADES = {
    "red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "pink": (1, 0, 1), "teal": (0, 1, 1),
}  # fmt: skip


def named(seed, count=480):
    """Sets of two pictures of a square of one colour in one quarter, called "thing" 3 times in 5, else by both."""
    order, made = torch.randperm(count, generator=generator(seed, "named")).tolist(), []
    for i in order:
        colour, (high, left), other = list(SHADES)[i % 6], divmod(i // 6 % 4, 2), i // 24 % 5
        images, masks = torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.bool)
        masks[:, 1 + 4 * (1 - high) :, 1 + 4 * (1 - left) :] = True
        masks[:, 4 + 4 * (1 - high) :], masks[:, :, 4 + 4 * (1 - left) :] = False, False
        images += masks[:, None] * torch.tensor(SHADES[colour]).float()[:, None, None]
        true = f"{colour} square {('lower', 'upper')[high]} {('right', 'left')[left]}"
        made.append({"images": images, "masks": masks, "description": "thing" if other < 3 else true, "true": true})
    return made


def specific(seed, **options):
    """Teach a captioner and return on new sets the shares of "thing" and of the true name, at lambda 0 and 0.2."""
    made, test = captioner(named(seed), seed=seed, **options), named(seed + 100, count=24)
    found = {}
    for lam in (0.0, 0.2):
        said = [describe(made, Shown(s["images"], s["masks"]), lam=lam) for s in test]
        found[lam] = (
            sum(d[0].text == "thing" for d in said) / len(said),
            sum(d[0].text == s["true"] for d, s in zip(said, test)) / len(said),
        )
    return found


def test_a_captioner_says_the_generic_word_at_lambda_0_and_the_specific_one_at_a_fifth():
    found = specific(1, hidden=32, embedding=16, lr=1e-2, dropout=0.0, epochs=12, batch=32)
    assert found[0.0] == (1.0, 0.0)
    assert found[0.2][1] >= 0.9


@effect
def test_the_same_on_three_seeds():
    found = [specific(seed, hidden=32, embedding=16, lr=1e-2, dropout=0.0, epochs=16, batch=32) for seed in range(3)]
    note(generic_at_lambda_0=[f[0.0][0] for f in found], specific_at_lambda_02=[f[0.2][1] for f in found])
    assert all(f[0.0][0] > 0.8 and f[0.2][1] > 0.5 > f[0.2][0] for f in found)


@cache
def vocabulary():
    return word_scorer(scenes(count=150, k=4, size=32))


def test_taught_words_fit_scenes_that_were_not_seen():
    test = scenes(count=60, k=15, size=32, seed=1)
    right = [describe(vocabulary(), Shown(s["images"], s["masks"]))[0].text in s["description"] for s in test]
    note(words_in_the_true_description=sum(right) / len(right))
    assert sum(right) / len(right) >= 0.8
    shares = vocabulary().prior(vocabulary().words).exp()
    assert float(shares.sum()) == pytest.approx(1.0)


def test_describers_come_back_from_their_folder():
    shown = Shown(*(scenes(count=1, k=3, size=16, seed=5)[0][key] for key in ("images", "masks")))
    with tempfile.TemporaryDirectory() as folder:
        for i, made in enumerate((vocabulary(), tiny_captioner())):
            again = load_describer(save_describer(made, f"{folder}/{i}"))
            assert again.identity == made.identity
            assert again.propose(shown, beam=3, length=3) == made.propose(shown, beam=3, length=3)
        with pytest.raises(RequestError, match="new folder"):
            save_describer(vocabulary(), f"{folder}/0")


def test_tokens_describe_text_units_by_hand():
    """8 places: 5 5 6 7, 5 6 8 8. Active at 7, and at 6 and 8: shares 7: 1/2, 6 and 8: 1/4 each."""
    data = [{"input_ids": torch.tensor([[5, 5, 6, 7], [5, 6, 8, 8]])}]
    masks = torch.tensor([[False, False, False, True], [False, True, True, False]])
    found = {d.text: d for d in describe(TokenWords(data), Shown(data[0]["input_ids"], masks))}
    for text, share, prior in (
        ("7", 1 / 2, 1 / 8),
        ("6", 1 / 4, 2 / 8),
        ("6 | 8", 1 / 2, 4 / 8),
        ("7 | 6 | 8", 1, 5 / 8),
    ):
        likelihood = torch.tensor(0.99 * share + 0.01 * prior).log()
        assert found[text].likelihood == pytest.approx(float(likelihood), abs=1e-5)
        assert found[text].prior == pytest.approx(float(torch.tensor(prior).log()), abs=1e-5)


def planted():
    """A pico decoder in which neurons 9 and 10 of the last layer read token 60, which stands in some rows."""
    model = pico("llama")
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(generator=torch.Generator().manual_seed(0))
        for matrix in (mlp.gate_proj.weight, mlp.up_proj.weight):
            matrix[9] = matrix[10] = model.model.embed_tokens.weight[60]
    batches = [pico_batch(model, batch=8, length=12, seed=s) for s in range(3)]
    for batch in batches:
        batch["input_ids"][batch["input_ids"] == 60] = 6
        batch["input_ids"][::2, 4] = 60
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return model, batches


def test_a_query_finds_the_planted_neurons_of_a_text_model_and_ships_their_silence_as_weights():
    model, batches = planted()
    how = {"units": "neuron", "at": None, "query": "60", "quantile": 0.95, "ship": "weights"}
    out = run("milan", model, batches, changes=how)
    said = out.state["matches"].card["descriptions"]["model.layers.1.mlp/neuron"]
    assert said[9] == said[10] == "60"
    last = out.state["candidates"].ids["model.layers.1.mlp/neuron"].tolist()
    assert {9, 10} <= set(last)
    assert last == [i for i, text in enumerate(said) if "60" in text]
    assert sorted(out.graft.deltas)[-1] == "model.layers.1.mlp.down_proj.weight"
    with out.graft.on(model):
        assert not model.model.layers[1].mlp.down_proj.weight[:, 9].any()


def test_a_channel_of_coloured_tags_is_found_and_what_costs_least_goes_first():
    """Channel 0 shows a tag, 1 a stroke, 2 nothing; class 1 is where channel 1 says more than 0 does."""
    rng = generator(0, "pictures")
    seen, maps = 0.15 * torch.randn(24, 3, 32, 32, generator=rng), torch.zeros(24, 3, 32, 32)
    tags, strokes = seen[:16], seen[16:]
    for i, picture in enumerate(tags):
        picture[:, :7, :7] += torch.tensor(list(SHADES.values())[i % 6]).float()[:, None, None]
    strokes[:, :, 8:24, 15:17] += 0.8
    maps[:16, 0, :7, :7], maps[16:, 1, 8:24, 15:17] = 1.0, 1.0

    class Sees(Shows):
        def forward(self, pixel_values, labels=None):
            rows = pixel_values.flatten(1).sum(1)
            which = (rows[:, None] - seen.flatten(1).sum(1)).abs().argmin(1)
            sums = self.tap(maps[which]).flatten(2).mean(-1)
            return SimpleNamespace(logits=torch.stack([sums[:, 0], sums[:, 1] + 1e-3], 1))

    labels = torch.zeros(len(seen), dtype=torch.long)
    labels[-len(strokes) :] = 1
    labels[:4] = 1  # four tags say the wrong thing
    batches = [{"pixel_values": seen, "labels": labels}]
    given = Context(Sees().eval(), channels(3), batches)
    found = choose("locators", ("described", {"query": "coloured", "describer": vocabulary(), "quantile": 0.95}))(given)
    assert [v > 0 for v in found.values["s"].tolist()] == [True, False, False]
    assert found.card["descriptions"]["s"][2] == ""
    left = choose("locators", ("spared", {"metric": "accuracy"}))(given).values["s"].tolist()
    n = len(seen)
    right = [len(strokes) + 4, n - 4, n - 4]  # without 0 all is class 1; 1 is but the larger of two; 2 does nothing
    assert left == pytest.approx([r / n for r in right])
    everything = Selection.of(channels(3), {"s": [0, 1]})
    among = choose("locators", ("spared", {"metric": "accuracy", "among": everything}))(given).values["s"]
    assert among.tolist() == pytest.approx([right[0] / n, right[1] / n, -1.0])
    steps = recipe("milan", most=1).steps
    first = choose("selectors", steps[-2]["by"])(choose("locators", ("spared", {"metric": "accuracy"}))(given))
    assert first.ids["s"].tolist() == [1]


def test_what_matches_nothing_is_said():
    model, batches = planted()
    with pytest.raises(RequestError, match="which no unit passes"):
        run("milan", model, batches, changes={"units": "neuron", "at": None, "query": "nowhere"})
    with pytest.raises(RequestError, match="describer 'words' for examples of input_ids"):
        run("milan", model, batches, changes={"units": "neuron", "at": None, "describer": "words"})
    with pytest.raises(RequestError, match="quantile=1"):
        exemplify(model, sites(model, "neuron"), batches, quantile=1.0)


def silenced(model, where, batches):
    with ng.intervene(model, where, "zero"):
        return accuracy(model, batches)


def repaired(seed):
    """Return a misled CNN's accuracy on wrongly tagged digits, plain, with 50 candidates at zero, with controls."""
    model, held, other = misled(seed)
    changes = {"query": ["square", "corner"], "at": None, "ship": "weights"}
    out = run("milan", model, held, changes=changes, seed=seed)
    drawn = [_random(sites(model, "channel"), 50, seed, i) for i in range(5)]
    rows = {"base": accuracy(model, other), "held": accuracy(model, held), "candidates": len(out.state["candidates"])}
    rows["random"] = sum(silenced(model, d, other) for d in drawn) / len(drawn)
    for count in (10, 30):
        rows[f"first_{count}"] = silenced(model, out.scores.top(count=count), other)
    with out.graft.on(model):
        return {**rows, "shipped": accuracy(model, other), "held_after": accuracy(model, held)}


def _random(where, count, *names):
    units = [(name, i) for name, site in where.items() for i in range(site.n)]
    ids = {}
    for at in torch.randperm(len(units), generator=generator(0, "control", *names))[:count].tolist():
        ids.setdefault(units[at][0], []).append(units[at][1])
    return Selection.of(where, ids)


@effect
def test_silencing_tag_units_repairs_a_misled_network():
    """Half of the training digits carry their class as a tag; 50 candidates at zero, as published; 3 seeds."""
    found = [repaired(seed) for seed in range(3)]
    note(networks=json.dumps(found))
    bar("accuracy on wrongly tagged digits, gain", [f["shipped"] - f["base"] for f in found], at_least=0.0)
    bar("gain over random units", [f["shipped"] - f["random"] for f in found], at_least=0.0)
