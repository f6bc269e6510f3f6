"""Every operation a live weight may meet: its gradient against the dense one, and the numbers it sees."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from neurograft.core.compact import products
from neurograft.core.compact.beside import Beside, Left, Onward
from neurograft.core.compact.live import Live
from neurograft.core.compact.tied import TiedBeside
from neurograft.core.compact.uses import USES, tag, untag
from neurograft.core.errors import RunError
from neurograft.core.region import Region, as_matrix

N, R, C, E = 7, 6, 8, 3


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_expert(x, weight, *, offs):
    """What grouped_mm computes, in float64, which its kernel does not know."""
    if torch.overrides.has_torch_function((weight,)):
        return torch.overrides.handle_torch_function(by_expert, (weight,), x, weight, offs=offs)
    edges = [0, *offs.tolist()]
    return torch.cat([x[a:b] @ w for a, b, w in zip(edges, edges[1:], weight)])


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(USES, by_expert, products.grouped)


def grouped(x, weight):
    return by_expert(x, weight, offs=torch.tensor([3, 3, N], dtype=torch.int32))  # the second expert gets nothing


X, Y, TOKENS = rand(2, N, C), rand(2, N, R), torch.tensor([[0, 2, 2, 5], [1, 0, 3, 2]])
IMAGE, LINE = rand(2, 4, 9, 9), rand(2, 4, 11)
# name: (shape of the weight, bank or not, what is computed from it)
OPERATIONS = {
    "linear": ((R, C), lambda w: F.linear(X, w)),
    "linear by keyword": ((R, C), lambda w: F.linear(input=X, weight=w)),
    "linear of a transpose": ((C, R), lambda w: F.linear(X, w.t())),
    "linear with one input": ((R, 1), lambda w: F.linear(X[..., :1], w)),
    "linear with one output": ((1, C), lambda w: F.linear(X, w)),
    "addmm": ((C, R), lambda w: torch.addmm(rand(R), X.view(-1, C), w)),
    "matmul": ((C, R), lambda w: X @ w),
    "matmul of T": ((R, C), lambda w: X @ w.T),
    "mm": ((C, R), lambda w: torch.mm(X[0], w)),
    "weight first": ((R, C), lambda w: w @ X.transpose(-1, -2)),
    "cast, then linear": ((R, C), lambda w: F.linear(X, w.to(torch.float64).clone())),
    "squeezed": ((R, 1, C), lambda w: F.linear(X, w.squeeze(1))),
    "one expert": ((E, R, C), lambda w: F.linear(X, w[1]) + F.linear(X, w[torch.tensor(2)])),
    "one transposed expert": ((E, C, R), lambda w: X @ w[1]),
    "grouped": ((E, C, R), lambda w: grouped(X[0], w)),
    "grouped, transposed": ((E, R, C), lambda w: grouped(X[0], w.transpose(-2, -1))),
    "embedding": ((R, C), lambda w: F.embedding(TOKENS, w)),
    "embedding with padding": ((R, C), lambda w: F.embedding(TOKENS, w, padding_idx=-R)),
    "rows by number": ((R, C), lambda w: w[torch.tensor([[0, -1], [2, 2]])]),
    "tied": ((R, C), lambda w: F.linear(F.embedding(TOKENS, w), w)),
    "conv1d": ((6, 4, 3), lambda w: F.conv1d(LINE, w, rand(6), 2, 1)),
    "conv2d": ((6, 4, 3, 3), lambda w: F.conv2d(IMAGE, w, None, 2, 1, 1)),
    "grouped conv2d": ((6, 2, 3, 3), lambda w: F.conv2d(IMAGE, w, padding=1, groups=2)),
    "depthwise conv1d": ((4, 1, 3), lambda w: torch.conv1d(LINE, w, groups=4, padding=2, dilation=2)),
    "many filters": ((80, 4, 3), lambda w: F.conv1d(LINE, w)),
    "many filters in groups": ((80, 1, 3), lambda w: F.conv1d(LINE, w, groups=4)),
    "added": ((N, C), lambda w: X + w),
    "added in place": ((N, C), lambda w: (X * 1.0).add_(w)),
    "multiplied": ((N, C), lambda w: w * X),
}  # fmt: skip


def regions(name):
    """Every layout that fits, with entries at both ends and in the middle."""
    shape = OPERATIONS[name][0]
    matrix = as_matrix(shape, bank=not name.startswith(("conv", "depthwise", "grouped conv", "many", "squeezed")))
    found = [Region.of(shape, "all", matrix=matrix)]
    for layout in ("rows", "cols", "flat"):
        total = Region.of(shape, layout, matrix=matrix).total
        found.append(Region.of(shape, layout, {0, min(1, total - 1), total // 2, total - 1}, matrix=matrix))
    if matrix[0] == 1 and len(shape) == 2 and shape[0] % 2 == shape[1] % 2 == 0:
        found.append(Region.of(shape, "block", [0, 5], matrix=matrix, block=(2, 2)))
    return found


def made(name, region=None, kind=Live):
    weight = nn.Parameter(rand(*OPERATIONS[name][0], seed=1), requires_grad=region is None)
    if region is None:
        return weight, None
    live = kind("w", weight, region)
    tag(live)
    return weight, live


INPUTS = ("X", "LINE", "IMAGE")


@pytest.mark.parametrize("kind", [Live, Beside])
@pytest.mark.parametrize("name", OPERATIONS)
def test_numbers_and_gradients_equal_the_dense_twin(name, kind, monkeypatch):
    """The values have moved, so that what stands beside the weight takes part in everything."""
    run = OPERATIONS[name][1]
    for region in regions(name):
        (weight, live), (twin, _) = made(name, region, kind), made(name)
        before, at_rest = weight.detach().clone(), run(weight).detach()
        torch.testing.assert_close(at_rest, run(twin).detach(), rtol=0, atol=1e-12)
        live.theta.data += 0.1 * rand(*live.theta.shape, seed=3)
        region.write_(twin, live.theta)
        reached = {}
        for w in (weight, twin):
            for given in INPUTS:
                monkeypatch.setitem(globals(), given, globals()[given].detach().clone().requires_grad_())
            found = run(w)
            found.backward(rand(*found.shape, seed=2))
            reached[w is twin] = found.detach(), [globals()[given].grad for given in INPUTS]
            with torch.no_grad():
                torch.testing.assert_close(run(w), found.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(reached[False], reached[True], rtol=0, atol=1e-10)
        torch.testing.assert_close(live.theta.grad, region.read(twin.grad), rtol=0, atol=1e-10)
        assert weight.grad is None
        if kind is Beside:
            assert torch.equal(weight.detach(), before)
            live.resting = True
            assert torch.equal(run(weight).detach(), at_rest)


def tied(name, weight, region):
    return TiedBeside(name, weight, region, torch.arange(region.values_shape[0]) % 2)


def onward(name, weight, region):
    """On top of entries left behind in another layout, some of which return; the whole weight, of rows alone."""
    left = Region.of(region.shape, "flat", range(0, weight.numel(), 3), matrix=region.matrix)
    return Onward(name, weight, region, left, rand(left.numel, seed=4))


@pytest.mark.parametrize("kind", [tied, onward])
@pytest.mark.parametrize("name", OPERATIONS)
def test_values_that_stand_for_others_beside_the_weight(name, kind, monkeypatch):
    run = OPERATIONS[name][1]
    for region in regions(name):
        (weight, live), (twin, _) = made(name, region, kind), made(name)
        before = weight.detach().clone()
        live.theta.data += 0.1 * rand(*live.theta.shape, seed=3)
        live.region.write_(twin, live.numbers())
        reached = {}
        for w in (weight, twin):
            for given in INPUTS:
                monkeypatch.setitem(globals(), given, globals()[given].detach().clone().requires_grad_())
            found = run(w)
            found.backward(rand(*found.shape, seed=2))
            reached[w is twin] = found.detach(), [globals()[given].grad for given in INPUTS]
        torch.testing.assert_close(reached[False], reached[True], rtol=0, atol=1e-10)
        wanted = torch.autograd.grad(live.source(), live.theta, live.region.read(twin.grad))[0]
        torch.testing.assert_close(live.theta.grad, wanted, rtol=0, atol=1e-10)
        assert weight.grad is None
        assert torch.equal(weight.detach(), before)
        copied = live.copied()
        assert torch.equal(copied, twin.detach())


@pytest.mark.parametrize("kind", [Live, Beside])
def test_a_dispatch_mode_sees_the_same_step(kind, monkeypatch):
    """It calls kernels once more with the weight itself, also in a backward pass."""
    reached = []
    for watched in (False, True):
        weight, live = made("linear", Region.of((R, C), "rows", [1]), kind)
        live.theta.data += 1.0
        monkeypatch.setitem(globals(), "X", X.detach().clone().requires_grad_())
        with Watching() if watched else contextlib.nullcontext():
            F.linear(F.linear(X, weight) @ weight, weight).square().sum().backward()
        reached.append((X.grad, live.theta.grad))
    torch.testing.assert_close(*reached, rtol=0, atol=0)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_invisible_write_reaches_every_use(name, grad):
    run = OPERATIONS[name][1]
    for region in regions(name):
        weight, live = made(name, region)
        live.theta.data.add_(1.0)  # raises no version counter, and no optimizer step follows
        with torch.set_grad_enabled(grad):
            found = run(weight).detach()
        untag(live)
        assert torch.equal(region.read(weight), live.theta.detach())
        assert torch.equal(found, run(weight).detach())


@pytest.mark.parametrize("layout", ["rows", "cols", "flat"])
def test_convolutions_under_autocast(layout):
    dense = nn.Parameter(rand(6, 4, 3, seed=1).float())
    weight = nn.Parameter(dense.detach().clone(), requires_grad=False)
    live = Live("w", weight, Region.of((6, 4, 3), layout, [1, 4], matrix=(1, 6, 12)))
    tag(live)
    for w in (dense, weight):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            F.conv1d(LINE.float(), w).float().square().sum().backward()
    torch.testing.assert_close(live.theta.grad, live.region.read(dense.grad), rtol=2e-2, atol=1.0)


def test_an_unknown_operation_is_named_and_may_be_accepted():
    weight, live = made("linear", Region.of((R, C), "rows", [1]))
    with pytest.raises(RunError, match=r"w meets the operation .*einsum.*allow_dense=True"):
        torch.einsum("nc,rc->nr", X[0], weight)
    with pytest.raises(RunError, match="matmul"):
        weight @ X[0, 0]
    filters = nn.Parameter(rand(6, 4, 3), requires_grad=False)
    tag(Live("f", filters, Region.of((6, 4, 3), "rows", [1], matrix=(1, 6, 12))))
    with pytest.raises(RunError, match="conv1d"):
        F.conv1d(LINE[0], filters)  # an example alone
    with pytest.raises(RunError, match="setitem"):
        torch.zeros(R, C)[:] = weight
    with pytest.raises(RunError, match="transpose"):
        torch.transpose(input=weight, dim0=0, dim1=1)
    live.allow_dense = True
    torch.einsum("nc,rc->nr", X[0], weight).sum().backward()
    torch.testing.assert_close(live.theta.grad[0], X[0].sum(0), rtol=0, atol=1e-10)


@pytest.mark.parametrize("grad", [True, False])
def test_operations_with_a_state_run_once(grad):
    """Batch norms count what they saw, dropout draws."""
    plain = nn.BatchNorm1d(C).double()
    norm = nn.BatchNorm1d(C).double().requires_grad_(False)
    tag(Live("norm.weight", norm.weight, Region.of((C,), "flat", [1])))
    weight, live = made("linear", Region.of((R, C), "rows", [1]))
    live.allow_dense = True
    with torch.set_grad_enabled(grad), torch.random.fork_rng():
        for net in (plain, norm):
            net(X[0])
        assert torch.equal(plain.running_mean, norm.running_mean)
        torch.manual_seed(0)
        wanted = F.dropout(weight.detach()), torch.rand(1)
        torch.manual_seed(0)
        assert all(torch.equal(a.detach(), b) for a, b in zip((F.dropout(weight), torch.rand(1)), wanted))


def test_numbers_read_into_python_are_current():
    weight, live = made("linear", Region.of((R, C), "flat", [3]))
    live.theta.data.fill_(7.0)
    assert (weight == 7.0).sum() == 1
    live.theta.data.fill_(8.0)
    assert weight.tolist()[0][3] == 8.0


def test_a_backward_pass_across_a_step_is_refused():
    for change in (lambda t: t.add_(1.0), lambda t: torch.optim.SGD([t], lr=0.1).step()):
        weight, live = made("linear", Region.of((R, C), "cols", [1]))
        first = F.linear(X, weight).sum()
        live.theta.grad = torch.ones_like(live.theta)
        with torch.no_grad():
            change(live.theta)
        with pytest.raises(RunError, match="between this forward pass and its backward pass"):
            first.backward()


def test_a_weight_may_begin_inside_a_shared_storage():
    shared = rand(4 * E * R * C, seed=1)
    for name in ("one expert", "one transposed expert", "linear of a transpose", "cast, then linear", "grouped"):
        shape, run = OPERATIONS[name]
        for region in regions(name):
            twin, _ = made(name)
            run(twin).sum().backward()
            weight = nn.Parameter(shared[R * C + 5 :][: twin.numel()].view(shape).copy_(twin.detach()), False)
            live = Live("w", weight, region)
            tag(live)
            run(weight).sum().backward()
            torch.testing.assert_close(live.theta.grad, region.read(twin.grad), rtol=0, atol=1e-10)


PIECES = {
    "half of the rows": ((R, C), lambda w: F.linear(X, w[: R // 2])),
    "some columns": ((R, C), lambda w: F.linear(X[..., 1:], w[:, 1:])),
    "half of an expert": ((E, R, C), lambda w: F.linear(X, w[1, R // 2 :])),
    "a window over two rows": ((E, R, C), lambda w: F.linear(X, w.view(-1)[1:][: R * C].view(R, C))),
}


@pytest.mark.parametrize("name", PIECES)
def test_pieces_of_a_matrix_have_a_dense_gradient_or_none(name, monkeypatch):
    monkeypatch.setitem(OPERATIONS, name, PIECES[name])
    for region in regions(name):
        weight, live = made(name, region)
        with pytest.raises(RunError, match="allow_dense=True"):
            OPERATIONS[name][1](weight)
        live.allow_dense = True
        OPERATIONS[name][1](weight).square().sum().backward()
        twin, _ = made(name)
        OPERATIONS[name][1](twin).square().sum().backward()
        torch.testing.assert_close(live.theta.grad, region.read(twin.grad), rtol=0, atol=1e-10)


def test_half_of_every_expert_is_no_bank():
    weight, live = made("grouped", Region.of((E, C, R), "rows", [0, 1]))
    half = X[0][:, C // 2 :]
    with pytest.raises(RunError, match="by_expert"):
        grouped(half, weight[:, C // 2 :])
    live.allow_dense = True
    grouped(half, weight[:, C // 2 :]).sum().backward()
    assert live.theta.grad.eq(0).all()


@pytest.mark.parametrize("name", OPERATIONS)
def test_second_derivatives_are_refused(name):
    """They were wrong in silence: the taps know first derivatives only."""
    weight, live = made(name, regions(name)[0])
    with pytest.raises(RunError, match="second derivatives"):
        torch.autograd.grad(OPERATIONS[name][1](weight).square().sum(), live.theta, create_graph=True)


@pytest.mark.parametrize("name", ["linear", "matmul", "grouped", "embedding", "rows by number", "conv1d"])
def test_values_that_sleep_cost_nothing(name, monkeypatch):
    for waking in ("X", "LINE"):
        monkeypatch.setitem(globals(), waking, globals()[waking].clone().requires_grad_())
    for awake in (True, False):
        weight, live = made(name, regions(name)[-1])
        live.theta.requires_grad_(awake)
        node = OPERATIONS[name][1](weight).grad_fn
        assert (node is not None and "Tap" in node.name()) is awake


@pytest.mark.parametrize("layout", ["rows", "cols", "flat"])
def test_many_lookups_of_one_row_add_up_in_float32(layout):
    weight = nn.Parameter(torch.zeros(R, C, dtype=torch.bfloat16), requires_grad=False)
    live = Live("w", weight, Region.of((R, C), layout, [1]))
    tag(live)
    F.embedding(torch.ones(3001, dtype=torch.long).mul(layout != "flat"), weight).float().sum().backward()
    assert live.theta.grad.max() == 3001


def test_an_unfrozen_weight_is_refused():
    weight, _ = made("linear", Region.of((R, C), "cols", [1]))
    weight.requires_grad_(True)
    with pytest.raises(RunError, match="unfrozen"):
        F.linear(X, weight)


def test_questions_and_snapshots_stay_plain():
    weight, live = made("linear", Region.of((R, C), "cols", [1]))
    assert (weight.shape, weight.dtype, weight.dim(), weight.numel()) == ((R, C), torch.float64, 2, R * C)
    for snapshot in (weight.detach(), weight.data, torch.zeros_like(weight), weight == 0):
        assert type(snapshot) is torch.Tensor
    live.theta.data.zero_()
    assert weight.detach()[:, 1].eq(0).all()
    assert "Parameter" in repr(weight)
    with torch.no_grad():
        weight.mul_(2.0)  # somebody else writes: the values follow
        weight[0, 1] = 5.0
        F.linear(X, weight)
    assert live.theta[0, 0] == 5.0


def test_what_was_left_behind_is_added_without_a_gradient():
    for name in ("linear", "embedding", "conv1d", "grouped", "multiplied"):
        for region in regions(name):
            weight, live = made(name, region, lambda n, w, r: Left(n, w, r, torch.ones(r.values_shape)))
            twin, _ = made(name)
            region.write_(twin, torch.ones(region.values_shape))
            found = OPERATIONS[name][1](weight)
            torch.testing.assert_close(found, OPERATIONS[name][1](twin.detach()), rtol=0, atol=1e-12)
            assert not found.requires_grad
            assert not isinstance(live.theta, nn.Parameter)


def test_what_is_saved_is_the_selected_columns_only():
    kept = []
    weight, _ = made("linear", Region.of((R, C), "cols", [1, 4]))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)), lambda t: t):
        F.linear(X, weight)
    assert kept == [(2, N, 2)]


def test_tied_vectors_beside_a_weight_stand_on_what_somebody_wrote_into_it():
    weight = nn.Parameter(rand(R, C, seed=1), requires_grad=False)
    live = TiedBeside("w", weight, Region.of((R, C), "rows", [0, 2]), torch.tensor([0, 0]))
    tag(live)
    live.theta.data.fill_(0.5)
    with torch.no_grad():
        weight.mul_(2.0)
    twin = 2 * rand(R, C, seed=1)
    twin[[0, 2]] += 0.5
    torch.testing.assert_close(F.linear(X, weight).detach(), F.linear(X, twin), rtol=0, atol=1e-12)
