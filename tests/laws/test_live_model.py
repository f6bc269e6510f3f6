"""Promise 11: while its weights are live, the model is still the model."""

import copy
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
from _compact import bits, dense_gradients, loss_of, regions, same_bits, some_of
from transformers import AutoModelForCausalLM

import neurograft as ng
from neurograft.adapters._in_place import InPlaceMount
from neurograft.adapters.channels import LiveMap
from neurograft.adapters.slice import slice as compact
from neurograft.anatomy.sites import sites
from neurograft.core.choose import choose
from neurograft.core.compact.uses import LiveWeight
from neurograft.core.errors import RequestError, RunError
from neurograft.core.selection import Selection
from neurograft.worlds.pico import pico, pico_batch


class Live:
    """A live pico Llama after a step of the fused optimizer, which raises no version counter."""

    def __init__(self, family="llama", dtype=None, steps=1, match="", route="in-place", **config):
        self.model = pico(family, dtype=dtype, **config)
        self.batch, self.base = pico_batch(self.model), bits(self.model)
        self.where = some_of(self.model, match=match)
        self.mount = compact(self.model, self.where, tied="both", route=route)
        self.optimizer = torch.optim.AdamW(self.mount.parameters(), lr=1e-2, fused=True)
        for _ in range(steps):
            self.step()

    def step(self):
        self.optimizer.zero_grad()
        loss = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def plain(self):
        """A model that never was live, with the values trained so far."""
        twin = pico(self.model.config.model_type, dtype=self.model.dtype)
        for name, region in regions(twin, self.where).items():
            region.write_(twin.get_parameter(name), self.mount.named_parameters()[name])
        return twin


@pytest.fixture
def live():
    made = Live()
    yield made
    made.mount.detach()
    assert same_bits(bits(made.model), made.base)


def test_state_dict_is_the_bases_with_current_values(live):
    state = live.model.state_dict()
    assert list(state) == list(live.base)
    assert all(state[k].shape == v.shape and state[k].dtype == v.dtype for k, v in live.base.items())
    assert same_bits(state, bits(live.plain()))
    assert not same_bits(state, live.base)
    assert all(type(v) is torch.Tensor for v in state.values())
    for theta in live.mount.parameters():
        theta.data.add_(0.1)
    assert same_bits(live.model.state_dict(), bits(live.plain()))
    file = io.BytesIO()
    torch.save(live.model.state_dict(), file)
    file.seek(0)
    assert same_bits(torch.load(file, weights_only=True), bits(live.plain()))


def test_save_pretrained_writes_a_plain_current_checkpoint(live, tmp_path):
    live.model.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert same_bits(bits(again), bits(live.plain()))


def test_a_deep_copy_is_a_plain_model_of_its_own(live):
    twin = copy.deepcopy(live.model)
    assert not any(isinstance(p, LiveWeight) for p in twin.parameters())
    assert same_bits(bits(twin), bits(live.plain()))
    kept = bits(twin)
    with torch.no_grad():
        assert torch.equal(twin(**live.batch).logits, live.model(**live.batch).logits)
    live.step()
    assert same_bits(bits(twin), kept)
    assert [n for n, _ in twin.named_parameters()] == list(live.base)
    live.mount.parameters()[0].data.add_(0.5)  # not seen by anybody
    assert same_bits(bits(copy.deepcopy(live.model)), bits(live.plain()))
    with compact(twin, live.where) as again:  # and it may be trained itself
        assert len(again.parameters()) == len(live.mount.parameters())
    assert same_bits(bits(twin), kept)


def test_a_deep_copy_of_a_chain_runs():
    chain = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    x = torch.ones(1, 4)
    with compact(chain, some_of(chain)):
        assert torch.equal(copy.deepcopy(chain)(x), chain(x))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_parameters_lists_the_compact_tensors_in_float32(family):
    made = Live(family)
    for change in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("cpu"), lambda m: m.float()):
        change(made.model)
        found = {id(p): n for n, p in made.model.named_parameters() if p.requires_grad}
        assert found.keys() == {id(p) for p in made.mount.parameters()}
        assert all(p.dtype == torch.float32 for p in made.mount.parameters())
        # a tensor's name ends as its owner's, for weight-decay rules that read names
        by_id = {id(p): n for n, p in made.mount.named_parameters().items()}
        assert all(name.endswith(by_id[key]) for key, name in found.items())
    before = made.mount.state_dict()
    first, second = made.step(), made.step()
    assert second < first
    for name, region in regions(made.model, made.where).items():
        held = region.read(made.model.get_parameter(name).detach())
        assert torch.equal(held, made.mount.named_parameters()[name].detach()), name
    assert any(not torch.equal(before[n], p) for n, p in made.mount.named_parameters().items())


def test_layer_norms_are_known_as_such():
    made = Live("bert")
    norms = {
        f"{module}.{name}"
        for module, owner in made.model.named_modules()
        if isinstance(owner, torch.nn.LayerNorm)
        for name, p in owner._parameters.items()
        if p is not None and p.requires_grad
    }
    assert {n.partition("neurograft_values_norm.")[2] for n in norms} == {
        n for n in made.mount.named_parameters() if "LayerNorm" in n
    }


def test_a_cast_keeps_training_what_it_trained():
    made, twin = Live(), Live(dtype=torch.bfloat16, steps=0)
    made.model.to(torch.bfloat16)
    for name, theta in twin.mount.named_parameters().items():
        theta.data.copy_(made.mount.named_parameters()[name])
    with torch.no_grad():
        ours, theirs = made.model(**made.batch).logits, twin.model(**twin.batch).logits
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02)  # the base rounds on its own in both
    for name, region in regions(made.model, made.where).items():
        held = region.read(made.model.get_parameter(name).detach())
        assert torch.equal(held, made.mount.named_parameters()[name].detach().to(torch.bfloat16))


def test_loading_a_state_takes_its_values_over(live):
    other = bits(pico("llama", seed=7))
    live.model.load_state_dict(other)
    assert same_bits(live.model.state_dict(), other)
    for name, region in regions(live.model, live.where).items():
        assert torch.equal(live.mount.named_parameters()[name].detach(), region.read(other[name]))
    live.step()
    assert not same_bits(live.model.state_dict(), other)
    live.model.load_state_dict(live.base)


def test_assigning_a_state_is_refused_aloud():
    made = Live()
    made.model.load_state_dict(bits(pico("llama", seed=7)), assign=True)
    with pytest.raises(RunError, match="was replaced after it was attached"):
        made.model(**made.batch)


def test_the_meta_device_and_pickles_are_refused():
    made = Live()
    for refused in (lambda: made.model.to("meta"), lambda: pickle.dumps(made.model)):
        with pytest.raises(RunError, match="detach"):
            refused()


def test_a_second_attachment_and_tied_weights_are_refused(live):
    with pytest.raises(RequestError, match="live already"):
        compact(live.model, live.where)
    with pytest.raises(RequestError, match="tied with"):
        compact(pico("gpt2"), some_of(pico("gpt2")))


def test_a_refused_attachment_does_not_freeze_the_first():
    other = Live(match="layers.0")
    layers = sites(other.model, "neuron")
    last = Selection.of(layers, {list(layers)[-1]: [0]})
    for route in ("in-place", "side"):
        with pytest.raises(RunError, match="another attachment"):
            compact(other.model, last, route=route)
    assert all(p.requires_grad for p in other.mount.parameters())
    before = other.mount.state_dict()
    other.step()
    assert not any(torch.equal(v, before[n]) for n, v in other.mount.state_dict().items())


def test_a_refused_attachment_leaves_the_first_one_training():
    made = Live(match="up_proj")
    for adapter in ("slice", "dense", "lora"):
        with pytest.raises(RunError, match="another attachment"):
            choose("adapters", adapter)(made.model, some_of(made.model, ("all",), match="down_proj"))
    before = made.mount.mark()
    made.step()
    assert not any(torch.equal(p, before[n]) for n, p in made.mount.named_parameters().items())


ATTACHED = {
    "slice": {},
    "side": {"adapter": "slice", "route": "side"},
    "mask": {"adapter": "mask"},
    "slice_lora": {"adapter": "slice_lora"},
    "dense": {"adapter": "dense", "where": None},
    "lora": {"adapter": "lora", "where": None},
    "reversible": {"adapter": "reversible", "where": None},
    "expansion": {"adapter": ("expansion", {"blocks": 1}), "where": None},
    "strata": {"adapter": ("strata", {"plan": [{"train": ["low_rank", "norm"]}]}), "where": None},
    "channels": {"adapter": "channels", "where": None},
}


def attached(model, name, base=None):
    """Attach an adapter by its shortest call."""
    return ng.attach(model, **{"where": some_of(base or model, ("rows",), match="up_proj"), **ATTACHED[name]})


@pytest.mark.parametrize("first", ATTACHED)
def test_a_model_takes_one_attachment_at_a_time(first):
    model = pico("llama")
    before = bits(model)
    live = attached(model, first)
    awake = {n for n, p in model.named_parameters() if p.requires_grad}
    for second in ATTACHED:
        with pytest.raises(RunError, match="another attachment"):
            attached(model, second, base=pico("llama"))
    for inside in (model.model, torch.nn.Sequential(model)):  # a part of it, and what it is a part of
        with pytest.raises(RunError, match="another attachment"):
            ng.attach(inside, adapter="dense")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == awake
    twin = pico("llama") if first == "reversible" else copy.deepcopy(model)  # its blocks refuse to be copied
    live.detach()
    assert same_bits(bits(model), before)
    assert not any("claim" in name for module in model.modules() for name in vars(module))
    with ng.attach(model, adapter="dense"), ng.attach(twin.model, adapter="dense"):
        assert all(p.requires_grad for p in model.parameters())


FAILING = {
    "dense": "dense.DenseMount._kept",
    "lora": "lora._inject",
    "strata": "lora._inject",
    "channels": "channels.LiveMap",
    "expansion": "expansion.LiveBlock",
    "reversible": "reversible.Reversing",
}


@pytest.mark.parametrize("adapter", FAILING)
def test_an_attachment_that_fails_half_way_can_be_tried_again(adapter, monkeypatch):
    model = pico("llama")
    before = bits(model)

    calls = []

    def fails(*args, **kwargs):
        calls.append(1)
        if adapter == "channels" and len(calls) == 1:  # the second of several fails
            return LiveMap(*args, **kwargs)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(f"neurograft.adapters.{FAILING[adapter]}", fails)
        with pytest.raises(MemoryError) as held:  # a notebook holds on to the last error, and with it to the mount
            attached(model, adapter)
    assert same_bits(bits(model), before)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with attached(model, adapter) as live:
        assert live.parameters()
    assert held


@pytest.mark.parametrize("route", ["in-place", "side"])
def test_a_failed_attachment_leaves_no_trace(monkeypatch, route):
    model, failing = pico("llama"), "model.layers.1.mlp.up_proj.weight"
    before = bits(model)
    plain = InPlaceMount._prepare

    def prepare(self, live):
        if live.name == failing:
            raise MemoryError
        plain(self, live)

    monkeypatch.setattr(InPlaceMount, "_prepare", prepare)
    with pytest.raises(MemoryError):
        compact(model, some_of(model, match="proj"), route=route)
    assert all(type(p) is torch.nn.Parameter and p.requires_grad for p in model.parameters())
    assert not any("neurograft" in n for n, _ in model.named_modules())
    assert not model._forward_pre_hooks
    assert same_bits(bits(model), before)


def test_a_model_with_lora_layers_takes_no_second_ones():
    model = pico("llama")
    with ng.attach(model, adapter="lora") as first:
        with pytest.raises(RequestError, match="LoRA layers"):
            choose("adapters", "lora")(model)
        assert all(p.requires_grad for p in first.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_unfreezing_is_refused_aloud(live):
    live.model.requires_grad_(True)
    with pytest.raises(RunError, match="was unfrozen"):
        live.model(**live.batch)


def test_tied_weights_move_both_uses():
    made = Live("gpt2", steps=2)
    made.model.tie_weights()
    assert made.model.lm_head.weight is made.model.transformer.wte.weight
    first, second = made.step(), made.step()
    assert second < first
    assert same_bits(bits(made.model), bits(made.plain()))


def test_inner_modules_called_alone_see_current_values(live):
    tokens = live.batch["input_ids"]
    for theta in live.mount.parameters():
        theta.data.add_(0.05)
    twin = live.plain()
    with torch.no_grad():
        assert torch.equal(live.model.model(tokens)[0], twin.model(tokens)[0])
        for theta in live.mount.parameters():
            theta.data.sub_(0.02)
        hidden = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
        ours, theirs = live.model.model.layers[1].mlp, live.plain().model.layers[1].mlp
        assert torch.equal(ours(hidden), theirs(hidden))


def test_generate_right_after_a_step(live):
    tokens = live.batch["input_ids"][:1, :4]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(live.model.generate(tokens, **options), live.plain().generate(tokens, **options))
    with torch.inference_mode():
        assert torch.equal(live.model.generate(tokens, **options), live.plain().generate(tokens, **options))
    live.step()  # and training goes on after inference mode


@pytest.mark.parametrize("route", ["in-place", "side"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_accumulation_train_the_same(reentrant, route):
    plain, made = Live(steps=0, route=route), Live(steps=0, route=route)
    made.model.train()
    made.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for _ in range(3):
        assert made.step() == plain.step()
    plain.optimizer.zero_grad()
    made.optimizer.zero_grad()
    losses = [made.model(**made.batch).loss for _ in range(2)]  # two forward passes, then both backward
    (losses[0] + losses[1]).backward()
    (2 * plain.model(**plain.batch).loss).backward()
    for ours, theirs in zip(made.mount.parameters(), plain.mount.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("route", ["in-place", "side"])
def test_autocast_gives_the_gradient_of_dense_autocast(route):
    model = pico("llama")
    batch, where = pico_batch(model), some_of(model, ("rows", "cols"), match="proj")

    def loss(m):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(batch)(m)

    twin = dense_gradients(model, loss)
    with compact(model, where, route=route) as live:
        loss(model).backward()
        for name, region in regions(model, where).items():
            found = live.named_parameters()[name].grad
            assert found.dtype == torch.float32
            wanted = region.read(twin[name])
            torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))


def test_replaced_embeddings_are_refused_aloud():
    made = Live()
    made.model.resize_token_embeddings(80)
    with pytest.raises(RunError, match="was replaced after it was attached"):
        made.model(**made.batch)


@pytest.mark.parametrize("route", ["in-place", "side"])
def test_detaching_leaves_no_trace(route):
    model = pico("llama")
    model.model.norm.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    before, hooks = bits(model), len(model._forward_pre_hooks)
    with pytest.raises(ZeroDivisionError), compact(model, some_of(model), route=route):
        raise ZeroDivisionError
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(type(p) is torch.nn.Parameter and not hasattr(p, "neurograft") for p in model.parameters())
    assert same_bits(bits(model), before)
    assert len(model._forward_pre_hooks) == hooks
    assert not any("neurograft" in n for n, _ in model.named_modules())


@pytest.mark.parametrize("route", ["in-place", "side"])
@pytest.mark.parametrize(
    ("family", "match"), [("llama", ""), ("mixtral", "experts"), ("falcon", "query_key_value"), ("gemma3", "norm")]
)
def test_a_compiled_step_is_one_graph_and_trains_the_same(family, match, route):
    eager, made = (Live(family, steps=0, match=match, num_hidden_layers=1, route=route) for _ in range(2))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(made.model, fullgraph=True, backend=counter)
    for _ in range(3):
        made.optimizer.zero_grad()
        loss = compiled(**made.batch).loss
        loss.backward()
        made.optimizer.step()
        assert abs(float(loss.detach()) - eager.step()) < 1e-6
    assert counter.frame_count == 1
    for ours, theirs in zip(made.mount.parameters(), eager.mount.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("route", ["in-place", "side"])
@pytest.mark.parametrize(
    ("layout", "groups"), [("rows", 2), ("cols", 1), ("cols", 2), ("block", 1), ("flat", 1), ("flat", 2), ("all", 1)]
)
def test_a_compiled_convolution_is_one_graph_and_has_the_eager_gradient(layout, groups, route):
    """Columns and single entries were searched for in every pass, where no compiler can follow."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(4, 70, 3, padding=1, groups=groups), torch.nn.Tanh())
        x = torch.randn(2, 4, 5, 5, requires_grad=True)
    with compact(model, some_of(model, (layout,), match="weight", fraction=0.1), route=route) as live:
        (theta,) = live.parameters()
        wanted = torch.autograd.grad(model(x).square().sum(), (theta, x))
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(x).square().sum(), (theta, x))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
