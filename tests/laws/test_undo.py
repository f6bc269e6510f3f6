"""Promise 1: a stack of grafts comes off again bit for bit, in any order, on every family and dtype."""

import copy
import itertools

import pytest
import torch

from neurograft.adapters.slice import SliceMount
from neurograft.adapters.slice import slice as slice_adapter
from neurograft.core.errors import RequestError, RunError
from neurograft.core.fingerprint import same_bits
from neurograft.core.grafts.coordinates import coordinates, everything
from neurograft.core.grafts.delta import LowRank, New, Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.grafts.stack import ATTRIBUTE
from neurograft.core.region import Region, as_matrix
from neurograft.core.seeds import generator
from neurograft.core.selection import Selection
from neurograft.core.units import Parameters, Part, Site
from neurograft.core.untie import Untie
from neurograft.worlds.pico import families, pico, pico_batch

CORE = ["llama", "gpt2", "bert", "vit", "mixtral"]
WIDE = [("llama", torch.float32), ("mixtral", torch.float32), ("vit", torch.float32)]
CASES = [(f, torch.bfloat16) for f in families()] + WIDE + [("gpt2", torch.float16), ("bert", torch.float16)]


def bits(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)


def some(shape, layout, rng):
    """A region with about a third of a layout's ids."""
    if layout == "all":
        return everything(shape, as_matrix(shape))
    block = (2, 2) if layout == "block" else None
    total = Region.of(shape, layout, [], block=block).total
    return Region.of(shape, layout, torch.randperm(total, generator=rng)[: max(1, total // 3)], block=block)


def values_of(region, rng):
    return Slice(region, 0.1 * torch.randn(region.values_shape, generator=rng))


def overlapping(model, seed=0, kinds=range(5)):
    """Grafts of every kind of change whose entries overlap: rows, columns, low rank at half strength, all, new."""
    rng = generator(seed, "grafts")
    where = coordinates(model)
    tensors = {n: s for n, s in where.names().items() if len(s) and where.read(n).is_floating_point()}
    flat = {n: s for n, s in tensors.items() if len(s) == 2}
    fresh = list(tensors)[-1]
    even = {n: s for n, s in flat.items() if s[0] % 2 == 0 and s[1] % 2 == 0}
    builders = [
        lambda: {n: values_of(some(s, "rows" if len(s) > 1 else "flat", rng), rng) for n, s in tensors.items()},
        lambda: {n: values_of(some(s, "cols" if len(s) > 1 else "all", rng), rng) for n, s in tensors.items()},
        lambda: {
            n: LowRank(s, torch.randn(2, s[1], generator=rng), torch.randn(s[0], 2, generator=rng), 0.1)
            for n, s in flat.items()
        },
        lambda: (
            {n: values_of(some(s, "block", rng), rng) for n, s in even.items()}
            | {fresh: New(torch.randn(tensors[fresh], generator=rng))}
        ),
        lambda: {n: values_of(some(s, "flat" if i % 2 else "all", rng), rng) for i, (n, s) in enumerate(flat.items())},
    ]
    strengths = (1.0, 1.0, 0.5, 1.0, -1.5)
    return [Graft.made(model, builders[kind]()).scale(strengths[kind]) for kind in kinds]


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_any_order_on_and_off_is_exact(family, dtype):
    model = pico(family, dtype=dtype, **({"num_hidden_layers": 1} if family == "mixtral" else {}))
    with torch.no_grad():  # numbers that a float comparison would confuse
        for parameter in model.parameters():
            parameter.view(-1)[:3] = torch.tensor([float("nan"), -0.0, 0.0], dtype=dtype)[: parameter.numel()]
    base = bits(model)
    grafts = overlapping(model) if family in CORE else overlapping(model, kinds=(1, 2))
    orders = [(0, 1, 2, 3, 4), (4, 2, 0, 3, 1), (3, 1, 4, 0, 2)] if family in CORE else [(0, 1), (1, 0)]
    reached = []
    for order, leaving in zip(orders, orders[1:] + orders[:1]):
        for i in order:
            grafts[i].apply(model)
        reached.append(bits(model))
        assert not equal(reached[-1], base)
        grafts[leaving[0]].remove(model)
        left = bits(model)
        for i in leaving[1:]:
            grafts[i].remove(model)
        assert equal(bits(model), base)
        assert ATTRIBUTE not in model.__dict__
        if order is orders[0]:  # the one that left first is as if it had never been on
            for i in reversed(leaving[1:]):
                grafts[i].apply(model)
            assert equal(bits(model), left)
            for i in leaving[1:]:
                grafts[i].remove(model)
    assert all(equal(r, reached[0]) for r in reached)


@pytest.mark.parametrize("family", families())
def test_logits_under_on_equal_the_live_ones(family):
    dtype = torch.float32 if family in ("gpt2", "vit") else torch.bfloat16
    model, rng = pico(family, dtype=dtype), generator(2, family)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in pico_batch(model).items()}
    found, where = Parameters.of(model), coordinates(model)
    regions = {
        n: some(tuple(p.shape), "rows" if p.dim() > 1 else "flat", rng)
        for n, p in found.by_name.items()
        if n in where.found_in and not found.tied(n)
    }
    base = bits(model)

    def logits():
        with torch.no_grad():
            return next(v for k, v in model(**batch).items() if k != "loss" and torch.is_tensor(v))

    before = logits()
    with SliceMount(model, regions, allow_dense=True) as live:
        for theta in live.parameters():
            theta.data += 0.05 * torch.randn(theta.shape, generator=rng)
        live.write()
        last, graft = logits(), live.graft()
    assert equal(bits(model), base)
    assert not same_bits(last, before)
    with graft.on(model):
        assert same_bits(logits(), last)
    assert same_bits(logits(), before)


@pytest.fixture
def grafted():
    """A tiny Llama with two overlapping grafts on, its base's state, and the grafts."""
    model = pico("llama", dtype=torch.bfloat16)
    base = bits(model)
    first, second = overlapping(model)[:2]
    first.apply(model)
    second.apply(model)
    return model, base, (first, second)


def test_a_copy_with_grafts_on_is_a_model_of_its_own(grafted):
    model, base, grafts = grafted
    twin, here = copy.deepcopy(model), bits(model)
    assert equal(bits(twin), here)
    for graft in grafts:
        graft.remove(twin)
    assert equal(bits(twin), base)
    assert equal(bits(model), here)
    for graft in reversed(grafts):
        graft.remove(model)
    assert equal(bits(model), base)


def test_a_saved_model_with_grafts_on_is_the_grafted_one(grafted, tmp_path):
    model, _, _ = grafted
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert equal(bits(loaded), bits(model))
    assert ATTRIBUTE not in loaded.__dict__


def test_a_cast_model_gives_the_cast_base_back(grafted):
    model, _, grafts = grafted
    model.to(torch.float16)
    for graft in grafts:
        graft.remove(model)
    assert equal(bits(model), bits(pico("llama", dtype=torch.bfloat16).to(torch.float16)))


def test_load_state_dict_takes_the_grafted_state_and_no_other(grafted):
    model, base, grafts = grafted
    here = bits(model)
    model.load_state_dict(here)
    with pytest.raises(RunError, match="remove the graft first"):
        model.load_state_dict(base)
    assert equal(bits(model), here)
    for graft in grafts:
        graft.remove(model)
    model.load_state_dict(base)
    assert equal(bits(model), base)


def test_a_parameter_replaced_under_a_graft_is_noticed():
    model = pico("llama")
    region = Region.of((64, 32), "rows", [3])
    graft = Graft.made(model, {"model.embed_tokens.weight": Slice(region, torch.ones(1, 32))}).apply(model)
    model.resize_token_embeddings(80)
    stack = model.__dict__[ATTRIBUTE]
    with pytest.raises(RunError, match="resized or replaced"):
        stack.drop(model, next(iter(stack.grafts.values())))
    assert graft is model


def head_graft(model, *, names=("lm_head.weight",)):
    """A graft of the head alone, made on a model whose tied weights are apart."""
    untied = Untie.of(model, names).mount(model)
    region = Region.of((64, 32), "rows", [5, 9])
    graft = Graft.made(model, {"lm_head.weight": Slice(region, torch.full((2, 32), 0.5))})
    untied.remove()
    return graft


def test_tied_weights_come_apart_for_the_length_of_a_graft(tmp_path):
    model = pico("llama", tie_word_embeddings=True)
    base, shared = bits(model), model.lm_head.weight
    graft = Graft.load(head_graft(model).save(tmp_path / "g"))
    assert model.lm_head.weight is model.model.embed_tokens.weight is shared
    assert model.config.tie_word_embeddings is True
    with graft.on(model):
        assert model.model.embed_tokens.weight is shared
        assert torch.equal(shared, base["lm_head.weight"])
        assert torch.equal(model.lm_head.weight[5], torch.full((32,), 0.5))
        model.tie_weights()
        assert model.lm_head.weight is not shared
        model.save_pretrained(tmp_path / "merged")
        on = bits(model)
        twin = copy.deepcopy(model)
    assert model.lm_head.weight is shared
    assert model.config.tie_word_embeddings is True
    assert equal(bits(model), base)
    graft.remove(twin)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    loaded = type(model).from_pretrained(tmp_path / "merged")
    assert loaded.config.tie_word_embeddings is False
    assert equal(bits(loaded), on)


def test_grafts_that_untie_share_the_untying_and_clash_with_grafts_of_the_tied_weight():
    model = pico("llama", tie_word_embeddings=True)
    base, first = bits(model), head_graft(model)
    shared = model.lm_head.weight
    rows = Slice(Region.of((64, 32), "rows", [1]), torch.ones(1, 32))
    untied = Untie.of(model, ["lm_head.weight"]).mount(model)
    second = Graft.made(model, {"lm_head.weight": rows})
    untied.remove()
    tied = Graft.made(model, {"model.embed_tokens.weight": rows})
    first.apply(model)
    second.apply(model)
    first.remove(model)
    assert torch.equal(model.lm_head.weight[1], torch.ones(32))
    assert torch.equal(model.lm_head.weight[5], base["lm_head.weight"][5])
    with pytest.raises(RequestError, match="unties"):
        tied.apply(model)
    second.remove(model)
    assert model.lm_head.weight is shared
    with tied.on(model), pytest.raises(RequestError, match="unties"):
        first.apply(model)
    assert equal(bits(model), base)
    with pytest.raises(RequestError, match="not tied here"):
        first.apply(pico("llama"))


def test_an_untying_that_runs_out_of_memory_half_way_leaves_the_ties(monkeypatch):
    model = pico("t5", tie_word_embeddings=True)
    shared, ties, clone, made = model.shared.weight, model.all_tied_weights_keys, torch.Tensor.clone, []
    assert len(ties) > 1

    def full(self, *args, **kwargs):
        if self.shape == shared.shape:
            made.append(1)
            if len(made) > 1:
                raise MemoryError
        return clone(self, *args, **kwargs)

    untie = Untie.of(model, ["lm_head.weight"])
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", full)
        with pytest.raises(MemoryError):
            untie.mount(model)
    assert all(model.get_parameter(name) is shared for name in ties)
    assert model.config.tie_word_embeddings is True
    assert model.all_tied_weights_keys is ties
    untie.mount(model).remove()


def test_rows_appended_to_weights_that_were_untied_first():
    model = pico("gpt2")
    base, names = bits(model), ("transformer.wte.weight", "lm_head.weight")
    rows = {name: New(torch.full((2, 32), float(i)), 64) for i, name in enumerate(names)}
    with Graft(rows, (Untie(names[1:]),)).on(model):
        assert [len(model.get_parameter(n)) for n in names] == [66, 66]
        assert model.lm_head.weight is not model.transformer.wte.weight
    assert equal(bits(model), base)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_appended_rows_and_changes_of_the_same_weight_refuse_each_other():
    model = pico("llama")
    base, name = bits(model), "model.embed_tokens.weight"
    rows = Graft.made(model, {name: Slice(Region.of((64, 32), "rows", [1]), torch.ones(1, 32))})
    longer = Graft.made(model, {name: New(torch.ones(2, 32), 64)})
    with rows.on(model), pytest.raises(RequestError, match="appends rows"):
        longer.apply(model)
    with longer.on(model), pytest.raises(RequestError, match="shape"):
        rows.apply(model)
    assert equal(bits(model), base)


def test_a_cast_model_with_appended_rows_gives_the_cast_base_back():
    model, name = pico("gpt2"), "transformer.wte.weight"
    longer = Graft.made(model, {name: New(torch.ones(2, 32), 64)})
    longer.remove(longer.apply(model).to(torch.bfloat16))
    assert equal(bits(model), bits(pico("gpt2").to(torch.bfloat16)))
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_base_that_was_written_into_between_two_applies_is_another_one():
    model, up, down = pico("llama"), *(f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    stays, comes = (
        Graft.made(model, {n: Slice(Region.of((48, 32), "rows", [1]), torch.ones(1, 32))}) for n in (up, down)
    )
    with stays.on(model):
        comes.apply(model)
        comes.remove(model)
        model.get_parameter(down).data.add_(1.0)
        with pytest.raises(RequestError, match="other numbers"):
            comes.apply(model)


def test_sums_and_strengths_agree_with_the_stack():
    model = pico("mixtral", dtype=torch.bfloat16, num_hidden_layers=1)
    grafts = overlapping(model)
    first, second, low = (g.bind(model) for g in (grafts[0], grafts[1], grafts[2]))
    with first.on(model), second.on(model):
        both = bits(model)
    with (first + second).on(model):
        assert equal(bits(model), both)
    with first.on(model), low.on(model):
        exact = bits(model)
    with (first + low).on(model):
        # a sum is rounded once more to float32 where both touch a number
        for name, tensor in bits(model).items():
            torch.testing.assert_close(tensor, exact[name], rtol=1e-2, atol=1e-6)


def test_an_interrupted_apply_leaves_nothing_behind(monkeypatch):
    model = pico("llama")
    base, graft = bits(model), overlapping(model)[0]
    written = []

    def failing(self, weight, values):
        written.append(weight)
        if len(written) == 3:
            raise MemoryError
        original(self, weight, values)

    original = Region.write_
    monkeypatch.setattr(Region, "write_", failing)
    with pytest.raises(MemoryError):
        graft.apply(model)
    assert equal(bits(model), base)
    assert ATTRIBUTE not in model.__dict__


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_an_interrupted_remove_is_ended_by_another(at, monkeypatch):
    model = pico("llama")
    base, (first, second) = bits(model), (overlapping(model, seed=i)[0] for i in (0, 1))
    with second.on(model):
        wanted = bits(model)
    first.apply(second.apply(model))
    written, original = [], Region.write_

    def failing(self, weight, values):
        written.append(weight)
        if len(written) == at:
            raise KeyboardInterrupt
        original(self, weight, values)

    with monkeypatch.context() as patch:
        patch.setattr(Region, "write_", failing)
        with pytest.raises(KeyboardInterrupt):
            first.remove(model)
    first.remove(model)
    assert equal(bits(model), wanted)
    second.remove(model)
    assert equal(bits(model), base)


def test_every_permutation_of_three():
    # float32: a narrower dtype would round the order of a sum away
    model = pico("llama", num_hidden_layers=1)
    base, grafts = bits(model), [overlapping(model, seed=i, kinds=(2,))[0] for i in range(3)]
    reached = []
    for order in itertools.permutations(grafts):
        for graft in order:
            graft.apply(model)
        reached.append(bits(model))
        for graft in order:
            graft.remove(model)
        assert equal(bits(model), base)
    assert all(equal(r, reached[0]) for r in reached)


@pytest.mark.parametrize("use", ["lm_head.weight", "model.embed_tokens.weight"])
def test_one_use_of_a_tied_weight_is_trained_alone(use, tmp_path):
    model = pico("llama", tie_word_embeddings=True)
    base, shared = bits(model), model.lm_head.weight
    other = ({"lm_head.weight", "model.embed_tokens.weight"} - {use}).pop()
    site = Site("rows", "row", 64, (Part.rows(use, (64, 32)),))
    where = Selection({"rows": site}, {"rows": torch.tensor([4, 7])})
    with pytest.raises(RequestError, match="tied='untie'"):
        slice_adapter(model, where)
    with pytest.raises(RequestError, match="no parameter"):
        slice_adapter(model, where, tied="untie", protect=where)
    assert model.lm_head.weight is shared
    with slice_adapter(model, where, tied="untie") as live:
        optimizer = torch.optim.AdamW(live.parameters(), lr=0.1)
        model(**pico_batch(model)).loss.backward()
        optimizer.step()
        on = bits(model)
        inside = live.graft()
    assert model.lm_head.weight is model.model.embed_tokens.weight is shared
    assert equal(bits(model), base)
    assert torch.equal(on[other], base[other])
    assert (on[use] != base[use]).any(-1).nonzero().reshape(-1).tolist() == [4, 7]
    graft = Graft.load(live.graft().save(tmp_path / "g"))
    assert graft.identity == inside.identity
    with graft.on(model):
        assert equal(bits(model), on)
    assert equal(bits(model), base)
