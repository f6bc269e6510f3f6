"""A tap that stands for its whole product: the gradients of the input and of the bias are its own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neurograft.core.compact.deferred import pays
from neurograft.core.compact.live import Live, Tap
from neurograft.core.compact.uses import tag
from neurograft.core.region import Region

R, C = 6, 8
PRODUCTS = {
    "linear": ((R, C), lambda x, w, b: F.linear(x, w)),
    "linear with a bias": ((R, C), lambda x, w, b: F.linear(x, w, b)),
    "addmm": ((C, R), lambda x, w, b: torch.addmm(b, x.reshape(-1, C), w)),
    "matmul": ((C, R), lambda x, w, b: x @ w),
}


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def live_of(shape, layout, ids, seed=1, dtype=torch.float64):
    weight = nn.Parameter(rand(*shape, seed=seed, dtype=dtype), requires_grad=False)
    live = Live("b.bias" if len(shape) == 1 else "w", weight, Region.of(shape, layout, ids))
    tag(live)
    return weight, live


def nodes(tensor):
    ahead, found = [tensor.grad_fn], set()
    while ahead:
        node = ahead.pop()
        if node is not None and node.name() not in found:
            found.add(node.name())
            ahead += [n for n, _ in node.next_functions]
    return found


@pytest.mark.parametrize("layout", ["rows", "cols", "flat"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_no_second_node_and_every_gradient_of_the_twin(name, layout):
    shape, run = PRODUCTS[name]
    weight, live = live_of(shape, layout, [0, 3, 5])
    bias, live_bias = live_of((R,), "flat", [1, 4], seed=2)
    ours, theirs = (rand(2, 5, C).requires_grad_() for _ in range(2))
    twin, twin_bias = (nn.Parameter(t.detach().clone()) for t in (weight, bias))
    found, expected = run(ours, weight, bias), run(theirs, twin, twin_bias)
    assert torch.equal(found, expected)
    assert not nodes(found) & {"AddmmBackward0", "MmBackward0", "LinearBackward0", "UnsafeViewBackward0"}
    for out in (found, expected):
        out.backward(rand(*out.shape, seed=3))
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(live.theta.grad, live.region.read(twin.grad), rtol=0, atol=1e-12)
    if name in ("addmm", "linear with a bias"):
        torch.testing.assert_close(live_bias.theta.grad, live_bias.region.read(twin_bias.grad), rtol=0, atol=1e-12)


def test_a_bias_of_one_number_for_all_outputs_is_left_to_torch():
    weight, _ = live_of((R, C), "rows", [0])
    x, one = rand(3, C).requires_grad_(), rand(1).requires_grad_()
    F.linear(x, weight, one).sum().backward()
    assert one.grad.tolist() == [3.0 * R]
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(3, C))


def test_a_matrix_that_addmm_adds_is_left_to_torch():
    weight, _ = live_of((C, R), "cols", [0])
    x, stream = rand(3, C).requires_grad_(), rand(3, R).requires_grad_()
    torch.addmm(stream, x, weight).sum().backward()
    assert torch.equal(stream.grad, torch.ones(3, R, dtype=torch.float64))
    torch.testing.assert_close(x.grad, weight.detach().sum(1).expand(3, C))


@pytest.mark.parametrize("name", ["linear", "linear with a bias"])
def test_under_autocast_the_gradients_are_those_of_autocast(name):
    shape, run = PRODUCTS[name]
    weight, _ = live_of(shape, "rows", [0, 3], dtype=torch.float32)
    twin, bias = nn.Parameter(weight.detach().clone()), rand(R, dtype=torch.float32)
    grads = []
    for w in (weight, twin):
        x = rand(4, C, dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = run(x, w, bias)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_a_foreign_write_before_the_backward_pass_is_noticed():
    """As torch does for its own products: the gradient of the input would be that of other numbers."""
    weight, _ = live_of((R, C), "rows", [0])
    out = F.linear(rand(3, C).requires_grad_(), weight)
    with torch.no_grad():
        weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("name", PRODUCTS)
def test_values_that_sleep_let_the_input_s_gradient_through(name):
    shape, run = PRODUCTS[name]
    weight, live = live_of(shape, "rows", [0])
    live.theta.requires_grad_(False)
    x, y, bias = rand(3, C).requires_grad_(), rand(3, C).requires_grad_(), rand(R)
    for one, w in ((x, weight), (y, weight.detach().clone())):
        run(one, w, bias).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_a_tap_over_a_live_bias_alone_wants_the_whole_gradient():
    """The lowest layer's input needs none, its bias does: a deferred gradient would have to be made whole for it."""
    gate, _ = live_of((R, C), "rows", [0, 3])
    bias, live = live_of((R,), "flat", [1], seed=2)
    x = F.linear(rand(3, C), gate, bias).tanh()
    assert x.requires_grad
    assert not pays(x, Tap)
    down, _ = live_of((C, R), "cols", [0], seed=4)
    F.linear(x, down).square().sum().backward()
    twin = nn.Parameter(bias.detach().clone())
    F.linear(F.linear(rand(3, C), gate.detach(), twin).tanh(), down.detach()).square().sum().backward()
    torch.testing.assert_close(live.theta.grad, twin.grad[1:2])


def test_the_output_may_be_changed_in_place():
    weight, _ = live_of((R, C), "rows", [0])
    x = rand(3, C).requires_grad_()
    out = F.linear(x, weight)
    out += 1.0
    out.mul_(2.0)
    out.sum().backward()
    torch.testing.assert_close(x.grad, 2 * weight.detach().sum(0).expand(3, C))


def test_nothing_is_kept_but_the_chosen_features_and_the_weight_that_is_there_anyway():
    weight, _ = live_of((R, C), "cols", [1, 2])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        F.linear(rand(5, C).requires_grad_(), weight)
    assert [tuple(t.shape) for t in kept] == [(5, 2), (R, C)]
    assert kept[1].data_ptr() == weight.data_ptr()
