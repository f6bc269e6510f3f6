"""Training in a bare loop: optimizers, accumulation, checkpointing, schedules, anchors, and what is refused."""

import itertools
import shutil

import pytest
import torch
from torch import nn

import neurograft as ng
from neurograft.core.compact.expose import exposed
from neurograft.core.context import Phase, Step
from neurograft.core.errors import RequestError, RunError
from neurograft.core.prompts.collate import collator
from neurograft.pipeline.attach import attach
from neurograft.pipeline.inputs import as_batches
from neurograft.train.asked import Asked
from neurograft.train.loop import fit, rehearsal
from neurograft.train.moved import Witness
from neurograft.train.optimizers import built, chosen, decaying, groups_of, named
from neurograft.train.steps import reference_of
from neurograft.worlds.pico import pico, pico_batch

# SparseAdam takes no dense gradient; LBFGS calls a closure and has its own test.
NAMES = sorted(set(named()) - {"SparseAdam", "LBFGS"})
MODES = ("fused", "foreach")


def kinds():
    import inspect

    found = []
    for name in NAMES:
        takes = inspect.signature(named()[name]).parameters
        found += [(name, {})] + [(name, {m: True}) for m in MODES if m in takes]
    return found


@pytest.mark.parametrize(("name", "mode"), kinds(), ids=lambda v: v if isinstance(v, str) else "+".join(v) or "loop")
def test_every_optimizer_moves_only_the_selection(name, mode, llama, pick, only, unmoved):
    where, batch, found = pick(llama), pico_batch(llama), unmoved(llama)
    before = {k: v.clone() for k, v in llama.state_dict().items()}
    with attach(llama, where) as live:
        optimizer = built(
            chosen((name, mode)),
            groups_of(
                live.named_parameters(), decay=live.named_parameters(), weight_decay=0.0 if "Rprop" in name else 0.1
            ),
            lr=1e-2,
        )
        for _ in range(2):
            llama(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        only(llama, before, where)
    found.check()


def test_lbfgs_sees_every_move_of_its_closure(llama, pick, only):
    where, batch = pick(llama), pico_batch(llama)
    before = {k: v.clone() for k, v in llama.state_dict().items()}
    seen = []
    with attach(llama, where) as live:
        optimizer = built(chosen("LBFGS"), groups_of(live.named_parameters()), lr=0.1)

        def closure():
            optimizer.zero_grad()
            loss = llama(**batch).loss
            loss.backward()
            seen.append(loss.item())
            return loss

        optimizer.step(closure)
        only(llama, before, where)
    assert len(set(seen)) > 3
    assert seen[-1] < seen[0]


def gradients(model, where, batches, objective="auto", **options):
    """Return the gradient a window of batches gives each live tensor, and its loss."""
    with attach(model, where, **options) as live:
        from neurograft.train.loop import _window

        loss, _ = _window(live, Asked.of(objective), batches, 0, 1, None)
        return loss, {n: p.grad.clone() for n, p in live.named_parameters().items()}


@pytest.mark.parametrize("objective", ["auto", "dft", "eaft"])
def test_uneven_batches_accumulate_to_one_big_batch(objective, pick, examples):
    model = pico("llama", dtype=torch.float64)
    rows, join = examples(model, 6), collator(model)
    parts = [join(rows[:1]), join(rows[1:4]), join(rows[4:])]
    whole, expected = gradients(model, pick(model), [join(rows)], objective)
    loss, found = gradients(model, pick(model), parts, objective)
    assert abs(loss - whole) < 1e-10
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("family", "config"),
    [("bert", {}), ("vit", {}), ("wav2vec2", {}), ("wav2vec2", {"ctc_loss_reduction": "mean"})],
)
def test_losses_of_the_model_itself_accumulate_too(family, config):
    """CTC is a sum over rows, or by ctc_loss_reduction="mean" the mean over rows of each over its own labels."""
    model = pico(family, dtype=torch.float64, **config)
    batch = pico_batch(model, batch=5)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    if config:
        batch["labels"][1:, 2:] = -100
    parts = [{k: v[:1] for k, v in batch.items()}, {k: v[1:] for k, v in batch.items()}]
    whole, expected = gradients(model, None, [batch])
    loss, found = gradients(model, None, parts)
    rtol = 1e-5 if family == "wav2vec2" else 0.0  # whose loss is taken in float32
    assert abs(loss - whole) < 1e-10 + rtol * whole
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=1e-10 + rtol)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant, llama, pick):
    batch = pico_batch(llama)
    _, expected = gradients(llama, pick(llama), [batch])
    llama.train()
    llama.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if not reentrant:
        llama.disable_input_require_grads()
    _, found = gradients(llama, pick(llama), [batch])
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)


def test_the_same_seed_gives_the_same_bytes_and_another_order_other_ones(pick, examples):
    model = pico("llama", attention_dropout=0.2)
    batches = [collator(model)(examples(model)[i : i + 2]) for i in range(0, 16, 2)]

    def run(seed):
        torch.rand(seed + 3)  # whatever ran before
        with attach(model, pick(model)) as live:
            losses = fit(live, batches, steps=3, seed=seed)
            return losses, live.state_dict()

    (a, x), (b, y), (c, _) = run(0), run(0), run(1)
    assert a == b
    assert all(torch.equal(x[n], y[n]) for n in x)
    assert a != c


def test_everything_is_as_found_after_the_loop(llama, pick, unmoved, examples):
    found = unmoved(llama)
    batches = as_batches(examples(llama), llama, batch_size=4)
    with attach(llama, pick(llama)) as live:
        fit(live, batches, steps=3, weight_decay=0.1, warmup=1, decay="linear", accumulate=2)
        graft = live.graft()
    found.check()
    with graft.on(llama):
        pass
    found.check()
    assert rehearsal(llama, batches, steps=2)(pick(llama)).numel == graft.numel
    found.check()


@pytest.mark.parametrize("adapter", ["slice", ("slice", {"route": "side"}), "lora", "dense"])
def test_the_reference_is_the_base(adapter, llama, pick, examples):
    batch = collator(llama)(examples(llama)[:2])
    base = llama(**batch).logits.detach()
    with attach(llama, None if adapter == "dense" else pick(llama), adapter=adapter) as live:
        fit(live, [batch], steps=3, lr=1e-2)
        tuned = llama(**batch).logits.detach()
        assert (tuned - base).abs().max() > 1e-3
        llama.train()
        seen = reference_of(live)(lambda: llama(**batch).logits)
        assert torch.equal(seen, base)
        assert all(m.training for m in llama.modules())
        llama.eval()
        assert torch.equal(llama(**batch).logits, tuned)


def test_the_reference_has_no_dropout_and_leaves_the_modes(pick, examples):
    model = pico("llama", attention_dropout=0.5)
    batch = collator(model)(examples(model)[:2])
    base = model.eval()(**batch).logits.detach()
    with attach(model, pick(model)) as live:
        model.train()
        model.model.layers[1].eval()
        assert torch.equal(reference_of(live)(lambda: model(**batch).logits), base)
        assert (model.training, model.model.layers[0].training, model.model.layers[1].training) == (True, True, False)


def test_groups_by_hand():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    both = {"a": a, "b": b}
    assert groups_of(both, decay=["b"], weight_decay=0.1) == [
        {"params": [b], "weight_decay": 0.1},
        {"params": [a], "weight_decay": 0.0},
    ]
    assert groups_of(both, decay=["b"], weight_decay=0.1, apart=True) == [
        {"params": [a], "weight_decay": 0.0, "name": "a"},
        {"params": [b], "weight_decay": 0.1, "name": "b"},
    ]
    assert groups_of(both, weight_decay=0.1) == [{"params": [a, b], "weight_decay": 0.0}]


def test_a_callable_of_model_and_batch_may_have_options_beside_them():
    step = Step(nn.Identity(), {"x": torch.ones(3)})

    def scaled(model, batch, factor=2.0, *, more=1.0):
        return model(batch["x"]).sum() * factor * more

    assert float(Asked.of(scaled).loss(step)) == 6.0
    assert float(Asked.of(lambda step: step.batch["x"].sum()).loss(step)) == 3.0
    for odd, text in ((None, "NoneType"), (torch.ones(2), r"Tensor \(2,\)")):
        with pytest.raises(RequestError, match=text):
            Asked.of(lambda step, odd=odd: odd).loss(step)


def test_an_anchor_holds_the_model_near_the_base(llama, pick, examples):
    rows, join = examples(llama), collator(llama)
    batches, general = [join(rows[:4])], [join(rows[4:8]), join(rows[8:12])]

    def drift(anchor):
        with attach(llama, pick(llama)) as live:
            fit(live, batches, steps=8, lr=2e-2, anchor=anchor)
            step = Step(llama, general[0], reference=reference_of(live))
            from neurograft.core.choose import choose

            return choose("objectives", "kl")(step).item()

    free, held = drift(None), drift(("kl", {"weight": 20.0, "data": general}))
    assert held < 0.5 * free


def test_the_loss_of_a_window_is_the_mean_over_its_labels(llama, pick):
    """Every position has a label: the first one is predicted by nothing and does not count."""
    parts = [pico_batch(llama, batch=b, length=5, seed=b) for b in (1, 3)]
    for part in parts:
        part["labels"] = part["input_ids"].clone()
    with torch.no_grad():
        expected = (llama(**parts[0]).loss * 1 + llama(**parts[1]).loss * 3) / 4
    with attach(llama, pick(llama)) as live:
        losses = fit(live, parts, steps=1, accumulate=2)
    assert losses == pytest.approx([float(expected)], abs=1e-5)


@pytest.mark.parametrize("adapter", ["dense", "lora"])
def test_layers_drawn_by_depth_train_alone(adapter, llama, examples):
    """Also under an adapter whose layers stand in the place of the model's own, which hides its anatomy."""
    batches, history = [collator(llama)(examples(llama)[:4])], []
    with attach(llama, adapter=adapter) as live:
        history.append(live.state_dict())
        fit(
            live,
            batches,
            steps=6,
            schedule=("sampled", {"count": 1, "every": 2, "seed": 2, "ends": False}),
            evaluate=lambda step: history.append(live.state_dict()),
        )
    moved = [{n for n in a if not torch.equal(a[n], b[n])} for a, b in itertools.pairwise(history)]
    layers = [{n.partition("layers.")[2].partition(".")[0] for n in names} for names in moved]
    assert all(len(names) == 1 for names in layers)
    assert layers[::2] == layers[1::2]
    assert set.union(*layers) == {"0", "1"}


@pytest.mark.parametrize("own", [False, True])
def test_an_anchor_is_asked_of_the_same_training(own, llama, pick, examples):
    """Also on data of its own: what is called, what is trained, the base, the step."""
    rows, join, seen = examples(llama), collator(llama), []

    def called(**inputs):
        return llama(**inputs)

    def near(step):
        with torch.no_grad():
            base = step.of_base(lambda: step.model(**step.batch).logits, who="near")
        moved = [float((t.values.detach() - t.original).abs().max()) for t in step.trained().values()]
        seen.append((step.call is called, step.step, step.max_steps, len(moved), max(moved) > 0, base.shape[0]))
        return step.mean(-step.log_probs)

    with attach(llama, pick(llama)) as live:
        data = {"data": [join(rows[4:6])]} if own else {}
        fit(live, [join(rows[:4])], steps=2, anchor=(near, {"weight": 0.1, **data}), call=called)
    size = 2 if own else 4
    assert seen == [(True, 0, 2, 3, False, size), (True, 1, 2, 3, True, size)]


def test_a_schedule_wakes_one_part_after_the_other(llama, pick, examples):
    batches = [collator(llama)(examples(llama)[:4])]
    history = []
    with attach(llama, pick(llama)) as live:
        fit(
            live,
            batches,
            steps=4,
            weight_decay=0.1,
            schedule=("stages", {"parts": [("*gate*", 2), ("*down*", 1), ("*up*", 1)]}),
            evaluate=lambda step: history.append(live.state_dict()),
        )
    moved = [{n.split(".")[-2] for n in a if not torch.equal(a[n], b[n])} for a, b in itertools.pairwise(history)]
    assert moved == [{"gate_proj"}, {"down_proj"}, {"up_proj"}]


def test_phases_set_rates_and_drop_moments(llama, pick, examples):
    batches = [collator(llama)(examples(llama)[:4])]
    gate, up, down = pick(llama).ids
    states = []

    def phases(step, names):
        return Phase(awake=frozenset(names) - ({gate} if step else set()), lr={up: 0.0}, moments="drop")

    class Seen(torch.optim.AdamW):
        def step(self, closure=None):
            out = super().step(closure)
            known = {g["name"]: self.state.get(g["params"][0], {}) for g in self.param_groups}
            states.append({n: int(state.get("step", 0)) for n, state in known.items()})
            return out

    with attach(llama, pick(llama)) as live:
        start = live.state_dict()
        with pytest.raises(RunError, match=up):  # awake with a rate of 0: said, not passed over
            fit(live, batches, steps=2, schedule=phases, optimizer=Seen)
        now = live.state_dict()
    assert torch.equal(now[up], start[up])
    assert not torch.equal(now[gate], start[gate])
    assert states == [{gate: 1, up: 1, down: 1}, {gate: 0, up: 2, down: 2}]  # the awake ones keep theirs


def test_refused_schedules(llama, pick, examples):
    batches = [collator(llama)(examples(llama)[:4])]
    with attach(llama, pick(llama)) as live:
        for bad in (Phase(awake=frozenset()), Phase(awake=frozenset({"nobody"})), Phase(lr={"nobody": 1.0})):
            with pytest.raises(RequestError, match="schedule"):
                fit(live, batches, steps=1, schedule=lambda step, names, bad=bad: bad)
        with pytest.raises(RequestError, match="stage"):
            fit(live, batches, steps=1, schedule=("stages", {"parts": [("*nobody*", 1)]}))
        for repeat in (False, True):
            with pytest.raises(RequestError, match="no stages"):
                fit(live, batches, steps=1, schedule=("stages", {"parts": [], "repeat": repeat}))


def test_protected_units_do_not_move(llama, pick, only, examples):
    before = {k: v.clone() for k, v in llama.state_dict().items()}
    gate, *others = pick(llama).ids
    guarded = pick(llama, {gate: ("row", [5])})
    with attach(llama, pick(llama), protect=guarded) as live:
        fit(live, [collator(llama)(examples(llama)[:4])], steps=2, weight_decay=0.1)
        left = pick(
            llama, {gate: ("row", [1, 40]), **{n: (pick(llama).sites[n].kind, pick(llama).ids[n]) for n in others}}
        )
        only(llama, before, left)


def finite_over_an_infinite_slope(model, batch):
    out = model(**batch)
    return out.loss + (out.logits * 0).sum().sqrt()


def test_what_did_not_happen_is_said(llama, pick, examples):
    batches = [collator(llama)(examples(llama)[:4])]
    with attach(llama, pick(llama)) as live, pytest.raises(RunError, match="did not move"):
        fit(live, batches, steps=1, lr=0.0)
    with attach(llama, pick(llama)) as live, pytest.raises(RunError, match="loss is nan at step 1"):
        fit(live, batches, steps=1, objective=lambda model, batch: model(**batch).loss * float("nan"))
    with attach(llama, pick(llama)) as live, pytest.raises(RunError, match="not finite after training"):
        fit(live, batches, steps=1, objective=finite_over_an_infinite_slope)
    with attach(llama, pick(llama)) as live, pytest.raises(RunError, match="no gradient reached"):
        fit(live, batches, steps=1, objective=lambda model, batch: model.lm_head.weight.sum().requires_grad_())
    with attach(llama, pick(llama)) as live:
        witness = Witness(live)
        witness.losses.append(1.0)  # a loss, and no step that asked for a gradient
        with pytest.raises(RunError, match="no gradient reached"):
            witness.check()
    with attach(llama, pick(llama)) as live, pytest.raises(RequestError, match="steps"):
        fit(live, [], steps=1)
    with attach(llama, pick(llama)) as live, pytest.raises(RequestError, match="decay 'cosine'"):
        fit(live, batches, steps=1, decay="cosine")
    with attach(llama, pick(llama)) as live, pytest.raises(RequestError, match="LBFGS"):
        fit(live, batches, steps=1, optimizer="LBFGS")


def test_rates_by_hand():
    from neurograft.train.loop import _factor

    assert [_factor(s, 6, 2, "linear") for s in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert [_factor(s, 6, 2, "constant") for s in range(6)] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_losses_are_told_alike_with_and_without_gradients(llama, pick, examples):
    rows, join = examples(llama), collator(llama)
    batches = [join(rows[:1]), join(rows[1:4])]

    def told(optimizer):
        with attach(llama, pick(llama)) as live:
            return fit(live, batches, steps=1, accumulate=2, lr=1e-4, optimizer=optimizer)

    assert told(("mezo", {"eps": 1e-4})) == pytest.approx(told("SGD"), abs=1e-3)


class Slope(nn.Module):
    """A loss of slope 3 in w."""

    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return ((3.0 * self.w + 4.0 * self.v) * x).sum()


@pytest.mark.parametrize(("max_norm", "steps"), [(None, [3.0, 4.0]), (1.0, [0.6, 0.8]), (10.0, [3.0, 4.0])])
def test_gradients_are_of_one_step_and_clipped_to_their_norm(max_norm, steps):
    net = Slope()
    with attach(net, adapter="dense") as live:
        how = {"optimizer": "SGD", "lr": 0.5, "max_norm": max_norm, "objective": lambda model, batch: model(batch["x"])}
        fit(live, [{"x": torch.ones(1)}], steps=3, **how)
        moved = [float(net.w.detach()), float(net.v.detach())]
    assert moved == pytest.approx([-0.5 * 3 * s for s in steps], rel=1e-5)


def test_gradients_from_before_and_from_a_failed_training_are_no_part_of_a_step():
    net, how = Slope(), {"optimizer": "SGD", "lr": 0.5, "max_norm": None, "steps": 1}
    data = [{"x": torch.ones(1)}]
    with attach(net, adapter="dense") as live:
        net(data[0]["x"]).backward()
        with pytest.raises(RunError, match="loss is nan"):
            fit(live, data, objective=lambda model, batch: model(batch["x"]) * float("nan"), **how)
        fit(live, data, objective=lambda model, batch: model(batch["x"]), **how)
        assert [float(net.w.detach()), float(net.v.detach())] == [-1.5, -2.0]


def test_batch_statistics_belong_to_the_base(unmoved):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    found, seen = unmoved(net), []
    found.random = torch.random.get_rng_state()

    def square(model, batch):
        seen.append([m.training for m in model])
        return model(batch["x"]).square().mean()

    graft = rehearsal(net, [{"x": torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(1))}], steps=2)
    assert graft(None, objective=square).numel > 0
    found.check()
    assert seen == [[True, False, True, True]] * 2


def test_all_wake_up_after_a_training_in_which_some_slept():
    net = Slope()
    how = {"optimizer": "SGD", "lr": 0.5, "objective": lambda model, batch: model(batch["x"])}
    with attach(net, adapter="dense") as live:
        fit(live, [{"x": torch.ones(1)}], steps=1, schedule=lambda step, names: Phase(awake=frozenset({"w"})), **how)
        assert all(p.requires_grad for p in live.parameters())
        assert float(net.v.detach()) == 0.0


def test_weight_decay_leaves_norms_and_biases_alone():
    net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.ModuleDict({"normed": nn.Linear(2, 2)})["normed"])
    net.add_module("final_norm", nn.RMSNorm(2))
    with attach(net, adapter="dense") as live:
        assert decaying(net, live) == ["0.weight", "2.weight"]


class Product(torch.autograd.Function):
    """x W' in a kernel of its own, as fused heads compute it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g @ weight, g.t() @ x if ctx.needs_input_grad[1] else None


class Custom(nn.Linear):
    def forward(self, x):
        return Product.apply(x, self.weight)


def test_a_kernel_that_bypasses_the_weight_is_noticed_and_can_be_served(pick):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6, bias=False), Custom(6, 3, bias=False))
    where = pick(net, {"0.weight": ("row", [1]), "1.weight": ("row", [0, 2])})
    batches = [{"x": torch.randn(5, 4)}]

    def square(model, batch):
        return model(batch["x"]).square().mean()

    before = float(square(net, batches[0]).detach())
    with attach(net, where) as live, pytest.raises(RunError, match=r"no gradient reached 1\.weight"):
        fit(live, batches, steps=1, objective=square)
    twin = net[1].weight.detach().clone().requires_grad_(True)
    Product.apply(net[0](batches[0]["x"]), twin).square().mean().backward()
    with attach(net, where) as live, exposed(net.modules()) as names:
        assert names == ["0.weight", "1.weight"]
        assert list(net.state_dict()) == ["0.weight", "1.weight"]
        witness = Witness(live)
        square(net, batches[0]).backward()
        torch.testing.assert_close(live.trained()["1.weight"].grad, twin.grad[[0, 2]], rtol=0, atol=1e-7)
        witness.gradients()
        torch.optim.SGD(live.parameters(), lr=0.1).step()
        assert witness.check() == {"tensors": 2, "numbers": 16}
        assert torch.equal(net[1].weight.detach()[[0, 2]], live.trained()["1.weight"])
    assert type(net[1]) is Custom
    assert type(net[0]) is nn.Linear
    with attach(net, where) as live, exposed(net.modules()):
        live.reselect(lambda: pick(net, {"0.weight": ("row", [1])}))
        assert net[1].weight is net._modules["1"]._parameters["weight"]  # no longer live: as it is
        assert float(net(batches[0]["x"]).detach().square().mean()) == pytest.approx(before)


def test_full_training_may_leave_a_part_unreached_and_names_it(pick):
    """Nobody chose that part; a chosen one must be reached."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
    batches = [{"x": torch.randn(4, 3)}]

    def square(model, batch):
        return model["used"](batch["x"]).square().mean()

    with attach(net) as live:
        fit(live, batches, steps=2, objective=square)
        witness = Witness(live)
        square(net, batches[0]).backward()
        witness.gradients()
        torch.optim.SGD(live.parameters(), lr=0.1).step()
        assert witness.check() == {"tensors": 2, "numbers": 8, "unreached": ["idle.bias", "idle.weight"]}
    both = pick(net, {"used.weight": ("row", [0]), "idle.weight": ("row", [0])})
    with attach(net, both) as live, pytest.raises(RunError, match=r"no gradient reached idle\.weight"):
        fit(live, batches, steps=2, objective=square)


def test_values_that_fall_asleep_are_rewound_if_the_schedule_says_so(llama, pick, examples, tmp_path):
    """gate for two steps, then up: gate is back at the base from then on; also across a resume."""
    gate, up, down = pick(llama).ids
    batches = [collator(llama)(examples(llama)[:4])]

    def phases(step, names, values="rewind"):
        return Phase(awake=frozenset({gate} if step < 2 else {up, down}), values=values)

    history = []
    with attach(llama, pick(llama)) as live:
        start = live.state_dict()
        fit(live, batches, steps=4, schedule=phases, evaluate=lambda step: history.append(live.state_dict()))
        seen, graft = llama(**batches[0]).logits, live.graft()
    assert not torch.equal(history[1][gate], start[gate])
    assert torch.equal(history[2][gate], start[gate])
    assert not torch.equal(history[3][up], start[up])
    with graft.on(llama):
        assert torch.equal(llama(**batches[0]).logits, seen)
    with attach(llama, pick(llama)) as live, pytest.raises(RequestError, match="policy for values"):
        fit(live, batches, steps=1, schedule=lambda step, names: phases(step, names, "forget"))

    def run(**more):
        args = {"max_steps": 4, "output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
        return ng.tune(llama, examples(llama), pick(llama), schedule=phases, args={**args, "use_cpu": True}, **more)

    straight = run()
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert run(resume_from_checkpoint=True).identity == straight.identity
