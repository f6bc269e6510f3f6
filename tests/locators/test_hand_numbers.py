"""Locators against numbers worked out on paper and slow literal twins."""

import math

import pytest
import torch
from torch import nn

from neurograft.anatomy.sites import sites
from neurograft.core.compact.meter import Peak
from neurograft.core.context import Context
from neurograft.core.errors import RequestError, RunError
from neurograft.core.prompts.examples import singles
from neurograft.core.units import Part, Site, Tap
from neurograft.locators._common import ballots
from neurograft.locators._weights import weight_gradients
from neurograft.locators.activation import activation
from neurograft.locators.contrast import contrast
from neurograft.locators.fisher import fisher, sampled
from neurograft.locators.grad_x_act import grad_x_act
from neurograft.locators.integrated_gradients import integrated_gradients
from neurograft.locators.magnitude import magnitude
from neurograft.selectors.vote import vote
from neurograft.worlds.pico import pico, pico_batch


class Net(nn.Module):
    """a = x @ W.T passes `mid`; the output is a itself."""

    def __init__(self, weight):
        super().__init__()
        self.first = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.first.weight.data.copy_(weight)
        self.mid = nn.Identity()

    def forward(self, x):
        return self.mid(self.first(x))


def net(*rows):
    model = Net(torch.tensor(rows))
    n, width = model.first.weight.shape
    tapped = Site("u", "neuron", n, (Part.rows("first.weight", (n, width)),), Tap("mid"))
    owned = Site("u", "row", n, (Part.rows("first.weight", (n, width)),))
    return model, {"u": tapped}, {"u": owned}


def scores(found):
    return next(iter(found.values.values())).tolist()


LINEAR = torch.tensor([1.0, -2.0])


def linear(out, batch):
    return (out * LINEAR).sum(-1).mean()


def test_grad_x_act_by_hand():
    model, tapped, owned = net([1.0, 0.0], [0.0, 1.0])
    # two examples: a = (3, 1), (-1, 1); F = mean of a1 - 2 a2, so effects are (3, -2) and (-1, -2)
    batch = {"x": torch.tensor([[3.0, 1.0], [-1.0, 1.0]])}
    taps = Context(model, tapped, [batch], target=linear)
    assert scores(grad_x_act(taps, signed=True)) == [1.0, -2.0]
    assert scores(grad_x_act(taps, over="example")) == [2.0, 2.0]
    assert scores(grad_x_act(taps, over="data")) == [1.0, 2.0]
    assert scores(grad_x_act(taps, multiply=False)) == [1.0, 2.0]
    split = Context(model, tapped, list(singles(batch)), target=linear)
    assert scores(grad_x_act(split, over="example")) == [2.0, 2.0]
    # weights: w * dF/dw is x on the diagonal times c
    rows = Context(model, owned, [batch], target=linear)
    assert scores(grad_x_act(rows, signed=True)) == [1.0, -2.0]
    assert scores(grad_x_act(rows, over="example")) == [2.0, 2.0]
    assert scores(grad_x_act(rows, over="data")) == [1.0, 2.0]
    # gradient alone: row 1 of dF/dW is mean x = (1, 1), row 2 its double with a minus
    assert scores(grad_x_act(rows, signed=True, multiply=False)) == [2.0, -4.0]


def test_grad_x_act_is_its_literal_twin_and_ignores_padding():
    model = pico("llama")
    where, batches = sites(model, "neuron"), [pico_batch(model, batch=3, seed=s) for s in (0, 1)]
    loss = lambda m, b: m(**b).loss  # noqa: E731
    found = grad_x_act(Context(model, where, batches, loss=loss))
    twin = {n: torch.zeros(48, dtype=torch.float64) for n in where}
    for batch in batches:
        held = {}

        def keep(module, args, held=held):
            args[0].retain_grad()
            held[module] = args[0]

        hooks = [layer.mlp.down_proj.register_forward_pre_hook(keep) for layer in model.model.layers]
        loss(model, batch).backward()
        for hook in hooks:
            hook.remove()
        for (name, _), layer in zip(where.items(), model.model.layers):
            a = held[layer.mlp.down_proj]
            for row in range(3):
                effect = sum(a[row, t] * a.grad[row, t] for t in range(8) if batch["attention_mask"][row, t])
                twin[name] += 3 * effect.detach().abs().double() / 6
        model.zero_grad()
    for name, value in twin.items():
        assert torch.allclose(found.values[name].double(), value, rtol=1e-4, atol=1e-9)


def test_weight_gradients_hold_one_at_a_time_and_put_back_what_was_there():
    model = pico("llama")
    kept = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = kept
    names, held = [n for n, p in model.named_parameters() if p.dim() == 2], []

    def tell(name, weight, grad):
        held.append(sum(p.grad is not None for p in model.parameters()))

    with weight_gradients(model, names, tell):
        model(**pico_batch(model)).loss.backward()
    assert held == [0] * len(names)
    assert model.lm_head.weight.grad is kept
    assert sum(p.grad is not None for p in model.parameters()) == 1
    with pytest.raises(RunError, match="no backward"), weight_gradients(model, names, tell):
        pass


def square(out, batch):
    return out.square().sum(-1).mean()


def test_integrated_gradients_by_hand():
    # F = a1^2 + a2^2: the integral gives a^2 where gradient times activation gives 2 a^2
    model, tapped, _ = net([1.0, 0.0], [0.0, 1.0])
    batch = {"x": torch.tensor([[3.0, 1.0], [-1.0, 2.0]])}
    given = Context(model, tapped, [batch], target=square)
    found = integrated_gradients(given, steps=3)
    assert scores(found) == pytest.approx([5.0, 2.5])
    assert scores(grad_x_act(given)) == pytest.approx([10.0, 5.0])
    assert found.card["completeness_error"] < 1e-6
    # from the means (1, 1.5): a^2 - b^2 is 8, 0 and -1.25, 1.75
    assert scores(integrated_gradients(given, steps=3, baseline="mean", signed=True)) == pytest.approx([4.0, 0.25])
    assert scores(integrated_gradients(given, steps=3, baseline="mean")) == pytest.approx([4.0, 1.5])
    # right ends of 2 steps: mean of 2 a m over m = 1/2, 1 is 1.5 a: a half too much
    right = integrated_gradients(given, steps=2, rule="right")
    assert scores(right) == pytest.approx([7.5, 3.75])
    assert right.card["completeness_error"] == pytest.approx(0.5)
    # without the factor: mean gradients, a1 + a2 over the path
    assert scores(integrated_gradients(given, steps=4, multiply=False, signed=True)) == pytest.approx([1.0, 1.5])


def test_completeness_of_an_entropy_and_the_error_of_inclusive_points():
    # 1 / H of a bias-free head: the sum of scores must be 1 / H(p) - 1 / log n
    rng = torch.Generator().manual_seed(0)
    model, tapped, _ = net(*torch.eye(12).tolist())
    head = torch.randn(5, 12, generator=rng) / 2

    def sure(out, batch):
        p = (out @ head.T).softmax(-1)
        return (1 / -(p * p.log()).sum(-1)).mean()

    x = torch.randn(1, 12, generator=rng)
    given = Context(model, tapped, [{"x": x}], target=sure)
    due = float(sure(x, None)) - 1 / math.log(5)
    errors = {}
    for rule in ("midpoint", "trapezoid", "inclusive", "right"):
        found = integrated_gradients(given, steps=20, rule=rule, signed=True)
        assert sum(scores(found)) == pytest.approx(due, rel=0.15)
        errors[rule] = found.card["completeness_error"]
        assert errors[rule] == pytest.approx(abs(sum(scores(found)) - due) / abs(due), rel=1e-3, abs=1e-5)
    assert errors["midpoint"] < errors["trapezoid"] < errors["inclusive"] < errors["right"] < 0.15
    assert errors["trapezoid"] < 0.001 < errors["inclusive"]


@pytest.mark.parametrize("joint", [False, True])
def test_integrated_gradients_add_up_on_a_transformer(joint):
    model = pico("llama", initializer_range=0.2)
    where = sites(model, "neuron")
    given = Context(model, where, [pico_batch(model)], loss=lambda m, b: m(**b).loss)
    found = integrated_gradients(given, steps=40, joint=joint)
    assert found.card["completeness_error"] < 0.02
    assert set(found.card["completeness"]) == ({"all sites"} if joint else set(where))
    last = integrated_gradients(
        Context(model, where, [pico_batch(model)], loss=given.loss, positions="last"), steps=40, signed=True
    )
    assert last.card["completeness_error"] < 0.02


@pytest.mark.parametrize("joint", [False, True])
def test_more_steps_of_integrated_gradients_take_no_more_memory(joint):
    model = pico("llama")

    def peak(steps):
        with Peak() as meter:
            integrated_gradients(
                Context(model, sites(model, "neuron"), [pico_batch(model)], loss=lambda m, b: m(**b).loss),
                steps=steps,
                joint=joint,
            )
        return meter.peak

    peak(2)  # what is made once
    assert peak(40) == peak(4) > 0


def test_shared_modules_are_met_several_times_on_one_path():
    class Twice(Net):
        def forward(self, x):
            return self.mid(self.mid(self.first(x)) * 3)

    model = Twice(torch.eye(2))
    site = {"u": Site("u", "neuron", 2, (), Tap("mid"))}
    given = Context(model, site, [{"x": torch.tensor([[2.0, 1.0]])}], target=lambda out, batch: out.sum())
    # F(m) = m * m * 3 * (2 + 1): both visits carry half of what m = 1 gives
    found = integrated_gradients(given, steps=5)
    assert scores(found) == pytest.approx([6.0, 3.0])
    assert found.card["completeness_error"] < 1e-6


def test_fisher_squares_before_it_averages():
    model, tapped, owned = net([1.0, 2.0])
    # F = a * sign: gradients of the weights are +x and -x
    batch = {"x": torch.tensor([[1.0, 2.0], [1.0, 2.0]]), "sign": torch.tensor([1.0, -1.0])}
    model.forward = lambda x, sign: model.mid(model.first(x))
    target = lambda out, b: (out[:, 0] * b["sign"]).mean()  # noqa: E731
    given = Context(model, owned, [batch], target=target)
    assert scores(fisher(given)) == [5.0]
    assert scores(fisher(given, aggregate="mean")) == [2.5]
    assert scores(fisher(given, aggregate="fro")) == [pytest.approx(17**0.5)]
    assert scores(fisher(Context(model, tapped, [batch], target=target), on="gate")) == [25.0]
    assert scores(fisher(given, limit=1)) == [5.0]


def test_fisher_is_the_per_sample_gradient_of_torch_func():
    model = pico("bert")
    where, batch = sites(model, "module"), pico_batch(model, batch=3)
    found = fisher(Context(model, where, [batch], loss=lambda m, b: m(**b).loss))
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def one(parameters, row):
        row = {k: v[None] for k, v in row.items()}
        return torch.func.functional_call(model, parameters, (), row).loss

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        grads = [torch.func.grad(one)(parameters, {k: v[i] for k, v in batch.items()}) for i in range(3)]
    for name, site in where.items():
        hand = sum(g[p.param].square().sum() for g in grads for p in site.parts) / 3
        assert found.values[name].item() == pytest.approx(hand.item(), rel=1e-3, abs=1e-12)


def test_fisher_of_a_layer_behind_a_closed_gate_is_zero():
    model = pico("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    where = sites(model, "neuron")
    found = fisher(Context(model, where, [pico_batch(model)], loss=lambda m, b: m(**b).loss))
    first = next(iter(found.values.values()))
    assert first.min() > 0
    gates = {n: s.with_parts(0, 1) for n, s in where.items()}
    behind = fisher(Context(model, gates, [pico_batch(model)], loss=lambda m, b: m(**b).loss))
    assert list(behind.values.values())[1].abs().sum() == 0


def test_sampled_labels_give_the_fisher_of_logistic_regression():
    class Logistic(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([[0.0, 0.0], [0.6, -0.4]]))
            self.config = type("Config", (), {})()

        def forward(self, x, labels):
            return type("Out", (), {"logits": x @ self.w.T})()

    model, x = Logistic(), torch.tensor([[1.0, 2.0]] * 4000)
    batch = {"x": x, "labels": torch.zeros(4000, dtype=torch.long)}
    drawn = sampled(Context(model, {}, seed=3), batch, 0)["labels"].double()
    p = torch.sigmoid(torch.tensor(0.6 - 0.8)).item()
    assert drawn.mean().item() == pytest.approx(p, abs=4 * (p * (1 - p) / 4000) ** 0.5)
    site = {"w": Site("w", "row", 2, (Part.rows("w", (2, 2)),))}
    loss = lambda m, b: nn.functional.cross_entropy(m(**b).logits, b["labels"])  # noqa: E731
    few = {k: v[:300] for k, v in batch.items()}
    found = fisher(Context(model, site, [few], loss=loss, seed=1), labels="sampled")
    # per weight p (1 - p) x^2, summed over x = (1, 2): 5 p (1 - p), the same for both classes
    noise = 5 * 4 * ((p * (1 - p)) * (1 - 4 * p * (1 - p)) / 300) ** 0.5
    assert scores(found) == pytest.approx([5 * p * (1 - p)] * 2, abs=noise + 0.02)


def test_sampled_labels_of_a_language_model_stand_where_the_model_predicts_them():
    model = pico("llama")
    with torch.no_grad():  # a model that is sure of token 7
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
        model.lm_head.weight[7] = 0
    batch = pico_batch(model)
    drawn = sampled(Context(model, {}), batch, 0)["labels"]
    assert torch.equal(drawn == -100, batch["labels"] == -100)
    with pytest.raises(RequestError, match="sampled"):
        sampled(Context(model, {}), {k: v for k, v in batch.items() if k != "labels"}, 0)


def test_activation_statistics_by_hand():
    model, tapped, _ = net([1.0, 0.0], [0.0, 2.0])
    given = Context(model, tapped, [{"x": torch.tensor([[1.0, -1.0], [-3.0, -2.0]])}])
    expected = {
        "mean_abs": [2.0, 3.0], "mean": [-1.0, -3.0], "rms": [5**0.5, 10**0.5], "std": [2.0, 1.0],
        "rate": [0.5, 0.0], "max": [1.0, -2.0], "quantile": [-1.0, -3.0],
    }  # fmt: skip
    for statistic, value in expected.items():
        assert scores(activation(given, statistic=statistic, q=0.5)) == pytest.approx(value), statistic
    with pytest.raises(RequestError, match="written"):
        activation(given, written=True)


def test_written_activation_is_the_size_of_the_contribution():
    model = pico("llama")
    where = sites(model, "neuron")
    given = Context(model, where, [pico_batch(model)])
    plain, written = activation(given), activation(given, written=True)
    for (name, value), layer in zip(plain.values.items(), model.model.layers):
        assert torch.allclose(written.values[name], value * layer.mlp.down_proj.weight.norm(dim=0), rtol=1e-5)


def test_contrast_by_hand():
    model, tapped, _ = net([1.0, 0.0], [0.0, 1.0])
    one = [{"x": torch.tensor([[1.0, 0.0], [3.0, 2.0]])}]
    two = [{"x": torch.tensor([[0.0, 1.0], [2.0, 1.0]])}]
    given = Context(model, tapped, one, two)
    # means 2, 1 against 1, 1; variances 1, 1 against 1, 0
    assert scores(contrast(given)) == pytest.approx([1.0, 0.0])
    assert scores(contrast(Context(model, tapped, two, one))) == pytest.approx([-1.0, 0.0])
    assert scores(contrast(Context(model, tapped, two, one), signed=False)) == pytest.approx([1.0, 0.0])
    assert scores(contrast(given, standardize=False)) == [1.0, 0.0]
    # above 0.5: rates 1, 0.5 against 0.5, 1; spread sqrt((0 + 0.25) / 2)
    spread = 0.125**0.5
    rates = contrast(given, statistic="rate", above=0.5)
    assert scores(rates) == pytest.approx([0.5 / spread, -0.5 / spread])


def test_contrast_of_two_models_on_the_same_data():
    model, tapped, _ = net([1.0, 0.0], [0.0, 1.0])
    other, _, _ = net([2.0, 0.0], [0.0, 1.0])
    batches = [{"x": torch.tensor([[1.0, 1.0], [3.0, 2.0]])}]
    found = contrast(Context(model, tapped, batches, against=other), standardize=False)
    assert scores(found) == [2.0, 0.0]
    with pytest.raises(RequestError, match="one set"):
        contrast(Context(model, tapped, batches))


def test_magnitude_by_hand():
    model, _, owned = net([3.0, -4.0], [0.0, 1.0])
    given = Context(model, owned)
    for norm, value in {"l2": [5.0, 1.0], "l1": [7.0, 1.0], "mean": [3.5, 0.5], "max": [4.0, 1.0]}.items():
        assert scores(magnitude(given, norm=norm)) == value
    grid = Site("g", "block", 4, (Part.blocks("first.weight", (2, 2), (1, 1)),))
    assert scores(magnitude(Context(model, {"g": grid}))) == [3.0, 4.0, 0.0, 1.0]


def test_ballots_let_no_single_example_decide():
    model, tapped, _ = net(*torch.eye(3).tolist())
    x = torch.tensor([[2.0, 1.0, 0.0]] * 4 + [[0.0, 0.0, 100.0]])
    given = Context(model, tapped, [{"x": x}], target=lambda out, b: out.sum(-1).mean())
    mean, votes = grad_x_act(given), ballots(grad_x_act, given)
    assert len(votes) == 5
    assert int(next(iter(mean.values.values())).argmax()) == 2
    assert vote(mean, ballots=votes, count=1).ids["u"].tolist() == [0]


def test_bad_requests():
    model, tapped, _ = net([1.0, 0.0], [0.0, 1.0])
    batch = {"x": torch.tensor([[1.0, float("nan")]])}
    with pytest.raises(RequestError, match="nan"):
        grad_x_act(Context(model, tapped, [batch], target=linear))
    with pytest.raises(RequestError, match="no batches"):
        grad_x_act(Context(model, tapped, target=linear))
    with pytest.raises(RequestError, match="depends on no watched"):
        grad_x_act(Context(model, tapped, [{"x": torch.ones(1, 2)}], target=lambda out, b: out.detach().sum()))
    with pytest.raises(RequestError, match="no objective"):
        grad_x_act(Context(model, tapped, [{"x": torch.ones(1, 2)}]))
    with pytest.raises(RequestError, match="own no weights"):
        magnitude(Context(model, {"u": Site("u", "channel", 2, (), Tap("mid"))}))
    with pytest.raises(RequestError, match="did you mean"):
        grad_x_act(Context(model, tapped, [{"x": torch.ones(1, 2)}], target=linear), over="exmple")
