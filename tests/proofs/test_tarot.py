"""TaRot: rotations of heads are exact, fold exactly, and a search over angles takes back one that was planted."""

import copy
import itertools
import math
import tempfile
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import neurograft as ng
from neurograft.anatomy.sites import sites
from neurograft.core.errors import RequestError, RunError
from neurograft.core.numerics.rotations import numbers_of, rotations
from neurograft.core.numerics.search import drawn, search, uniform
from neurograft.core.seeds import generator
from neurograft.core.selection import Selection
from neurograft.core.taps.folding import _Fold, as_deltas
from neurograft.core.turn import Turn
from neurograft.edits import _bayes
from neurograft.edits._answers import first_answers, read
from neurograft.edits._arccos import Arccos
from neurograft.pipeline.edit import edit
from neurograft.pipeline.few_shot import few_shot
from neurograft.worlds.letters import letters
from neurograft.worlds.mixture import mixture
from neurograft.worlds.pico import pico, pico_batch
from neurograft.worlds.tiny import fit, llama
from tests.proofs import bar, effect, note, patched
from tests.proofs._tools import Says

PAPER = "tarot"
SCALE = "tiny"
KNOWN, SEEDS = ("copy", "reverse"), (0, 1, 2)
WIDE = torch.pi / 3  # the widest bound of the released checkpoints; the plant lies inside


@contextmanager
def the_released_sign():
    """The process sees the negated metric, and the acquisition looks above the smallest of that."""
    fitted, improvement = _bayes.fitted, _bayes.improvement
    with patched(_bayes, "fitted", lambda x, y, *rest: fitted(x, -y, *rest)):
        with patched(_bayes, "improvement", lambda process, seen, best: improvement(process, seen, -best)):
            yield


def the_fold_turns_the_other_way():
    """The projection's columns are turned by R, not by its transpose."""
    rotate = _Fold.rotate
    return patched(_Fold, "rotate", lambda self, turn: rotate(self, turn.mT))


def a_chain_for_the_tree():
    """Givens rotations of neighbours one after another."""

    def chain(form, width):
        return list(range(width - 1)), list(range(1, width))

    return patched("neurograft.core.numerics.rotations", "_planes", chain)


BROKEN = (the_released_sign, the_fold_turns_the_other_way, a_chain_for_the_tree)


def prepare():
    """Train the bases."""
    for seed in SEEDS:
        known(seed)


@cache
def known(seed):
    """A block with two heads of 24 features that copies and reverses three letters."""
    model = llama(
        seed, hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    return fit(model, mixture(KNOWN, count=260, batch=32, length=3, seed=seed), lr=4e-3)


def some_turns(model, form="rotary", *, units="head", at=None, angle=None, seed=0):
    made = []
    for name, site in sites(model, units, at=at).items():
        shape = (site.n, numbers_of(form, site.tap.width))
        angles = torch.full(shape, angle) if angle is not None else torch.randn(shape, generator=generator(seed, name))
        made.append(Turn.by(site, torch.arange(site.n), angles, form))
    return tuple(made)


def logits(model, batch):
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits


def test_rotations_are_those_of_the_formulas():
    c, s = math.cos(0.3), math.sin(0.3)
    by_hand = torch.tensor([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(rotations(torch.tensor([[0.3, 0.0]]).double())[0], by_hand)

    def plane(i, j, angle, w):
        found = torch.eye(w, dtype=torch.float64)
        found[i, i] = found[j, j] = math.cos(angle)
        found[i, j], found[j, i] = -math.sin(angle), math.sin(angle)
        return found

    angles = torch.randn(1, 7, generator=generator(0, "angles"), dtype=torch.float64)
    at = [(0, 1), (2, 3), (4, 5), (6, 7), (0, 2), (4, 6), (0, 4)]  # the tree over eight features
    literal = torch.eye(8, dtype=torch.float64)
    for (i, j), angle in zip(at, angles[0].tolist()):
        literal = plane(i, j, angle, 8) @ literal
    torch.testing.assert_close(rotations(angles, "givens")[0], literal)


def test_rotations_are_orthogonal_and_count_their_angles():
    for width, form in itertools.product((2, 6, 8, 24), ("rotary", "givens")):
        m = numbers_of(form, width)
        assert m == (width // 2 if form == "rotary" else width - 1)
        turn = rotations(torch.randn(3, m, generator=generator(1, width, form), dtype=torch.float64), form)
        torch.testing.assert_close(turn @ turn.mT, torch.eye(width).double().expand(3, -1, -1), rtol=0, atol=1e-12)
        assert torch.equal(rotations(torch.zeros(2, m), form), torch.eye(width).expand(2, -1, -1))
    with pytest.raises(RequestError, match="even number"):
        numbers_of("rotary", 5)


def test_no_angle_is_the_base_and_norms_stay():
    for family, form in (("llama", "rotary"), ("gpt_neox", "givens")):
        model = pico(family)
        batch, before = pico_batch(model), {}
        with ng.Graft.made(model, {}, operations=some_turns(model, form, angle=0.0)).on(model):
            still = logits(model, batch)
        torch.testing.assert_close(still, logits(model, batch), rtol=0, atol=1e-6)
        name, heads = next(iter(sites(model, "head").items()))
        module, w, seen = model.get_submodule(heads.tap.module), heads.tap.width, []
        hook = module.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0]))
        logits(model, batch)
        hook.remove()
        turn = next(t for t in some_turns(model, form, seed=2) if t.site.name == name)
        mounted = turn.mount(model)
        hook = module.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0]))
        logits(model, batch)
        hook.remove()
        mounted.remove()
        before, after = (x.unflatten(-1, (-1, w)) for x in seen)
        assert (before - after).norm() > 0.1 * before.norm()
        torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1), rtol=1e-5, atol=1e-6)


def test_the_fold_equals_the_hook():
    cases = [("llama", "rotary", "head", None), ("gpt_neox", "givens", "head", None), ("llama", "givens", "head", None)]
    for family, form, units, at in [
        *cases,
        ("llama", "rotary", "layer", "ffn"),
        ("gpt_neox", "rotary", "layer", "ffn"),
    ]:
        model = pico(family)
        batch, turns = pico_batch(model), some_turns(model, form, units=units, at=at)
        plain = logits(model, batch)
        with ng.Graft.made(model, {}, operations=turns).on(model):
            hooked = logits(model, batch)
        with ng.Graft.made(model, as_deltas(model, turns)).on(model):
            folded = logits(model, batch)
        assert (hooked - plain).abs().max() > 1e-3
        torch.testing.assert_close(folded, hooked, rtol=0, atol=1e-5)


def test_a_graft_of_turns_ships_angles():
    model = pico("llama")
    graft = ng.Graft.made(model, {}, operations=some_turns(model))
    assert graft.numel == sum(4 * 4 + 4 for _ in range(2))  # two blocks, four heads, four angles and a number each
    with tempfile.TemporaryDirectory() as folder:
        graft.save(folder)
        same = ng.Graft.load(folder)
    batch = pico_batch(model)
    with graft.on(model):
        turned = logits(model, batch)
    with same.on(model):
        assert torch.equal(logits(model, batch), turned)
    assert same.identity == graft.identity
    with pytest.raises(RequestError, match="expected operations"):
        graft + same


def test_the_kernel_and_its_derivatives():
    rng = np.random.default_rng(0)
    x, y = rng.random((4, 3)), rng.random((5, 3))
    v, b = 1.7, 0.6

    def literal(p, q):  # the recursion for one pair
        pp, qq, pq = (b + v * (s @ t) / 3 for s, t in ((p, p), (q, q), (p, q)))
        for _ in range(4):
            norm = math.sqrt(pp * qq)
            angle = math.acos(min(1.0, pq / norm))
            pq = b + v / (2 * math.pi) * norm * (math.sin(angle) + (math.pi - angle) * math.cos(angle))
            pp, qq = b + v / 2 * pp, b + v / 2 * qq
        return pq

    kernel = Arccos(4, v, b)
    np.testing.assert_allclose(kernel(x, y), [[literal(p, q) for q in y] for p in x], rtol=1e-10)
    np.testing.assert_allclose(kernel.diag(x), [literal(p, p) for p in x], rtol=1e-6)
    e, (_, slopes) = 1e-5, kernel(x, eval_gradient=True)
    up, down = Arccos(4, v, b * math.exp(e))(x), Arccos(4, v, b * math.exp(-e))(x)
    np.testing.assert_allclose(slopes[..., 0], (up - down) / (2 * e), rtol=1e-6)
    up, down = Arccos(4, v * math.exp(e), b)(x), Arccos(4, v * math.exp(-e), b)(x)
    np.testing.assert_allclose(slopes[..., 1], (up - down) / (2 * e), rtol=1e-6)


def test_the_acquisition_is_the_expected_improvement():
    from scipy.integrate import quad
    from scipy.stats import norm
    from sklearn.gaussian_process.kernels import ConstantKernel, WhiteKernel

    for z in (2.0, 0.0, -0.9, -1.1, -6.0):
        by_hand = quad(lambda t, z=z: (z + t) * norm.pdf(t), -z, -z + 12)[0]
        assert abs(float(_bayes.log_improvement(np.array([z]))[0]) - math.log(by_hand)) < 1e-6
    rng = np.random.default_rng(1)
    seen, x = rng.random((6, 3)), rng.random((4, 3))
    fitness, best = rng.random(6), 0.6
    kernel = ConstantKernel(1e-3) * Arccos(3, 2.0, 1.0) + WhiteKernel(1e-3, (1e-5, 1e-1))
    process = _bayes.fitted(seen, fitness, kernel, 10)
    gain = _bayes.improvement(process, seen, best)
    mean, deviation = process.predict(x, return_std=True)
    spread = np.sqrt(deviation**2 - process.kernel_.k2.noise_level * process._y_train_std**2)  # without the noise
    z = (mean - best) / spread
    expected = np.log(spread * (norm.pdf(z) + z * norm.cdf(z))) - np.log(process._y_train_std)
    np.testing.assert_allclose(gain(x)[0], expected, rtol=1e-4, atol=1e-6)
    for i in range(3):
        step = np.eye(3)[i] * 1e-5
        np.testing.assert_allclose(
            gain(x)[1][:, i], (gain(x + step)[0] - gain(x - step)[0]) / 2e-5, rtol=1e-4, atol=1e-6
        )


def test_it_climbs_to_a_known_top_and_the_incumbent_never_falls():
    top = torch.tensor([0.4, -0.3], dtype=torch.float64)
    low, high = -torch.ones(2), torch.ones(2)
    first = drawn(low, high, 4, generator(0, "first"))
    for propose, least in ((_bayes.bayes(low, high), 0.99), (uniform(low, high), 0.0)):
        asked = []
        found = search(
            first,
            lambda p, asked=asked: asked.append(p) or float((-(p - top).square().sum()).exp()),
            propose,
            rounds=12,
            generator=generator(0, "rounds"),
        )
        assert bool((found.incumbents.diff() >= 0).all())
        assert found.tries == len(asked) == 16
        assert float(found.incumbents[-1]) == float(found.fitness.max()) >= least
        assert float((-(found.best - top).square().sum()).exp()) == float(found.incumbents[-1])
        assert bool((found.points >= low).all() and (found.points <= high).all())


def test_metrics_read_the_first_token_of_the_answer():
    table = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0], [0.0, 0.0, 5.0], [1.0, 1.0, 1.0]])
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "labels": torch.tensor([[-100, -100, 2, 0]])}
    model = Says(table[None].clone())  # position 1 says what stands at 2
    e = math.exp
    expected = {"probability": e(1) / (e(3) + e(0) + e(1)), "accuracy": 0.0, "logit": 1.0, "rank": -1.0}
    for metric, value in expected.items():
        assert abs(float(read(model, [batch], metric)) - value) < 1e-6
    with pytest.raises(RequestError, match="no token"):
        first_answers(model, {**batch, "labels": torch.full((1, 4), -100)})


def test_shots_are_other_rows_in_front():
    rows = [{"prompt": f"{i}:", "completion": str(i)} for i in range(9)]
    state = {"data": rows, "common": {"seed": 0}}
    shown = few_shot(state, shots=[0, 3], size=7)["shown"]
    assert len(shown) == 7
    assert [r["completion"] for r in shown] == [str(i) for i in range(7)]
    # Beyond the seven stand 7 and 8; then the first that is not the row itself.
    third = {i: f"7:7\n8:8\n{int(i == 0)}:{int(i == 0)}\n{i}:" for i in range(7)}
    assert {r["prompt"] for r in shown} <= {*third.values(), *(f"{i}:" for i in range(7))}
    assert 0 < sum("\n" in r["prompt"] for r in shown) < 7
    for i, r in enumerate(shown):
        assert r["prompt"] in (third[i], f"{i}:")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat = few_shot({**state, "data": [{"messages": turns}, {"messages": turns}]}, shots=[1], size=1)["shown"]
    assert chat == [{"messages": [*turns, *turns]}]
    for wrong, text in (({"shots": [9]}, "9 shots out of 9"), ({"shots": []}, "shots=")):
        with pytest.raises(RequestError, match=text):
            few_shot(state, **wrong)
    with pytest.raises(RequestError, match="expected texts"):
        few_shot({**state, "data": [{"text": "a"}] * 9})


def test_the_graft_reaches_the_metric_on_its_card_in_both_forms():
    model = pico("llama")
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(4) for b in range(3)]
    given = {"processing_class": letters(), "seed": 1}
    for form, units, metric in (
        ("rotary", "head", "probability"),
        ("givens", "head", "logit"),
        ("scale", "head", "rank"),
    ):
        changes = {"form": form, "units": units, "metric": metric, "iterations": 4, "size": 6, "shots": [0, 2]}
        graft = ng.run("tarot", model, rows, changes=changes, **given).graft
        assert graft.card["metric_after"] > graft.card["metric_before"]
        assert graft.card["tries"] == 9
        assert sorted(graft.card["incumbents"]) == graft.card["incumbents"]
        assert graft.card["incumbents"][0] == pytest.approx(graft.card["metric_before"], abs=1e-6)
        assert {o.site.layer for o in graft.operations} == {0}  # the lower half of two blocks
        if form == "rotary":
            continue
        folded = ng.run("tarot", model, rows, changes={**changes, "ship": "weights"}, **given).graft
        assert sorted(folded.deltas) == ["model.layers.0.self_attn.o_proj.weight"]
        batch = pico_batch(model)
        with graft.on(model):
            hooked = logits(model, batch)
        with folded.on(model):
            torch.testing.assert_close(logits(model, batch), hooked, rtol=0, atol=1e-5)


def test_what_cannot_be_done_is_said():
    model = pico("llama")
    heads = sites(model, "head")
    where, data = Selection.of(heads, {next(iter(heads)): [0]}), [pico_batch(model)]
    for options, text in (
        ({"form": "spiral"}, "form of rotation"),
        ({"bound": 4.0}, "bound=4.0"),
        ({"metric": "f1"}, "metric"),
        ({"optimizer": "adam"}, "optimizer"),
        ({"origin": False, "starts": 0}, "0 starts"),
    ):
        with pytest.raises(RequestError, match=text):
            edit(model, data, by=("tarot", options), where=where)

    def nothing(low, high):
        return lambda found, rng: torch.zeros(1, len(low))

    with pytest.raises(RunError, match="none of 1 rotations"):
        edit(model, data, by=("tarot", {"optimizer": nothing, "starts": 0, "iterations": 3}), where=where)


def planted(seed):
    """Return the base, it with the head turned that hurts most, which, and rows to search and to test on."""
    model = known(seed)
    train, test = (mixture(KNOWN, count=1, batch=n, length=3, seed=s)[0] for n, s in ((20, 50 + seed), (256, 90)))
    tries = []
    for name, site in sites(model, "head").items():
        for head in range(site.n):
            other, w, rng = copy.deepcopy(model), site.tap.width, generator(seed, "plant", name, head)
            size = torch.rand(w // 2, generator=rng) * torch.pi / 6 + torch.pi / 6  # 30 to 60 degrees, either way
            turn = rotations((size * (torch.rand(w // 2, generator=rng) - 0.5).sign())[None])[0]
            weight = other.get_submodule(site.tap.module).weight.data
            weight[:, head * w : (head + 1) * w] = weight[:, head * w : (head + 1) * w] @ turn.T
            tries.append((loss(other, test), other, name, head))
    _, other, name, head = max(tries, key=lambda t: t[0])
    return SimpleNamespace(model=model, other=other, name=name, head=head, train=train, test=test)


@torch.no_grad()
def loss(model, batch):
    """Mean cross-entropy of the answers' first tokens."""
    said, asked = first_answers(model, batch)
    return float(F.cross_entropy(said, asked))


@effect
def test_a_planted_rotation_is_taken_back_and_chance_takes_back_less():
    shares = {"bayes": [], "random": []}
    drops = []
    for seed in SEEDS:
        it = planted(seed)
        right = [float(read(m, [it.test], "accuracy").mean()) for m in (it.model, it.other)]
        drops.append(right[0] - right[1])
        where = Selection.of(sites(it.other, "head"), {it.name: [it.head]})
        assert numbers_of("rotary", where.sites[it.name].tap.width) == 12
        for optimizer, found in shares.items():
            by = ("tarot", {"iterations": 60, "optimizer": optimizer, "bound": WIDE})
            graft = edit(it.other, [it.train], by=by, where=where, seed=seed)
            assert graft.card["tries"] == 65
            assert sorted(graft.card["incumbents"]) == graft.card["incumbents"]
            hurt, base = loss(it.other, it.test), loss(it.model, it.test)
            with graft.on(it.other):
                found.append((hurt - loss(it.other, it.test)) / (hurt - base))
    assert min(drops) > 0
    note(accuracy_lost_to_the_plant=drops, share_by_chance=shares["random"])
    bar("share of the planted loss taken back, 60 proposals, held-out rows", shares["bayes"], at_least=0.8)
    better = [float(a > b) for a, b in zip(*shares.values())]
    bar("seeds on which it beats random search with as many tries", better, at_least=0.51)
