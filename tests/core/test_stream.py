"""Streaming statistics: hand numbers, parts, brute force, bounded memory, padding."""

import pytest
import torch

from neurograft.core.errors import RequestError
from neurograft.core.seeds import generator
from neurograft.core.taps.reducers import Exemplars, Extremes, Moments, Rate, Sample, Sums
from neurograft.core.taps.stream import means, observe
from neurograft.core.taps.tap import watch
from neurograft.core.units import Site, Tap
from neurograft.worlds.pico import pico, pico_batch

MAKE = {
    "moments": Moments,
    "sums": Sums,
    "rate": lambda n: Rate(n, above=0.3),
    "extremes": Extremes,
    "exemplars": lambda n: Exemplars(n, k=15),
    "sample": lambda n: Sample(n, size=6000),
}


def data(tokens=5000, n=7, seed=0):
    x = torch.randn(tokens, n, generator=generator(seed, "stream")) * torch.arange(1, n + 1)
    places = torch.stack([torch.arange(tokens) // 10, torch.arange(tokens) % 10], 1)
    return x, places


def fed(make, x, places, cut=(300, 301, 2000)):
    found = make(x.shape[1])
    for part, where in zip(x.tensor_split(cut), places.tensor_split(cut)):
        found.update(part, where)
    return found


def state(reducer):
    return {k: v for k, v in vars(reducer).items() if isinstance(v, torch.Tensor) and k not in ("keys", "rows")}


def test_hand_numbers():
    x = torch.tensor([[1.0, -1.0], [2.0, 0.0], [6.0, 4.0]])
    places = torch.tensor([[0, 0], [0, 1], [1, 0]])
    m = fed(Moments, x, places, (1,))
    assert m.mean.tolist() == [3.0, 1.0]
    assert m.variance.tolist() == pytest.approx([14 / 3, 14 / 3])
    s = fed(Sums, x, places, (2,))
    assert (s.signed.tolist(), s.absolute.tolist(), s.squared.tolist()) == ([9.0, 3.0], [9.0, 5.0], [41.0, 17.0])
    assert fed(lambda n: Rate(n, above=0.0), x, places, (1,)).rate.tolist() == pytest.approx([1.0, 1 / 3])
    e = fed(Extremes, x, places, (1,))
    assert (e.high.tolist(), e.low.tolist(), e.absolute.tolist()) == ([6.0, 4.0], [1.0, -1.0], [6.0, 4.0])
    t = fed(lambda n: Exemplars(n, k=2), x, places, (1, 2))
    assert t.values.tolist() == [[6.0, 4.0], [2.0, 0.0]]
    assert t.places[:, 1].tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("name", MAKE)
def test_parts_give_what_the_whole_gives(name):
    x, places = data()
    whole, parts = (fed(MAKE[name], x, places, cut) for cut in ((), (1, 1234, 4000)))
    assert parts.count == whole.count == 5000
    for key, value in state(whole).items():
        assert torch.allclose(value.double(), state(parts)[key].double(), rtol=1e-5), key
    if name == "sample":
        assert torch.equal(whole.quantile(0.9), parts.quantile(0.9))


def test_against_brute_force():
    x, places = data()
    assert torch.allclose(fed(Moments, x, places).variance, x.double().var(0, correction=0), rtol=1e-6)
    top = fed(MAKE["exemplars"], x, places)
    best = x.topk(15, dim=0)
    assert torch.equal(top.values, best.values)
    assert torch.equal(top.places, places[best.indices])
    assert torch.equal(fed(MAKE["sample"], x, places).quantile(0.99), torch.quantile(x, 0.99, dim=0))


def test_of_equal_activations_the_earliest_stay():
    """However they are cut, as rectified units and repeated tokens give many."""
    places = torch.stack([torch.arange(400), torch.zeros(400, dtype=torch.int64)], 1)
    x = torch.randint(0, 4, (400, 9), generator=generator(0, "ties")).float()
    first = x.sort(dim=0, descending=True, stable=True).indices[:10]
    for cut in ((), (7, 200), (399,)):
        assert torch.equal(fed(lambda n: Exemplars(n, k=10), x, places, cut).places[..., 0], first)


def test_variance_survives_a_large_mean():
    x, places = data(n=1)
    assert fed(Moments, x + 1e4, places).variance.item() == pytest.approx(x.double().var(correction=0).item(), rel=1e-3)


def test_a_full_sample_keeps_its_size_and_its_rank_error():
    x, places = data(tokens=20_000, n=200)
    sample = fed(lambda n: Sample(n, size=500), x, places, tuple(range(100, 20_000, 100)))
    assert sample.rows.shape == (500, 200)
    rank = (x <= sample.quantile(0.9)).double().mean(0)
    assert rank.mean().item() == pytest.approx(0.9, abs=3 * (0.9 * 0.1 / 500) ** 0.5)
    # every token is as likely to stay: kept rows are spread evenly over the stream
    where = (x[:, None, 0] == sample.rows[None, :, 0]).nonzero()[:, 0].double()
    assert where.mean().item() == pytest.approx(10_000, abs=4 * 20_000 / (12 * 500) ** 0.5)


def test_nothing_seen_is_zero():
    for make in (Moments, Sums, Extremes, Rate, Sample):
        empty = make(3)
        empty.update(torch.empty(0, 3))
        assert empty.count == 0
        value = empty.quantile(0.5) if make is Sample else next(v for v in state(empty).values())
        assert value.tolist() == [0.0] * 3


def sites(width=1):
    tap = Tap("model.layers.1.mlp.down_proj", "input", width=width, stride=width)
    return {"s": Site("s", "neuron", 48 // width, tap=tap, layer=1)}


def test_observe_pools_by_example_and_ignores_padding_and_batching():
    model = pico("llama")
    batch, raw = pico_batch(model, batch=3), []
    with watch(model, sites(), lambda n, x: raw.append(x)):
        model(**batch)
    lengths = batch["attention_mask"].sum(1).tolist()
    rows = raw[0].split(lengths)
    for pool, reduce in (("mean", lambda r: r.mean(0)), ("max", lambda r: r.amax(0))):
        hand = torch.stack([reduce(r) for r in rows]).mean(0)
        for batches in ([batch], [{k: v[i : i + 1] for k, v in batch.items()} for i in range(3)]):
            seen = observe(model, sites(), batches, lambda n: {"m": Moments(n)}, pool=pool)["s"]["m"]
            assert seen.count == 3
            assert torch.allclose(seen.mean, hand.double(), atol=1e-6)


def everywhere(batch):
    return torch.ones_like(batch["input_ids"])


def test_exemplars_name_the_example_over_batches():
    model = pico("llama")
    batches = [pico_batch(model, seed=s) for s in range(3)]
    seen = observe(model, sites(), batches, lambda n: {"t": Exemplars(n, k=3)})["s"]["t"]
    for unit in (0, 17):
        for value, (example, position) in zip(seen.values[:, unit], seen.places[:, unit].tolist()):
            raw = []
            with watch(
                model, sites(), lambda n, x, raw=raw: raw.append(x), mask=lambda b: torch.ones_like(b["input_ids"])
            ):
                model(**batches[example // 2])
            first = 8 * (example % 2)
            assert raw[0][first + position, unit].item() == pytest.approx(value.item(), abs=1e-6)


def test_wide_units_are_read_as_norms_and_have_vector_means():
    model = pico("llama")
    batch, raw = pico_batch(model), []
    with watch(model, sites(8), lambda n, x: raw.append(x)):
        model(**batch)
    seen = observe(model, sites(8), [batch], lambda n: {"s": Sums(n)})["s"]["s"]
    assert torch.allclose(seen.signed, raw[0].norm(dim=-1).sum(0).double(), rtol=1e-5)
    assert torch.allclose(means(model, sites(8), [batch])["s"], raw[0].mean(0), atol=1e-6)


def test_no_data_is_an_error():
    with pytest.raises(RequestError, match="no batches"):
        observe(pico("llama"), sites(), [], lambda n: {"m": Moments(n)})
