"""Promise 3: compact training equals its dense twin, and holds nothing dense."""

import copy

import pytest
import torch
from _compact import LAYOUTS, bits, dense_gradients, exact, loss_of, regions, same_bits, some_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neurograft.adapters.slice import slice as compact
from neurograft.core.compact.meter import saved
from neurograft.core.errors import RequestError, RunError
from neurograft.core.selection import Selection
from neurograft.core.units import Part, Site
from neurograft.worlds.pico import families, pico, pico_batch

PLAIN = {"llama", "gpt2", "bert", "vit", "mixtral"}  # these may refuse nothing


def gradients(model, where, loss, **options):
    with compact(model, where, tied="both", **options) as live:
        loss(model).backward()
        return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in live.named_parameters().items()}


@pytest.mark.parametrize("route", ["in-place", "side"])
@pytest.mark.parametrize("family", families())
def test_gradients_equal_the_dense_twin_in_every_layout(family, route):
    model, loss = exact(family)
    twin = dense_gradients(model, loss)
    for turn in range(len(LAYOUTS)):
        where = some_of(model, turn=turn)
        found, refused = None, ""
        try:
            found = gradients(model, where, loss, route=route)
        except RunError as error:
            refused = str(error)
        if found is None:
            assert family not in PLAIN, refused
            assert "allow_dense=True" in refused
            found = gradients(model, where, loss, allow_dense=True, route=route)
        for name, region in regions(model, where).items():
            wanted = region.read(twin[name])
            assert torch.allclose(found[name], wanted, rtol=1e-9, atol=1e-10), (name, region.layout)


@pytest.mark.parametrize("route", ["in-place", "side"])
def test_ten_steps_equal_a_dense_twin_whose_other_entries_are_put_back(route):
    model, loss = exact("llama")
    twin, _ = exact("llama")
    where = some_of(model)
    entries = regions(model, where)
    before = {n: p.detach().clone() for n, p in twin.named_parameters()}
    options = {"lr": 1e-2, "weight_decay": 0.1}
    with compact(model, where, tied="both", route=route) as live:
        ours, theirs = torch.optim.AdamW(live.parameters(), **options), torch.optim.AdamW(twin.parameters(), **options)
        for _ in range(10):
            ours.zero_grad()
            theirs.zero_grad()
            loss(model).backward()
            loss(twin).backward()
            ours.step()
            theirs.step()
            with torch.no_grad():
                for name, parameter in twin.named_parameters():
                    values = entries[name].read(parameter)
                    parameter.copy_(before[name])
                    entries[name].write_(parameter, values)
        copied = copy.deepcopy(model)  # a plain model with the values
        for name, parameter in twin.named_parameters():
            torch.testing.assert_close(copied.get_parameter(name).detach(), parameter.detach(), rtol=0, atol=1e-10)
        assert not torch.equal(twin.lm_head.weight, before["lm_head.weight"])


@pytest.mark.parametrize("route", ["in-place", "side"])
@pytest.mark.parametrize("family", ["mixtral"])
def test_fused_expert_banks_under_the_grouped_kernel(family, route):
    model = pico(family)  # the kernel has no float64
    loss = loss_of(pico_batch(model))
    twin = dense_gradients(model, loss)
    for layouts in ("rows", "cols", "flat", "all"):
        where = some_of(model, (layouts,), match="experts")
        found = gradients(model, where, loss, route=route)
        for name, region in regions(model, where).items():
            torch.testing.assert_close(found[name], region.read(twin[name]), rtol=1e-4, atol=1e-7)
            assert found[name].abs().max() > 1e-5
    model.set_experts_implementation("batched_mm")  # copies whole experts for every token
    with pytest.raises(RunError, match="getitem"):
        gradients(model, where, loss, route=route)


class Counted(TorchDispatchMode):
    """Counts new float tensors with as many numbers as one of the given weights."""

    def __init__(self, shapes):
        self.sizes, self.found, self.old = {tuple(sorted(s)) for s in shapes}, [], set()
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            new = isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given
            if new and t.is_floating_point() and tuple(sorted(t.shape)) in self.sizes:
                self.found.append(str(func))
        return out


def one_step(model, parameters, batch, shapes):
    optimizer = torch.optim.AdamW(parameters, foreach=False, fused=False)
    with Counted(shapes) as counted:
        model(**batch).loss.backward()
        optimizer.step()
    return counted.found


@pytest.mark.parametrize("route", ["in-place", "side"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("layout", ["rows", "cols", "block"])
def test_no_copy_of_a_touched_weight_and_no_dense_gradient(family, layout, route):
    model = pico(family, vocab_size=71) if family != "gpt2" else pico(family, vocab_size=71, n_embd=40)
    batch = pico_batch(model, batch=3, length=19)  # 57 tokens, unlike any dimension
    blocks = {"llama": "layers", "gpt2": "h.", "mixtral": "experts"}[family]
    where = some_of(model, (layout,), match=blocks, fraction=0.1)
    touched = [tuple(model.get_parameter(n).shape) for n in regions(model, where)]
    shapes = {s for s in touched if len(s) > 1} | {s[1:] for s in touched if len(s) > 2}  # also one expert
    with compact(model, where, route=route) as live:
        one_step(model, live.parameters(), batch, ())  # what stands beside a weight is 0 before the first step
        assert one_step(model, live.parameters(), batch, shapes) == []
    model.requires_grad_(True)
    assert len(one_step(model, list(model.parameters()), batch, shapes)) > 4 * len(shapes)


@pytest.mark.parametrize("route", ["in-place", "side"])
def test_scattered_weights_stay_in_bounded_chunks(route):
    model = torch.nn.Linear(40, 700, bias=False)
    site = Site("w", "weight", 28000, (Part.entries("weight", 28000),))
    where = Selection.of({"w": site}, {"w": torch.arange(0, 28000, 2)})
    with compact(model, where, route=route), Counted({(700, 40)}) as counted:
        model(torch.randn(9, 40)).sum().backward()
    assert counted.found == []


def kept_bytes(model, batch):
    with saved(model) as meter:
        loss = model(**batch).loss
        found = meter.bytes
    loss.backward()
    return found


def neurons(model, parts, count=3):
    sites = {}
    for layer, block in enumerate(model.model.layers):
        mlp, (wide, hidden) = f"model.layers.{layer}.mlp", block.mlp.gate_proj.weight.shape
        made = {
            "gate": Part.rows(f"{mlp}.gate_proj.weight", (wide, hidden)),
            "up": Part.rows(f"{mlp}.up_proj.weight", (wide, hidden)),
            "down": Part.columns(f"{mlp}.down_proj.weight", (hidden, wide)),
        }
        sites[mlp] = Site(mlp, "neuron", wide, tuple(made[p] for p in parts))
    return Selection.of(sites, {name: torch.arange(0, 2 * count, 2) for name in sites})


@pytest.mark.parametrize("route", ["in-place", "side"])
def test_what_is_kept_for_the_backward_pass_is_exactly_the_selected_features(route):
    model = pico("llama").requires_grad_(False)
    batch, tokens, hidden, count = pico_batch(model, length=9), 18, 32, 3
    model.enable_input_require_grads()  # a floor with the same graph: gradients from the first layer on
    floor = kept_bytes(model, batch)
    with compact(model, neurons(model, ["down"], count), route=route):
        columns = kept_bytes(model, batch)
    with compact(model, neurons(model, ["gate", "up"], count), route=route):
        rows = kept_bytes(model, batch)
    layers, numbers = 2, 4
    ids = 2 * layers * count * 8  # index tensors, kept anyway; an upper bound
    if route == "side":
        ids += 2 * layers * count * hidden * numbers  # and the base's numbers of the region
    assert 0 <= columns - floor - layers * tokens * count * numbers <= ids
    assert 0 <= rows - floor - layers * tokens * hidden * numbers <= ids  # gate and up share their input


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_bases_keep_float32_masters(dtype):
    model = pico("llama", dtype=dtype)
    batch, where = pico_batch(model), some_of(model, match="proj")
    with compact(model, where) as live:
        optimizer = torch.optim.AdamW(live.parameters(), lr=1e-5, weight_decay=0.0)
        before = live.state_dict()
        for _ in range(3):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        moved = 0
        for name, region in regions(model, where).items():
            master = live.named_parameters()[name]
            assert master.dtype == torch.float32
            assert not torch.equal(master, before[name])  # steps far below the base's rounding are not lost
            weight = model.get_parameter(name).detach()
            assert torch.equal(region.read(weight), master.detach().to(dtype))
            moved += int((region.read(weight).float() != before[name]).sum())
        assert moved > 0


KINDS = ["llama", "gpt2", "bert", "vit", "mixtral", "olmoe", "resnet", "convnext", "t5", "gemma3"]


def trained_on(route, model, loss, where, *, decay, steps=3):
    """Losses and gradients of some steps, the values, the deltas, and whether the base's bits were there all along."""
    seen, before, at_rest = [], bits(model), loss(model).detach()
    with compact(model, where, tied="both", route=route) as live:
        optimizer = torch.optim.AdamW(live.parameters(), lr=1e-2, weight_decay=decay)
        for _ in range(steps):
            optimizer.zero_grad()
            found = loss(model)
            found.backward()
            grads = {n: p.grad.clone() for n, p in live.named_parameters().items() if p.grad is not None}
            seen.append((found.detach(), grads))
            optimizer.step()
        seen.append((loss(model).detach(), {}))
        with torch.no_grad():
            torch.testing.assert_close(loss(model), seen[-1][0], rtol=1e-9, atol=1e-9)
        written = not same_bits(bits(model), before)
        ended = live.rest()
        assert torch.equal(loss(model).detach(), at_rest)
        ended()
        torch.testing.assert_close(loss(model).detach(), seen[-1][0], rtol=0, atol=0)
        values, graft = live.state_dict(), live.graft()
    assert same_bits(bits(model), before)
    assert torch.equal(loss(model).detach(), at_rest)
    return seen, values, graft, written


@pytest.mark.parametrize("turn", range(len(LAYOUTS)))
@pytest.mark.parametrize("family", KINDS)
def test_the_side_path_trains_the_same_values(family, turn):
    """Every parameter of the model, each in one of the layouts; the base is never written."""
    reached = {}
    for route in ("in-place", "side"):
        model, loss = exact(family)
        reached[route] = trained_on(route, model, loss, some_of(model, turn=turn), decay=0.1 * (turn % 2))
    (ours, values, graft, written), (theirs, found, other, touched) = reached["in-place"], reached["side"]
    assert written
    assert not touched
    torch.testing.assert_close(theirs, ours, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(found, values, rtol=0, atol=1e-6)  # norms are float32 inside, and Adam divides
    assert graft.base == other.base
    assert graft.deltas.keys() == other.deltas.keys()
    for name, delta in graft.deltas.items():
        torch.testing.assert_close(other.deltas[name].tensors(), delta.tensors(), rtol=0, atol=1e-6)
    with other.on(model):
        torch.testing.assert_close(loss(model).detach(), theirs[-1][0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("route", ["in-place", "side"])
def test_new_tokens_and_a_new_head_train_the_same(route):
    reached = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = pico("llama", dtype=dtype, vocab_size=68)
        batch, where = pico_batch(model), some_of(model, match="up_proj")
        batch["input_ids"][:, 1] = 66
        before = bits(model)
        with compact(model, where, new={"model.embed_tokens.weight": 65}, route=route) as live:
            reached[dtype] = stepped(live, lambda m, batch=batch: m(**batch).loss)
            added = live.graft().deltas["model.embed_tokens.weight"]
            assert (added.after, tuple(added.values.shape)) == (65, (3, 32))
            assert (added.values[1] - before["model.embed_tokens.weight"][66].float()).abs().max() > 1e-4
            assert same_bits(bits(model), before) is (route == "side")
        with compact(model, where, new=["lm_head"], route=route) as live:
            stepped(live, lambda m, batch=batch: m(**batch).loss)
            head = live.fresh()["lm_head.weight"]
            assert head.dtype == torch.float32
            assert torch.equal(model.lm_head.weight.detach(), head.detach().to(dtype))
        assert same_bits(bits(model), before)
    torch.testing.assert_close(reached[torch.bfloat16], reached[torch.float32], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("route", ["in-place", "side"])
def test_a_second_attachment_goes_on_from_the_state_of_the_first(route):
    model, loss = exact("llama")
    where, before = some_of(model), bits(model)
    with compact(model, where, route=route) as first:
        stepped(first, loss)
        state, graft, wanted = first.state_dict(), first.graft(), loss(model).detach()
    with compact(model, where, route=route) as second:
        second.load_state_dict(state)
        assert torch.equal(loss(model).detach(), wanted)
        assert second.graft().identity == graft.identity
    with graft.on(model), compact(model, where, route=route) as over:
        torch.testing.assert_close(loss(model).detach(), wanted, rtol=1e-12, atol=1e-12)
        stepped(over, loss)
        assert loss(model) < wanted
    assert same_bits(bits(model), before)


def stepped(live, loss):
    optimizer, losses = torch.optim.AdamW(live.parameters(), lr=1e-3), []
    for _ in range(3):
        optimizer.zero_grad()
        found = loss(live.model)
        found.backward()
        optimizer.step()
        losses.append(float(found.detach()))
    return torch.tensor(losses)


def test_a_table_with_an_entry_in_every_row_is_looked_up_and_trained_in_pieces():
    table = torch.nn.Embedding(997, 8)
    site = Site("w", "weight", 7976, (Part.entries("weight", 7976),))
    where = Selection.of({"w": site}, {"w": torch.arange(3, 7976, 8)})
    for route in ("in-place", "side"):
        with compact(table, where, route=route), Counted({(997, 8), (998, 8), (7976,), (7984,)}) as counted:
            table(torch.tensor([[1, 996, 1, 5]])).square().sum().backward()
        assert counted.found == []


class Packed(torch.nn.Module):
    """A linear layer with int8 weights, as quantized bases have them."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()
        self.scale = torch.nn.Parameter(weight.abs().max() / 127, requires_grad=False)
        self.weight = torch.nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def dequantize(self):
        return self.weight.float() * self.scale

    def forward(self, x):
        return torch.nn.functional.linear(x, self.dequantize())


def test_a_packed_base_trains_beside_its_weights():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 4, bias=False))
        x = torch.randn(32, 8)
    packed = torch.nn.Sequential(*(Packed(layer) for layer in plain))
    for layer, twin in zip(packed, plain):
        twin.weight.data.copy_(layer.dequantize())
    where, reached = some_of(plain, ("rows", "cols"), match="weight"), []
    for model, route in ((packed, "side"), (plain, "in-place")):
        with compact(model, where, route=route) as live:
            optimizer = torch.optim.AdamW(live.parameters(), lr=1e-2)
            for _ in range(5):
                optimizer.zero_grad()
                model(x).pow(2).mean().backward()
                optimizer.step()
            reached.append(live.state_dict())
    for name, values in reached[0].items():
        torch.testing.assert_close(values, reached[1][name], rtol=1e-5, atol=1e-6)
    with pytest.raises(RequestError, match="side"):
        compact(packed, where)
