"""Skill grafting: few entries of a fine-tune's change carry it; a learned mask finds them where movement does not.

The perceptron of the effects has 5,400 weights, so that what carries its skill is a tenth of them and not the paper's
0.01 %; the mask's learning rate is 1e6 here, a tenth of the paper's, whose descent would let a third of the bits flip.
"""

from contextlib import contextmanager
from functools import cache

import pytest
import torch

from neurograft.adapters._masked import Masked
from neurograft.anatomy.sites import sites
from neurograft.core.compact.mask import Mask
from neurograft.core.grafts.graft import Graft
from neurograft.core.seeds import generator
from neurograft.core.selection import Selection
from neurograft.core.units import Part, Site
from neurograft.pipeline.attach import attach
from neurograft.pipeline.run import run
from neurograft.train.loop import fit
from neurograft.worlds.pico import pico, pico_batch
from neurograft.worlds.tiny import Perceptron, accuracy, tiny
from neurograft.worlds.vectors import FEATURES, vectors
from tests.proofs import bar, effect, note, patched
from tests.proofs._tools import moved, rows_in, snapshot

PAPER, SCALE = "skill-grafting", "tiny"


@contextmanager
def bits_outside_of_the_patch_never_flip():
    """The mask can only lose entries of the patch, so that movement alone decides what may come in."""
    pulled = Mask.pulled

    def inside(self, s, pull, patch=None):
        return torch.where(patch, pulled(self, s, pull, patch), 0.0)

    with patched(Mask, "pulled", inside):
        yield


@contextmanager
def the_ends_are_exchanged():
    """A set bit takes the base's number and a cleared one the tuned."""
    ends = Masked.ends
    with patched(Masked, "ends", lambda self: ends(self)[::-1]):
        yield


@contextmanager
def the_sigmoid_begins_at_one_half():
    """The offset is forgotten: the mask begins in the middle between base and tuned, and not at the patch."""
    soft = Mask.soft
    with patched(Mask, "soft", lambda self, s, patch=None: soft(Mask(self.shape, 0.0), s, patch)):
        yield


BROKEN = (bits_outside_of_the_patch_never_flip, the_ends_are_exchanged, the_sigmoid_begins_at_one_half)
WEIGHTS = ("first.weight", "second.weight", "head.weight")


def matrices(net):
    shapes = {n: tuple(net.get_parameter(n).shape) for n in WEIGHTS}
    found = {n: Site(n, "row", shape[0], (Part.rows(n, shape),)) for n, shape in shapes.items()}
    return Selection.of(found, {n: range(s.n) for n, s in found.items()})


def masked(net, where, tuned, patch, batches=(), *, steps=50, lr=1e6):
    """The graft of a mask learned over a change; without batches that of its patch alone."""
    options = {"toward": tuned, "shape": "flip", "patch": patch}
    with attach(net, where, adapter=("mask", options)) as live:
        if batches:
            fit(live, batches, steps=steps, lr=lr, optimizer="SGD", accumulate=len(batches), max_norm=None)
        return live.graft()


def entries(graft):
    return {(n, int(i)) for n, d in graft.deltas.items() for i in d.region.flat()}


def tuned_llama(dtype=None):
    """A pico model, a copy of it that moved everywhere in its blocks, and all columns of the blocks."""
    base, other = pico("llama", dtype=dtype), pico("llama", dtype=dtype)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if "proj" in name:
                p += 0.1 * torch.randn(p.shape, generator=generator(0, name)).to(p)
    found = {n: s for n, s in sites(base, "column").items() if "proj" in n}
    return base, other, Selection.of(found, {n: range(s.n) for n, s in found.items()})


def test_nothing_and_everything_of_the_change():
    base, tuned, where = tuned_llama()
    batch = pico_batch(base)
    plain, wanted = base(**batch).logits, tuned(**batch).logits
    before = snapshot(base)
    with attach(base, where, adapter=("mask", {"toward": tuned, "shape": "clamp"})) as live:
        assert torch.equal(base(**batch).logits, wanted)
        whole = live.graft()
        for s in live.parameters():
            s.data.zero_()
        assert torch.equal(base(**batch).logits, plain)
        assert live.graft().empty
    assert not moved(before, base)
    with whole.on(base):
        assert torch.equal(base(**batch).logits, wanted)
    assert not moved(before, base)


def test_the_gradient_of_s_is_the_closed_form():
    """(1 - 2 patch) * dL/dtheta * (tuned - base) * sigma'(s - 10), at the relaxed theta."""
    base, tuned, where = tuned_llama(torch.float64)
    batch, twin = pico_batch(base), pico("llama", dtype=torch.float64)
    options = {"toward": tuned, "shape": "flip", "patch": 0.01}
    with attach(base, where, adapter=("mask", options)) as live:
        base(**batch).loss.backward()
        twin.load_state_dict(base.state_dict())
        pulls, patches = {n: s.grad for n, s in live.named_parameters().items()}, live.patches
        sigma = {n: torch.sigmoid(s.detach() - 10) for n, s in live.named_parameters().items()}
    twin(**batch).loss.backward()
    assert sum(int(p.sum()) for p in patches.values()) == round(0.01 * where.numel)
    for name, found in pulls.items():
        gap = tuned.get_parameter(name).detach() - base.get_parameter(name).detach()
        slope = sigma[name] * (1 - sigma[name])
        closed = (1 - 2.0 * patches[name]) * twin.get_parameter(name).grad * gap * slope
        torch.testing.assert_close(found, closed, rtol=1e-8, atol=1e-18)


def test_the_patch_is_what_moved_most_over_all_matrices():
    base, tuned, where = tuned_llama()
    graft = masked(base, where, tuned, 0.002)
    moves = {
        (n, i): float(v)
        for n, p in tuned.named_parameters()
        if "proj" in n
        for i, v in enumerate((p - base.get_parameter(n)).detach().abs().reshape(-1))
    }
    best = sorted(moves, key=moves.get, reverse=True)[: round(0.002 * where.numel)]
    assert entries(graft) == set(best)
    for name, delta in graft.deltas.items():
        assert torch.equal(delta.values, tuned.get_parameter(name).detach().reshape(-1)[delta.region.ids])
    assert all(set(m.tolist()) == {0.0, 1.0} for m in _starts(base, where, tuned))


def _starts(base, where, tuned):
    with attach(base, where, adapter=("mask", {"toward": tuned, "shape": "flip", "patch": 0.01})) as live:
        for one in live.lives:
            m = one.mask.soft(one.theta.detach(), one.patch)
            assert float((m - m.round()).abs().max()) < 1.3e-4
            yield m.round().unique()


def planted():
    """A perceptron, its tuned version, and data. Ten numbers carry the change; 1,000 larger moves never fire."""
    base = Perceptron(seed=0)
    with torch.no_grad():
        base.first.bias[:32] = -100.0  # units that never fire, and read many moved numbers
        tuned = Perceptron(seed=0)
        tuned.load_state_dict(base.state_dict())
        order = torch.randperm(32 * 64, generator=generator(0, "planted"))[:1000]
        tuned.second.weight.view(-1)[order // 32 * 64 + order % 32] += 3.0
        x = torch.randn(256, FEATURES, generator=generator(0, "points"))
        inner = base.first(x).relu()
        source, reader = inner.mean(0).topk(5).indices, base.second(inner).relu().mean(0).topk(10).indices
        carrying = {  # the busiest units of each layer: five numbers read by five of them, five that read the others
            "second.weight": reader[:5] * 64 + source,
            "head.weight": (torch.arange(5) % 4) * 64 + reader[5:],
        }
        for name, at in carrying.items():
            tuned.get_parameter(name).view(-1)[at] += 1.5
        said = tuned(x).logits.softmax(-1)
    batch = {"features": x, "labels": said}  # the loss of soft labels has its minimum at the tuned model alone
    return base, tuned, {(n, int(i)) for n, at in carrying.items() for i in at}, batch


def test_ten_numbers_among_a_thousand_that_moved_more():
    base, tuned, carrying, batch = planted()
    where = matrices(base)
    share = 10 / where.numel
    by_movement = masked(base, where, tuned, share)
    assert len(entries(by_movement)) == 10
    assert not entries(by_movement) & carrying
    learned = masked(base, where, tuned, share, [batch])
    recall = len(entries(learned) & carrying) / 10
    bar("share of ten planted entries that the mask finds", recall, at_least=1.0)
    assert entries(learned) == entries(by_movement) | carrying


def test_the_recipe_pastes_a_part_of_the_fine_tune():
    model = pico("llama")
    batch = pico_batch(model, batch=8)
    rows = rows_in(batch)
    before = snapshot(model)
    changes = {"fraction": 0.01, "lr": 0.1, "epochs": 2, "batch": 4, "mask_steps": 3}
    out = run("skill_grafting", model, rows, changes=changes)
    assert not moved(before, model)
    whole, graft = out.state["tuned"], out.graft
    assert isinstance(whole, Graft)
    assert not whole.empty
    assert all("proj" in n for n in whole.deltas)
    assert graft.card["steps"] == 3  # each over the whole data
    for name, delta in graft.deltas.items():
        assert torch.equal(delta.values, whole.deltas[name].values.reshape(-1)[delta.region.ids])
    assert 0 < graft.numel < 0.2 * whole.numel
    assert graft.card["adapter"]["options"]["toward"] == whole.identity


@cache
def world(seed):
    """A perceptron that knows task "a", data of task "b", and its fine-tune by plain SGD."""
    base = tiny("mlp", seed=seed)
    train = vectors("b", count=8, batch=64, seed=seed)
    return base, train, fine_tuned(base, train, seed)


def fine_tuned(base, batches, seed):
    with attach(base, matrices(base), adapter="dense") as live:
        fit(live, batches, steps=400, lr=0.1, optimizer="SGD", max_norm=None, seed=seed)
        return live.graft()


def scored(base, graft, batches):
    with graft.on(base):
        return accuracy(base, batches)


def at_random(base, where, whole, count, seed):
    """A graft of as many random entries of the change."""
    flat = {n: d.values.reshape(-1) for n, d in whole.deltas.items()}
    at = torch.randperm(sum(map(len, flat.values())), generator=generator(seed, "control"))[:count]
    made, first = pico_copy(base), 0
    for name, values in flat.items():
        mine = at[(at >= first) & (at < first + len(values))] - first
        made.get_parameter(name).data.view(-1)[mine] = values[mine]
        first += len(values)
    with attach(base, where, adapter=("mask", {"toward": made, "shape": "clamp"})) as live:
        return live.graft()


def pico_copy(base):
    made = Perceptron()
    made.load_state_dict(base.state_dict())
    return made


@effect
def test_the_learned_mask_carries_the_skill():
    """Task "b" after task "a", 3 seeds, patches of 1 %; controls of the size the mask ended with."""
    test = vectors("b", count=8, batch=64, seed=100)
    table = {k: [] for k in ("base", "full", "mask", "movement", "random", "share")}
    for seed in range(3):
        base, train, whole = world(seed)
        where = matrices(base)
        graft = masked(base, where, whole, 0.01, train)
        found = {
            "base": accuracy(base, test),
            "full": scored(base, whole, test),
            "mask": scored(base, graft, test),
            "movement": scored(base, masked(base, where, whole, graft.numel / where.numel), test),
            "random": scored(base, at_random(base, where, whole, graft.numel, seed), test),
            "share": graft.numel / where.numel,
        }
        for name, value in found.items():
            table[name].append(value)
    note(**table)
    bar("share of the full accuracy", [m / f for m, f in zip(table["mask"], table["full"])], at_least=0.95)
    bar("accuracy over movement", [m - v for m, v in zip(table["mask"], table["movement"])], at_least=0.0)
    bar("movement over random", [m - r for m, r in zip(table["movement"], table["random"])], at_least=0.01)


def halves(side, seed):
    """A task on the first or the last eight features, the others 0."""
    rng, found = generator(seed, "half", side), []
    readout = torch.randn(8, 4, generator=generator(0, "half", "readout", side))
    for _ in range(4):
        x = torch.zeros(64, FEATURES)
        part = torch.randn(64, 8, generator=rng)
        x[:, 8 * side : 8 * side + 8] = part
        found.append({"features": x, "labels": (part.abs() @ readout).argmax(-1)})
    return found


@effect
def test_regions_of_different_tasks_are_apart_and_those_of_one_task_are_not():
    """One model tuned on two tasks over different features; masks from two draws of the first, and of the second."""
    table = {k: [] for k in ("same", "other", "chance")}
    for seed in range(3):
        base = Perceptron(seed=seed)
        where = matrices(base)
        whole = fine_tuned(base, [*halves(0, seed), *halves(1, seed)], seed)
        one, again, other = (
            entries(masked(base, where, whole, 0.005, halves(side, 10 * draw + seed), steps=40))
            for side, draw in ((0, 1), (0, 2), (1, 1))
        )
        table["same"].append(len(one & again) / len(one | again))
        table["other"].append(len(one & other) / len(one | other))
        density = len(other) / where.numel
        table["chance"].append(density * len(one) / (len(one) + len(other) - density * len(one)))
    note(**{f"overlap_{k}": v for k, v in table.items()})
    assert min(table["same"]) > 0.3
    assert all(o < 0.5 * s for o, s in zip(table["other"], table["same"]))


def test_bad_shares_are_named():
    base, tuned, where = tuned_llama()
    with pytest.raises(ValueError, match="share from 0 to 1"):
        masked(base, where, tuned, 1.5)
