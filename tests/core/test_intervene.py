"""Interventions: hand numbers at the tap, positions and rows, generation, nesting, folding, files, exact removal."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from neurograft.anatomy.sites import sites
from neurograft.core.errors import RequestError, RunError
from neurograft.core.grafts.graft import Graft
from neurograft.core.intervene import Intervention
from neurograft.core.prompts.passing import Pass, Seen
from neurograft.core.taps.board import ATTRIBUTE
from neurograft.core.taps.capture import capture
from neurograft.core.taps.tap import change, watch
from neurograft.core.units import Parameters, Part, Site, Tap
from neurograft.worlds.pico import families, pico, pico_batch

LACKING = {("resnet", "neuron"), ("resnet", "head"), ("convnext", "head")}


def exact(family, **config):
    """A pico model in float64; the grouped product of experts knows no such numbers."""
    model = pico(family, dtype=torch.float64, **config)
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"
    return model


def first(model, kind="neuron", layer=0, at=None):
    return next(s for s in sites(model, kind, at=at).values() if s.layer in (layer, None))


def logits(model, batch):
    out = model(**batch)
    names = ("logits", "logits_per_image", "last_hidden_state", "action_preds", "sample")
    return next(getattr(out, n) for n in names if getattr(out, n, None) is not None)


def hooked(model, batch, *operations):
    mounted = [o.mount(model) for o in operations]
    try:
        return logits(model, batch)
    finally:
        for m in mounted:
            m.remove()


def seen_at(model, site, batch, *operations):
    """What the model goes on with at a site, padding too, [B * T, n] or [B * T, n, w]."""
    found = {}
    mounted = [o.mount(model) for o in operations]
    with change(model, {"s": site}, lambda n, x: found.update(x=x.clone()), key="\x7f"):
        model(**batch)
    for m in mounted:
        m.remove()
    return found["x"].flatten(0, 1)


def everywhere(batch):
    return torch.ones_like(batch["input_ids"])


def orthogonal(n, seed=0, many=None):
    shape = (n, n) if many is None else (many, n, n)
    return torch.linalg.qr(torch.randn(shape, generator=torch.Generator().manual_seed(seed))).Q


def test_each_kind_does_what_it_says():
    model = pico("llama")
    batch, site, ids = pico_batch(model), first(model), torch.tensor([3, 40])
    plain = seen_at(model, site, batch)
    vector, turn = torch.tensor([2.0, -1.0]), orthogonal(2)
    expected = {
        ("zero", None): lambda a: 0 * a,
        ("scale", torch.tensor(3.0)): lambda a: 3 * a,
        ("scale", vector): lambda a: a * vector,
        ("pin", torch.tensor(0.5)): lambda a: 0 * a + 0.5,
        ("add", vector): lambda a: a + vector,
        ("replace", vector): lambda a: vector.expand_as(a),
        ("rotate", turn): lambda a: a @ turn,
    }
    for (kind, value), rule in expected.items():
        now = seen_at(model, site, batch, Intervention(site, ids, kind, value))
        hand = plain.clone()
        hand[:, ids] = rule(plain[:, ids])
        assert torch.allclose(now, hand, atol=1e-7), kind
    assert torch.equal(seen_at(model, site, batch), plain)


def test_heads_take_vectors_and_turn_each_by_itself():
    model = pico("llama")
    batch, site, ids = pico_batch(model), first(model, "head"), torch.tensor([1, 3])
    plain = seen_at(model, site, batch)
    turns = orthogonal(8, many=2)
    now = seen_at(model, site, batch, Intervention(site, ids, "rotate", turns))
    for i, head in enumerate(ids.tolist()):
        assert torch.allclose(now[:, head], plain[:, head] @ turns[i], atol=1e-6)
    assert torch.allclose(now.norm(dim=-1), plain.norm(dim=-1), atol=1e-6)
    add = torch.randn(2, 8)
    moved = seen_at(model, site, batch, Intervention(site, ids, "add", add))
    assert torch.allclose(moved[:, ids], plain[:, ids] + add, atol=1e-6)
    assert torch.equal(moved[:, [0, 2]], plain[:, [0, 2]])


def test_positions_and_rows():
    model = pico("llama")
    batch, site = pico_batch(model, batch=3, length=6), first(model)
    batch["labels"][:, :2] = -100
    plain, last = seen_at(model, site, batch).reshape(3, 6, 48), (batch["attention_mask"].sum(1) - 1).tolist()
    cases = {
        ("last", None): [(0, 5), (1, last[1]), (2, last[2])],
        ("prompt", None): [(r, t) for r in range(3) for t in range(2)],
        ("answer", (0,)): [(0, t) for t in range(2, last[0] + 1)],
        ((1, -1), (2,)): [(2, 1), (2, 5)],
        ("generated", None): [],
        ("all", (1,)): [(1, t) for t in range(6)],
    }
    for (positions, rows), places in cases.items():
        step = Intervention(site, torch.tensor([4]), "pin", torch.tensor(9.0), positions, rows)
        now = seen_at(model, site, batch, step).reshape(3, 6, 48)
        assert (now[:, :, 4] == 9.0).nonzero().tolist() == [list(p) for p in places], positions
        now[:, :, 4] = plain[:, :, 4]
        assert torch.equal(now, plain)


@pytest.mark.parametrize(("part", "length"), [("encoder", 7), ("decoder", 4)])
def test_positions_from_the_end_are_those_of_the_units_own_sequence(part, length):
    model = pico("t5")
    site = next(s for s in sites(model, "neuron").values() if part in s.name)
    batch = {"input_ids": torch.arange(14).reshape(2, 7) + 3, "labels": torch.arange(8).reshape(2, 4) + 3}
    step = Intervention(site, torch.tensor([4]), "pin", torch.tensor(9.0), (-1, 0))
    now = seen_at(model, site, batch, step).reshape(2, length, -1)
    assert (now[:, :, 4] == 9.0).nonzero().tolist() == [[0, 0], [0, length - 1], [1, 0], [1, length - 1]]


def test_generation_with_a_cache_is_generation_with_folded_weights():
    model = pico("llama", initializer_range=0.5)
    site, prompt = first(model, layer=1), {"input_ids": torch.tensor([[5, 9, 33, 60], [7, 3, 41, 12]])}
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "use_cache": True}
    plain = model.generate(**prompt, **how)
    step = Intervention(site, torch.arange(24), "zero")
    mounted = step.mount(model)
    changed = model.generate(**prompt, **how)
    mounted.remove()
    assert mounted.fired == 6
    with Graft.made(model, step.fold(model)).on(model):
        assert torch.equal(model.generate(**prompt, **how), changed)
    assert not torch.equal(plain, changed)
    assert torch.equal(model.generate(**prompt, **how), plain)


def test_positions_count_on_through_a_cache():
    model = pico("llama", initializer_range=0.5)
    site, ids, prompt = first(model, layer=0), torch.arange(48), torch.tensor([[5, 9, 33, 60]])
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    full = model.generate(input_ids=prompt, **how)
    for positions, changed in ((("generated"), [4, 5]), ((4,), [4]), ((-1,), [3])):
        values = []
        mounted = Intervention(site, ids, "pin", torch.tensor(0.25), positions).mount(model)
        with watch(model, {"s": site}, lambda n, x: values.append(x.clone())):  # noqa: B023
            model.generate(input_ids=prompt, **how)
        mounted.remove()
        pinned = (torch.cat(values) == 0.25).all(1).nonzero()[:, 0].tolist()
        assert pinned == changed, positions
    assert torch.equal(model.generate(input_ids=prompt, **how), full)


@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_generation_of_an_encoder_decoder(family):
    model = pico(family)
    inputs = {k: v for k, v in pico_batch(model).items() if k in ("input_ids", "attention_mask", "input_features")}
    decoder = next(s for s in sites(model, "neuron").values() if "decoder" in s.name)
    values = []
    mounted = Intervention(decoder, torch.tensor([1]), "pin", torch.tensor(0.5), "generated").mount(model)
    with watch(model, {"s": decoder}, lambda n, x: values.append(x[:, 1].tolist())):
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=1)
    mounted.remove()
    first_pass, later = values[0], values[1:]
    assert 0.5 not in first_pass
    assert later
    assert all(v == [0.5] * len(v) for v in later)


def test_replace_by_another_prompt_stands_at_its_positions():
    model = pico("llama")
    clean, other = pico_batch(model, seed=0), pico_batch(model, seed=1)
    everything = [*sites(model, "neuron").values(), *sites(model, "head").values()]
    own = capture(model, {s.name: s for s in everything}, clean)
    theirs = capture(model, {s.name: s for s in everything}, other)
    plain = logits(model, clean)
    same = [Intervention(s, torch.arange(s.n), "replace", own[s.name]) for s in everything]
    assert torch.allclose(hooked(model, clean, *same), plain, atol=1e-6)
    # all sub-layers of the other prompt over the clean embeddings: only the embeddings still tell them apart
    swapped = [Intervention(s, torch.arange(s.n), "replace", theirs[s.name]) for s in everything]
    with torch.no_grad():
        hidden = model.model.embed_tokens(clean["input_ids"]) - model.model.embed_tokens(other["input_ids"])
        through = model.lm_head(model.model.norm(_residual(model, other) + hidden))
    assert torch.allclose(hooked(model, clean, *swapped), through, atol=1e-5)
    one = Intervention(everything[0], torch.tensor([2]), "replace", theirs[everything[0].name][:1, :3, 2:3])
    now = seen_at(model, everything[0], clean, one).reshape(2, 8, 48)
    assert torch.equal(now[1, :3, 2], theirs[everything[0].name][0, :3, 2])
    assert torch.equal(now[:, 3:, 2], own[everything[0].name][:, 3:, 2])
    two = Intervention(everything[0], torch.tensor([2]), "replace", theirs[everything[0].name][:2, :, 2:3])
    with pytest.raises(RunError, match="2 rows met a batch of 3"):
        hooked(model, pico_batch(model, batch=3), two)


def _residual(model, batch):
    held = {}
    hook = model.model.norm.register_forward_pre_hook(lambda m, a: held.update(x=a[0]))
    model(**batch)
    hook.remove()
    return held["x"]


def test_nested_interventions_compose_in_one_order_and_leave_in_any():
    model = pico("llama")
    batch, site = pico_batch(model), first(model)
    a = Intervention(site, torch.tensor([1, 2]), "scale", torch.tensor(0.3))
    b = Intervention(site, torch.tensor([2, 5]), "scale", torch.tensor(1.7))
    plain, alone = logits(model, batch), hooked(model, batch, b)
    assert torch.equal(hooked(model, batch, a, b), hooked(model, batch, b, a))
    one, two = a.mount(model), b.mount(model)
    one.remove()
    assert torch.equal(logits(model, batch), alone)
    two.remove()
    assert torch.equal(logits(model, batch), plain)
    assert ATTRIBUTE not in vars(model)
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("kind", ["neuron", "head"])
def test_zero_and_scale_fold_on_every_family(family, kind):
    model = exact(family)
    if (family, kind) in LACKING:
        with pytest.raises(RequestError, match="has none"):
            first(model, kind)
        return
    batch, site = _double(pico_batch(model)), first(model, kind)
    ids = torch.arange(0, site.n, 2)
    for step in (Intervention(site, ids, "zero"), Intervention(site, ids, "scale", torch.tensor(-1.5))):
        live, plain = hooked(model, batch, step), logits(model, batch)
        assert not torch.allclose(live, plain, atol=1e-9)
        with _written(model, step.fold(model)):
            assert torch.allclose(logits(model, batch), live, atol=1e-9)
        assert torch.equal(logits(model, batch), plain)


@pytest.mark.parametrize(("family", "kind", "at"), [
    ("gpt2", "neuron", "act"), ("gpt2", "neuron", "up"), ("gpt2", "head", None), ("bert", "neuron", "act"),
    ("bert", "head", None), ("opt", "neuron", "act"), ("gpt_neox", "head", None), ("bert", "row", None),
])  # fmt: skip
def test_pin_add_and_rotate_fold_where_there_is_a_bias(family, kind, at):
    model = exact(family)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(generator=torch.Generator().manual_seed(1))
    batch, site = _double(pico_batch(model)), first(model, kind, at=at)
    ids, width = torch.tensor([0, 2]), site.tap.width
    shape = (2,) if width == 1 else (2, width)
    value = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    turn = orthogonal(2) if width == 1 else orthogonal(width, many=2)
    for how, v in (("pin", value), ("add", value), ("replace", value), ("pin", torch.tensor(0.7)), ("rotate", turn)):
        step = Intervention(site, ids, how, v)
        live = hooked(model, batch, step)
        with _written(model, step.fold(model)):
            assert torch.allclose(logits(model, batch), live, atol=1e-6), how


def test_folds_of_rotations_without_bias():
    model = exact("llama")
    batch = _double(pico_batch(model))
    for kind, at in (("head", None), ("head", "kv"), ("neuron", "act"), ("neuron", "gate")):
        site = first(model, kind, at=at)
        turn = orthogonal(2) if site.tap.width == 1 else orthogonal(site.tap.width)
        step = Intervention(site, torch.tensor([0, 1]), "rotate", turn)
        live = hooked(model, batch, step)
        with _written(model, step.fold(model)):
            assert torch.allclose(logits(model, batch), live, atol=1e-6), (kind, at)


def test_a_fold_of_fused_experts():
    model = exact("mixtral")
    batch = _double(pico_batch(model))
    site = list(sites(model, "neuron").values())[2]
    assert site.tap.expert == 2
    step = Intervention(site, torch.arange(5), "scale", torch.linspace(-1, 1, 5))
    live = hooked(model, batch, step)
    with _written(model, step.fold(model)):
        assert torch.allclose(logits(model, batch), live, atol=1e-9)


@pytest.mark.parametrize("how", [{"positions": (0, -1)}, {"rows": (1,)}, {"rows": (1,), "positions": (2,)}])
def test_places_inside_experts_of_another_device(how):
    """A router's choice lies where the experts are; positions and rows, which are numbers, do not."""
    model = pico("mixtral")
    site = first(model)
    step = Intervention(site, torch.tensor([0, 2]), "add", torch.ones(()), **how)
    with FakeTensorMode(allow_non_fake_inputs=True):  # a device that this machine may lack
        now = Pass()
        now.begin(model, (), {"input_ids": torch.empty(2, 8, dtype=torch.int64, device="cuda")})
        seen = Seen(now, (5,), torch.empty(5, dtype=torch.int64, device="cuda"), False, model)
        found = step.visit(site.name, torch.empty(5, site.n, device="cuda"), seen)
    assert (found.shape, found.device.type) == ((5, site.n), "cuda")


def test_places_do_not_follow_the_default_device():
    model = pico("llama")
    now = Pass()
    now.begin(model, (), pico_batch(model))
    expected = Seen(now, (2, 8), None, False, model).place()
    step = Intervention(first(model), torch.tensor([0]), "add", torch.ones(()), (0, -1), (1,))
    with torch.device("meta"):
        for lead in ((2, 8), (16,)):
            seen = Seen(now, lead, None, False, model)
            for ours, theirs in zip(seen.place(), expected, strict=True):
                assert torch.equal(ours, theirs.reshape(lead))
            assert step._where(seen).nonzero().shape == (2, len(lead))


def test_folds_are_refused_where_they_are_not_exact():
    model = pico("llama")
    neuron = first(model)
    ids = torch.tensor([1])
    for step, why in (
        (Intervention(neuron, ids, "pin", torch.tensor(1.0)), "no bias"),
        (Intervention(neuron, ids, "add", torch.tensor(1.0)), "no bias"),
        (Intervention(neuron, ids, "zero", positions="last"), "every token"),
        (Intervention(neuron, ids, "zero", rows=(0,)), "every token"),
        (Intervention(first(model, "channel", at="residual"), ids, "zero"), "no weight of its own"),
        (Intervention(first(model, "neuron", at="gate"), ids, "pin", torch.tensor(1.0)), "no bias"),
    ):
        with pytest.raises(RequestError, match=why):
            step.fold(model)
    tied = pico("gpt2")
    rows = (Part.rows("lm_head.weight", (64, 32)),)
    token = Site("head", "token", 64, rows, Tap("lm_head"), writes=(0,))
    with pytest.raises(RequestError, match="tied"):
        Intervention(token, ids, "zero").fold(tied)


def test_a_graft_holds_operations_and_reads_them_back(tmp_path):
    model = pico("llama")
    batch, site = pico_batch(model), first(model)
    steps = (
        Intervention(site, torch.tensor([1, 4]), "scale", torch.tensor([0.5, 2.0])),
        Intervention(first(model, "head", 1), torch.tensor([2]), "add", torch.ones(1, 8), "last", (0,)),
        Intervention(site, torch.tensor([7]), "pin", torch.tensor(1.5), (0, -1)),
    )
    graft = Graft.made(model, {}, operations=steps, card={"by": "hand"})
    again = Graft.load(graft.save(tmp_path / "graft"))
    assert again.identity == graft.identity
    plain = logits(model, batch)
    with graft.on(model):
        live = logits(model, batch)
    with again.on(model):
        assert torch.equal(logits(model, batch), live)
    assert torch.equal(logits(model, batch), plain)
    assert not torch.allclose(live, plain, atol=1e-6)
    with pytest.raises(RequestError, match="strength"):
        again.scale(0.5)
    half = Graft.made(model, {}, operations=steps[:1]).scale(0.5)
    hand = Intervention(site, torch.tensor([1, 4]), "scale", torch.tensor([0.75, 1.5]))
    with half.on(model):
        assert torch.equal(logits(model, batch), hooked_once(model, batch, hand, half))


def hooked_once(model, batch, step, graft):
    graft.remove(model)
    try:
        return hooked(model, batch, step)
    finally:
        graft.apply(model)


def test_what_has_no_common_order_is_refused():
    model = pico("llama")
    site, other = first(model), first(model, layer=1)
    scale = Intervention(site, torch.tensor([1]), "scale", torch.tensor(2.0))
    pin = Intervention(site, torch.tensor([1, 2]), "pin", torch.tensor(2.0))
    assert scale.clashes(pin)
    assert pin.clashes(pin)
    assert not scale.clashes(scale)
    assert not pin.clashes(Intervention(other, torch.tensor([1]), "zero"))
    assert not pin.clashes(Intervention(site, torch.tensor([3]), "zero"))
    low = Intervention(site, torch.tensor([1]), "pin", torch.tensor(1.0), rows=(0,))
    assert not low.clashes(Intervention(site, torch.tensor([1]), "pin", torch.tensor(2.0), rows=(1,)))
    a, b = (Graft.made(model, {}, operations=(o,)) for o in (scale, pin))
    with a.on(model), pytest.raises(RequestError, match="pin of 2 units"):
        b.apply(model)
    assert ATTRIBUTE not in vars(model)


def test_strength_of_zero_scale_and_add():
    model = pico("llama")
    batch, site, ids = pico_batch(model), first(model), torch.tensor([3])
    plain = seen_at(model, site, batch)
    for step, rule in (
        (Intervention(site, ids, "zero"), lambda a: 0.75 * a),
        (Intervention(site, ids, "scale", torch.tensor(3.0)), lambda a: 1.5 * a),
        (Intervention(site, ids, "add", torch.tensor(2.0)), lambda a: a + 0.5),
    ):
        assert step.scaled(1.0) is step
        assert torch.allclose(seen_at(model, site, batch, step.scaled(0.25))[:, 3], rule(plain[:, 3]), atol=1e-7)
    with pytest.raises(RequestError, match="strength"):
        Intervention(site, ids, "pin", torch.tensor(1.0)).scaled(0.5)


def test_bad_requests_name_what_came():
    model = pico("llama")
    site, ids = first(model), torch.tensor([1, 2])
    for match, make in {
        "did you mean 'zero'": lambda: Intervention(site, ids, "zeroe"),
        "no activations": lambda: Intervention(first(model, "weight"), ids, "zero"),
        "distinct numbers": lambda: Intervention(site, torch.tensor([48]), "zero"),
        "shape None": lambda: Intervention(site, ids, "scale"),
        "shape \\(3,\\)": lambda: Intervention(site, ids, "add", torch.ones(3)),
        "no rotation": lambda: Intervention(site, ids, "rotate", torch.ones(2, 2)),
        "not finite": lambda: Intervention(site, ids, "pin", torch.tensor(float("nan"))),
        "one of all": lambda: Intervention(site, ids, "zero", positions="lst"),
        "a module of this model": lambda: Intervention(first(pico("gpt2")), ids, "zero").mount(model),
        "callable": lambda: Intervention(site, ids, "zero", positions=everywhere).meta(),
    }.items():
        with pytest.raises(RequestError, match=match):
            make()


def _double(batch):
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}


class _written:
    """Slices written by hand into the parameters, for a block."""

    def __init__(self, model, slices):
        self.parameters, self.slices = Parameters.of(model).by_name, slices

    def __enter__(self):
        self.kept = {n: self.parameters[n].detach().clone() for n in self.slices}
        for name, new in self.slices.items():
            flat, place = self.parameters[name].data.view(-1), new.region.flat()
            flat[place] = new.values.reshape(-1).to(flat.dtype)

    def __exit__(self, *error):
        for name, kept in self.kept.items():
            self.parameters[name].data.copy_(kept)
