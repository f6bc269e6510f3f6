"""Laws of optimizers that need no gradient: the base is never written, the graft is a log, and the log replays."""

import copy
from dataclasses import replace

import pytest
import torch
from tests.proofs._tools import rows_in

import neurograft as ng
from neurograft.anatomy.sites import sites
from neurograft.core.choose import choose, methods, option_names
from neurograft.core.compact.forward import ForwardOnly
from neurograft.core.compact.meter import Peak
from neurograft.core.compact.shift import Shift
from neurograft.core.errors import RequestError, RunError
from neurograft.core.fingerprint import same_bits
from neurograft.core.grafts.coordinates import everything
from neurograft.core.grafts.delta import Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.numerics.noise import Stream
from neurograft.core.region import Region, as_matrix
from neurograft.core.selection import Selection
from neurograft.core.units import Part, Site
from neurograft.pipeline.attach import attach
from neurograft.train.loop import fit
from neurograft.worlds.pico import families, pico, pico_batch

METHODS = [n for n in methods("optimizers") if "forward_only" in choose("optimizers", n).card.claims]
DISK = ("dense", {"originals": "disk"})


def quick(method, **more):
    """A method that draws few directions."""
    few = {"n": 2} if "n" in option_names(choose("optimizers", method).function) else {}
    return method, {**few, **more}


def bits(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)


def loss(model, batch):
    return float(model(**batch).loss.detach())


def trained(model, method, *, adapter="dense", where=None, steps=3, lr=1e-3, **more):
    """Return the graft, and the state the model had at the end of the training."""
    with attach(model, where, adapter=adapter) as live:
        fit(live, [pico_batch(model)], steps=steps, lr=lr, optimizer=quick(method, **more), objective=loss)
        return live.graft(), bits(model)


def some(model, match="*down_proj*", kind="column"):
    units = sites(model, kind, match=match)
    return Selection.of(units, {n: torch.arange(0, s.n, 3) for n, s in units.items()})


@pytest.mark.parametrize("family", families())
def test_every_family_runs_shifted_as_a_copy_with_the_noise_written_into_it_does(family):
    model, terms, grain = pico(family), [(7, 0.1), (8, -0.05)], 64  # small chunks, so that every route has several
    batch, twin = pico_batch(model), copy.deepcopy(model)
    before, held = bits(model), dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        stream = Stream(name, tuple(parameter.shape), grain)
        for chunk, lo, hi in stream.chunks():
            for seed, scale in terms:
                parameter.data.view(-1)[lo:hi] += scale * stream.draw(seed, chunk, hi - lo, parameter.device)
    if hasattr(twin, "tie_weights"):
        twin.tie_weights()
    with torch.no_grad():
        wanted, plain = twin(**batch)[0], model(**batch)[0]
        with Shift(held, terms, grain=grain) as seen:
            found = model(**batch)[0]
    assert (wanted - plain).abs().max() > 2e-3
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert equal(bits(model), before)
    model(**batch)[0].sum().backward()
    assert set(held) - seen.reached <= {n for n, p in held.items() if p.grad is None}


def test_a_change_of_type_sees_shifted_numbers_too():
    """`.type()` without a type is a question, `.type(dtype)` a use."""
    weight = torch.nn.Parameter(torch.zeros(4))
    with torch.no_grad(), Shift({"w": weight}, [(3, 1.0)], grain=64) as seen:
        assert weight.type() == "torch.FloatTensor"
        assert not seen.reached
        wide = weight.type(torch.float64)
    assert seen.reached == {"w"}
    assert torch.equal(wide, Stream("w", (4,), 64).draw(3, 0, 4, weight.device).double())


@pytest.mark.parametrize("method", METHODS)
def test_tensors_in_another_memory_order_are_shifted_and_moved(method):
    """Convolutions are often stored with their channels last; the log knows numbers by their place in the tensor."""
    grafts = []
    for order in (torch.contiguous_format, torch.channels_last):
        model = pico("resnet").to(memory_format=order)
        before = bits(model)
        graft, ended = trained(model, method)
        assert equal(bits(model), before)
        with graft.on(pico("resnet")) as plain:
            assert equal(bits(plain), ended)
            grafts.append(bits(plain))
    for name, value in grafts[0].items():
        torch.testing.assert_close(grafts[1][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", ["dense", DISK], ids=["memory", "disk"])
@pytest.mark.parametrize("method", METHODS)
def test_the_graft_is_a_log_that_replays_to_the_trained_bytes(method, adapter, dtype, tmp_path):
    model = pico("llama", dtype=dtype)
    before = bits(model)
    graft, ended = trained(model, method, adapter=adapter)
    assert equal(bits(model), before)
    assert all(p.grad is None for p in model.parameters())
    assert graft.logged
    fresh = pico("llama", dtype=dtype)
    with graft.on(fresh):
        assert equal(bits(fresh), ended)
    assert equal(bits(fresh), before)
    whole = graft.materialize()
    assert not whole.logged
    assert whole.identity == graft.identity
    log = Graft.load(graft.save(tmp_path / "log", portable=False))
    portable = Graft.load(graft.save(tmp_path / "portable"))
    assert (log.logged, portable.logged) == (True, False)
    assert log.identity == portable.identity == graft.identity
    small, large = (sum(f.stat().st_size for f in (tmp_path / n).glob("*.safetensors")) for n in ("log", "portable"))
    assert small < large / 20
    for read in (log, portable):
        with read.on(model):
            assert equal(bits(model), ended)
        assert equal(bits(model), before)
    with pytest.raises(RequestError, match="other numbers"):
        log.apply(pico("llama", dtype=dtype, seed=1))


@pytest.mark.parametrize("method", METHODS)
def test_a_log_refuses_another_torch_device_or_result(method, tmp_path):
    model = pico("llama")
    before = bits(model)
    graft, _ = trained(model, method, steps=1)
    made = next(iter(graft.deltas.values())).log.made
    for what in ("torch", "device"):
        was = made[what]
        made[what] = "cuda of another kind" if what == "device" else "1.0"
        with pytest.raises(RequestError, match="materialize"):
            graft.apply(model)
        with pytest.raises(RequestError, match="materialize"):
            graft.save(tmp_path / "no")
        made[what] = was
    graft.apply(model)
    graft.remove(model)
    next(iter(graft.deltas.values())).log.pulls[0, 0] += 1e-3
    with pytest.raises(RunError, match="other bytes"):
        graft.apply(model)
    assert equal(bits(model), before)


@pytest.mark.parametrize("adapter", ["dense", DISK], ids=["memory", "disk"])
@pytest.mark.parametrize("method", METHODS)
def test_a_log_is_saved_portably_while_the_model_is_live_and_when_it_is_gone(method, adapter, tmp_path):
    model = pico("llama")
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    with attach(model, adapter=adapter) as live:
        fit(live, [pico_batch(model)], steps=2, lr=1e-3, optimizer=quick(method), objective=loss)
        ended, graft = bits(model), live.graft()
        inside = Graft.load(graft.save(tmp_path / "inside"))
        assert equal(bits(model), ended)
    del model, live
    gone = Graft.load(graft.save(tmp_path / "gone"))  # the base is read from where the card says it lies
    assert inside.identity == gone.identity == graft.identity
    fresh = pico("llama")
    with gone.on(fresh):
        assert equal(bits(fresh), ended)
    nowhere = replace(graft, card={**graft.card, "base": {}}, home=None)
    with pytest.raises(RequestError, match="without the base"):
        nowhere.save(tmp_path / "nowhere")


@pytest.mark.parametrize("method", METHODS)
def test_logs_stack_scale_and_add_like_other_grafts(method):
    model = pico("llama", dtype=torch.bfloat16)
    before = bits(model)
    log, _ = trained(model, method, lr=1e-2)
    name = next(n for n, p in model.named_parameters() if p.dim() == 2)
    shape = tuple(model.get_parameter(name).shape)
    row = Graft.made(model, {name: Slice(Region.of(shape, "rows", [1]), torch.ones(1, shape[1]))})
    reached = []
    for order in ((log, row), (row, log)):
        for graft in order:
            graft.apply(model)
        reached.append(bits(model))
        for graft in order:
            graft.remove(model)
        assert equal(bits(model), before)
    assert equal(*reached)
    with (log.bind(model) + row.bind(model)).on(model):
        assert equal(bits(model), reached[0])
    with log.scale(0.5).on(model):
        half = model.get_parameter(name).detach().clone()
    whole = log.materialize().deltas[name].values
    torch.testing.assert_close(half, (before[name].float() + 0.5 * (whole - before[name].float())).bfloat16())
    with pytest.raises(RequestError, match="bind"):
        log + row
    assert everything(shape, as_matrix(shape)).numel == log.deltas[name].numel


@pytest.mark.parametrize("method", METHODS)
def test_a_selection_moves_alone_and_its_log_replays_too(method):
    model = pico("llama", dtype=torch.bfloat16)
    before, where = bits(model), some(model)
    graft, ended = trained(model, method, adapter="slice", where=where, lr=1e-2)
    changed = {n for n in before if not same_bits(before[n], ended[n])}
    assert changed == {p.param for n in where.ids for p in where.sites[n].parts}
    assert graft.logged
    with graft.on(model):
        assert equal(bits(model), ended)
    assert equal(bits(model), before)
    assert all(d.region.layout == "cols" for d in graft.materialize().deltas.values())


@pytest.mark.parametrize("method", METHODS)
def test_a_training_that_turned_to_other_units_ships_its_numbers(method):
    """A log on the base says where the last units went, not where they began after the turn."""
    model = pico("llama")
    before, first = bits(model), some(model)
    moved = {n: ids + 1 for n, ids in first.ids.items()}
    other = Selection.of(first.sites, {n: ids[ids < first.sites[n].n] for n, ids in moved.items()})
    with attach(model, first) as live:
        fit(live, [pico_batch(model)], steps=2, lr=1e-3, optimizer=quick(method), objective=loss,
            schedule=("every", {"steps": 1}), reselect=lambda net, step: other)  # fmt: skip
        graft, ended = live.graft(), bits(model)
    assert not graft.logged
    with graft.on(model):
        assert equal(bits(model), ended)
    assert equal(bits(model), before)


@pytest.mark.parametrize("method", METHODS)
def test_what_sleeps_is_neither_shifted_nor_moved(method):
    model = pico("llama")
    before = bits(model)
    parts = [("model.layers.0*", 2), ("model.layers.1*", 2)]
    seen = []

    def watch(net, batch):
        seen.append(1)
        return loss(net, batch)

    with attach(model) as live:
        fit(
            live,
            [pico_batch(model)],
            steps=2,
            lr=1e-3,
            optimizer=quick(method),
            objective=watch,
            schedule=("stages", {"parts": parts}),
        )
        graft = live.graft()
    assert seen
    assert graft.deltas.keys() == {n for n in before if n.startswith("model.layers.0")}
    with attach(model) as live:
        fit(
            live,
            [pico_batch(model)],
            steps=4,
            lr=1e-3,
            optimizer=quick(method),
            objective=loss,
            schedule=("stages", {"parts": parts}),
        )
        graft, ended = live.graft(), bits(model)
    assert len({d.track for d in graft.deltas.values()}) == 2
    with graft.on(model):
        assert equal(bits(model), ended)


@pytest.mark.parametrize("method", METHODS)
def test_trainer_runs_resumes_and_repeats_bit_for_bit(method, tmp_path):
    model = pico("llama")
    batch = pico_batch(model, batch=8)
    rows = rows_in(batch)
    args = {
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    args |= {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2, "output_dir": str(tmp_path)}
    straight = ng.tune(model, rows, optimizer=quick(method), args=args)
    assert straight.logged
    again = ng.tune(
        model, rows, optimizer=quick(method), args=args, resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert again.identity == straight.identity
    other = ng.tune(model, rows, optimizer=quick(method), args=args, seed=1)
    assert other.identity != straight.identity


class Packed(torch.nn.Module):
    """A linear layer with int8 weights, as quantized bases have them."""

    def __init__(self, layer):
        super().__init__()
        weight = layer.weight.detach()
        self.scale = weight.abs().amax() / 127
        self.weight = torch.nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def dequantize(self):
        return self.weight.float() * self.scale

    def forward(self, x):
        return torch.nn.functional.linear(x, self.dequantize())


@pytest.mark.parametrize("method", METHODS)
def test_a_quantized_base_learns_a_metric_that_has_no_gradient(method):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        Packed(torch.nn.Linear(6, 8, bias=False)), torch.nn.ReLU(), Packed(torch.nn.Linear(8, 2, bias=False))
    )
    x = torch.randn(256, 6)
    batch = {"x": x, "y": (x[:, 0] > 0).long()}
    site = Site("w", "row", 8, (Part.rows("0.weight", (8, 6)),))
    before = bits(net)

    def wrong(model, batch):
        return float((model(batch["x"]).argmax(-1) != batch["y"]).float().mean())

    start = wrong(net, batch)
    options = {"mezo": {"eps": 0.1, "n": 4}}.get(method, {"sigma": 0.1, "n": 8})
    with attach(net, Selection.of({"w": site}, {"w": range(7)}), adapter=("slice", {"route": "side"})) as live:
        fit(live, [batch], steps=60, lr=0.05, optimizer=(method, options), objective=wrong)
        end = wrong(net, batch)
    assert end < start - 0.15
    assert equal(bits(net), before)


def test_what_has_no_gradient_is_refused_by_optimizers_that_need_one():
    model = pico("llama")
    with attach(model) as live, pytest.raises(RequestError, match="mezo"):
        fit(live, [pico_batch(model)], steps=1, optimizer="SGD", objective=loss)
    with pytest.raises(RequestError, match="without names"):
        ForwardOnly([{"params": [torch.zeros(2)]}], lr=1.0, directions=1, scales=(1.0,), pull=lambda x: x[:, 0])
    with pytest.raises(RequestError, match="directions"):
        ForwardOnly(
            [{"params": [torch.zeros(2)], "name": "x"}], lr=1.0, directions=0, scales=(1.0,), pull=lambda x: x[:, 0]
        )


def test_a_step_that_nobody_can_take_is_refused_and_moves_nothing():
    held = torch.nn.Parameter(torch.ones(2))
    made = ForwardOnly([{"params": [held], "name": "x"}], lr=1.0, directions=1, scales=(1.0,), pull=lambda x: x[:, 0])
    with pytest.raises(RequestError, match="closure"):
        made.step(lambda: None)
    for bad in ("nan", "inf", "-inf"):
        made.probe(lambda terms, bad=bad: float(bad))
        with pytest.raises(RunError, match="no finite step"):
            made.step()
        made.losses.zero_()
    assert torch.equal(held.detach(), torch.ones(2))
    assert not made.seeds
    made.probe(lambda terms: 1.0)
    made.step()
    assert not torch.equal(held.detach(), torch.ones(2))


@pytest.mark.parametrize("method", METHODS)
def test_the_most_tensor_bytes_alive_are_those_of_inference(method):
    model = pico("llama", hidden_size=128, intermediate_size=344, num_hidden_layers=16)
    batch = {k: v.repeat(16, 1) for k, v in pico_batch(model, batch=8).items()}
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    with torch.no_grad(), Peak() as inference:
        model(**batch)
    with attach(model, adapter=DISK) as live, Peak() as meter:
        fit(live, [batch], steps=1, lr=1e-6, optimizer=quick(method), objective=loss)
    assert (own + meter.peak) / (own + inference.peak) < 1.02
