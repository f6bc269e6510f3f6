"""Sparse codes on dendrites: the closed forms by hand and by counting, unions, thresholds, and chance overlap."""

import math
import tempfile
from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from neurograft.core.errors import RequestError
from neurograft.core.numerics.chance import at_least, binomial, convolved, hypergeometric
from neurograft.core.resolve import resolve
from neurograft.core.seeds import generator
from neurograft.core.selection import Selection
from neurograft.core.units import Site
from neurograft.networks.dendritic_neuron import DendriticNeuron
from neurograft.networks.dendritic_segment import DendriticSegment
from neurograft.networks.recognition import false_negative, false_positive, recognition, union_size
from neurograft.pipeline.recognised import drawn, failing, share_of
from neurograft.pipeline.run import run
from tests.proofs import note, patched

PAPER, SCALE = "sdr-dendrites", "tiny"
NETWORK = "neurograft.networks.dendritic_neuron"


@contextmanager
def cells_are_drawn_again_and_again():
    """The overlap of two sets is taken for a binomial count: cells drawn with replacement."""
    with patched("neurograft.networks.recognition", "hypergeometric", lambda n, k, m: binomial(m, k / n)):
        yield


@contextmanager
def a_segment_needs_one_more_synapse():
    """A segment fires above its threshold and not at it."""
    plain = resolve("neurograft.networks.dendritic_segment.fired")
    with patched(
        "neurograft.networks.dendritic_segment", "fired", lambda overlap, theta, **o: plain(overlap, theta + 1, **o)
    ):
        yield


@contextmanager
def a_new_code_drives_out_the_old():
    """A segment forgets its synapses when another code is stored."""
    plain = DendriticSegment.store

    def store(self, code, rng):
        self.permanence.data.zero_()
        plain(self, code, rng)

    with patched(DendriticSegment, "store", store):
        yield


BROKEN = (cells_are_drawn_again_and_again, a_segment_needs_one_more_synapse, a_new_code_drives_out_the_old)


def test_the_numbers_of_the_card():
    for theta, value in ((10, 4.94e-13), (8, 1.30e-9), (5, 3.08e-5)):
        assert false_positive(2000, 40, 20, theta) == pytest.approx(value, rel=5e-3)
    assert false_positive(500, 250, 20, 10) == pytest.approx(0.59, abs=5e-3)
    assert false_negative(20, 10, 0.3) == pytest.approx(0.0171, abs=5e-5)
    for M, size, value in ((5, 98, 1.3e-5), (10, 191, 3.3e-3), (20, 364, 0.18)):
        assert round(union_size(2000, 20, M)) == size
        assert recognition(2000, 40, 20, theta=10, M=M).false_positive == pytest.approx(
            value, rel=0.04
        )  # two digits are given
    assert [recognition(2000, 40, 20, nu=nu).theta for nu in (0.1, 0.3, 0.5)] == [8, 5, 4]


def exact(n, a, s, theta):
    ways = sum(math.comb(s, b) * math.comb(n - s, a - b) for b in range(theta, min(s, a) + 1))
    return float(Fraction(ways, math.comb(n, a)))


def test_tails_equal_whole_numbers_of_ways_and_scipy():
    for n, a, s, theta in ((2000, 40, 20, 10), (2000, 40, 364, 10), (500, 250, 20, 10), (30, 25, 20, 16), (9, 4, 3, 0)):
        assert false_positive(n, a, s, theta) == pytest.approx(exact(n, a, s, theta), rel=1e-9)
        assert false_positive(n, a, s, theta) == pytest.approx(at_least(hypergeometric(n, a, s), theta), rel=1e-9)
    stats = pytest.importorskip("scipy.stats")
    for theta in range(1, 21):
        assert false_positive(2000, 40, 20, theta) == pytest.approx(
            stats.hypergeom.sf(theta - 1, 2000, 20, 40), rel=1e-8
        )
        assert false_negative(20, theta, 0.3) == pytest.approx(stats.binom.cdf(theta - 1, 20, 0.7), rel=1e-8)


def test_reliability_hangs_on_sparseness_and_not_on_size():
    sizes = [false_positive(n, n // 50, 20, 8) for n in (1000, 2000, 4000, 8000, 16000)]
    limit = at_least(binomial(20, 0.02), 8)  # of infinitely many cells, of which one in fifty is active
    assert all(a < b < limit for a, b in pairwise(sizes))
    assert sizes[1] > limit / 2
    assert sizes[-1] == pytest.approx(limit, rel=0.1)
    sparser = [false_positive(2000, a, 20, 8) for a in (200, 100, 40, 20)]
    assert all(b < a / 10 for a, b in pairwise(sparser))
    longer = [false_positive(2000, 40, s, s // 2) for s in (8, 12, 16, 20)]
    assert all(b < a / 10 for a, b in pairwise(longer))
    dense = [false_positive(n, n // 2, 20, 10) for n in (500, 1000, 2000)]
    assert min(dense) > 0.5


def within(seen, chance, trials):
    return abs(seen - chance) <= 4 * math.sqrt(chance * (1 - chance) / trials)


def test_counting_agrees_with_the_closed_forms():
    """Twenty thousand codes for each case, four standard errors."""
    n, a, s, trials = 200, 16, 12, 20000
    rng = generator(0, "sdr")
    codes = drawn(torch.full((6,), a), n, rng)
    foreign = drawn(torch.full((trials,), a), n, rng)
    for theta in (3, 4):
        net = DendriticNeuron(n, s=s, theta=theta)
        net.store(codes[:1], rng)
        assert int(net.segments[0].synapses.sum()) == s
        assert bool(net(codes[:1]).all())
        assert false_positive(n, a, s, theta) > 1e-4
        assert within(share_of(net, foreign), false_positive(n, a, s, theta), trials)
    for theta, nu in ((8, 0.3), (6, 0.5)):
        net.set_theta(theta)
        lost = 1 - share_of(net, failing(codes[:1], nu, trials, rng))
        assert within(lost, false_negative(s, theta, nu), trials)
    net = DendriticNeuron(n, segments=2, s=s, theta=5)
    net.store(codes, rng)
    sizes = [int(segment.synapses.sum()) for segment in net.segments]
    chance = 1 - math.prod(1 - false_positive(n, a, size, 5) for size in sizes)
    assert within(share_of(net, foreign), chance, trials)
    assert bool(net(codes).all())
    assert bool((net.overlaps(codes).max(-1).values >= s).all())


def test_unions_have_the_expected_size():
    rng, sizes = generator(1, "union"), []
    for _ in range(200):
        segment = DendriticSegment(200, s=12, theta=5)
        for code in drawn(torch.full((5,), 16), 200, rng):
            segment.store(code, rng)
        sizes.append(float(segment.synapses.sum()))
    assert sum(sizes) / 200 == pytest.approx(union_size(200, 12, 5), abs=1.0)


def test_it_does_not_matter_which_code_a_synapse_was_stored_for():
    rng = generator(2, "shuffled")
    parts = [drawn(torch.tensor([12]), 200, rng)[0] for _ in range(5)]
    cells = torch.stack(parts).any(0).nonzero().reshape(-1)
    cells = cells[: len(cells) // 12 * 12]
    probes = drawn(torch.full((2000,), 16), 200, rng)
    answers = []
    for order in (cells, cells[torch.randperm(len(cells), generator=rng)], cells.flip(0)):
        segment = DendriticSegment(200, s=12, theta=5)
        for group in order.reshape(-1, 12):
            segment.store(torch.zeros(200).index_fill(0, group, 1.0), rng)
        assert segment.synapses.nonzero().reshape(-1).tolist() == sorted(cells.tolist())
        answers.append(segment(probes))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
    assert 0 < int(answers[0].sum()) < 2000


def test_two_selections_share_by_chance_what_a_segment_and_a_code_do():
    """The null model of `Selection.overlap` is the false positive of a segment; sites add up."""
    site = {"a": Site("a", "row", 200), "b": Site("b", "row", 50)}
    mine = Selection.of(site, {"a": range(12)})
    for shared in (1, 3, 5):
        other = Selection.of(site, {"a": range(12 - shared, 28 - shared)})
        assert mine.overlap(other)["p_value"] == pytest.approx(false_positive(200, 16, 12, shared), rel=1e-9)
    rng = generator(3, "overlap")
    seen = drawn(torch.full((20000,), 16), 200, rng)[:, :12].sum(1)
    assert within(float((seen >= 3).double().mean()), false_positive(200, 16, 12, 3), 20000)
    both = [
        Selection.of(site, {"a": range(12), "b": range(5)}),
        Selection.of(site, {"a": range(10, 26), "b": range(4, 9)}),
    ]
    literal = sum(
        p * q
        for i, p in enumerate(hypergeometric(200, 12, 16))
        for j, q in enumerate(hypergeometric(50, 5, 5))
        if i + j >= 3
    )
    assert both[0].overlap(both[1])["p_value"] == pytest.approx(literal, rel=1e-9)
    assert convolved([0.5, 0.5], [0.25, 0.75]) == pytest.approx([0.125, 0.5, 0.375])


def test_a_segment_learns_through_its_steps():
    """From no synapses, by gradient descent, which cells belong to a class of codes; permanences start just short."""
    n, rng = 60, generator(4, "learns")
    part = torch.arange(10)
    codes = drawn(torch.full((256,), 6), n, rng)
    codes[:128, part] = True
    wanted = torch.cat([torch.ones(128), torch.zeros(128)])
    net = DendriticNeuron(n, segments=1, s=10, theta=6, straight_through=True)
    with torch.no_grad():
        net.segments[0].permanence.fill_(0.4)
    assert not bool(net(codes).any())
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    for _ in range(100):
        answers = net(codes)
        assert set(answers.detach().unique().tolist()) <= {0.0, 1.0}
        optimizer.zero_grad()
        (answers - wanted).square().mean().backward()
        optimizer.step()
    assert float(((net(codes) > 0.5).float() == wanted).float().mean()) == 1.0
    assert bool(net.segments[0].synapses[part].sum() >= 6)
    frozen = DendriticNeuron(n, s=10, theta=6)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_the_recipe_reads_an_array_file_and_its_graft_holds_the_synapses():
    rng = generator(5, "file")
    stored, foreign = drawn(torch.full((8,), 24), 400, rng), drawn(torch.full((400,), 24), 400, rng)
    codes, label = torch.cat([stored, foreign]), [1] * 8 + [0] * 400
    options = {"n": 400, "segments": 2, "s": 14, "nu": 0.2}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "codes.npz"
        np.savez(path, codes=codes.numpy().astype(np.uint8), label=np.array(label))
        out = run("sdr_dendrites", NETWORK, path, changes=options)
        again = run("sdr_dendrites", NETWORK, path, changes=options)
    assert again.graft.identity == out.graft.identity
    found, net = out.state["recognition"], DendriticNeuron(400, segments=2, s=14)
    assert found["theta"] == recognition(400, 24, 14, nu=0.2, M=4, segments=2).theta
    assert within(found["false_positive"]["seen"], found["false_positive"]["expected"], 400)
    assert found["false_negative"]["seen"] <= found["false_negative"]["expected"] + 0.02
    assert out.graft.card["recognition"] == found
    assert out.graft.card["recipe"]["options"].items() >= options.items()
    assert not bool(net(stored).any())
    with out.graft.on(net):
        assert bool(net(stored).all())
        assert [int(segment.synapses.sum()) for segment in net.segments] == found["synapses"]
    assert not bool(net(stored).any())
    note(recognition=str(found))


def test_what_does_not_fit_is_said():
    rng = generator(6, "bad")
    with pytest.raises(RequestError, match="theta"):
        DendriticSegment(10, s=4, theta=5)
    with pytest.raises(RequestError, match="at least s=4 active"):
        DendriticSegment(10, s=4, theta=2).store(torch.tensor([1.0] * 3 + [0.0] * 7), rng)
    with pytest.raises(RequestError, match="s <= a"):
        recognition(100, 5, 8)
    row = {"codes": torch.ones(30)}
    with pytest.raises(RequestError, match="n="):
        run("sdr_dendrites", NETWORK, [row], changes={"n": 40, "s": 8})
    with pytest.raises(RequestError, match="dendritic neuron"):
        run("sdr_dendrites", DendriticSegment(40, s=8), [row])
    with pytest.raises(RequestError, match="column"):
        run("sdr_dendrites", NETWORK, [{"x": torch.ones(40)}], changes={"n": 40, "s": 8})
