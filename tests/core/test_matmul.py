"""Products by oneDNN against torch's own in float64, and when they are asked for."""

import itertools

import pytest
import torch

from neurograft.core.numerics import matmul as module
from neurograft.core.numerics.matmul import matmul

LYING = {
    "rows": lambda r, c: rand(r, c),
    "columns": lambda r, c: rand(c, r).t(),
    "part of rows": lambda r, c: rand(r, c + 5)[:, 2 : 2 + c],
    "part of columns": lambda r, c: rand(c, r + 3)[:, 1 : 1 + r].t(),
    "every second": lambda r, c: rand(r, 2 * c)[:, ::2],
    "one row over and over": lambda r, c: rand(1, c).expand(r, c),
    "one column over and over": lambda r, c: rand(r, 1).expand(r, c),
}


def rand(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def asked(monkeypatch):
    """Ask oneDNN whatever the size and the processor, and count."""
    calls, own = [], module._product
    monkeypatch.setattr(module, "WORTH", 0)
    monkeypatch.setattr(module, "_wide", lambda: True)
    monkeypatch.setattr(module, "_product", lambda a, b: calls.append((a.shape, b.shape)) or own(a, b))
    return calls


@pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this torch is built without oneDNN; runs wherever it is built with it",
)
class TestWithOneDNN:
    @pytest.mark.parametrize(("left", "right"), list(itertools.product(LYING, LYING)))
    def test_numbers_of_every_layout(self, left, right, asked):
        for rows, inner, columns in itertools.product((2, 3, 33), (1, 2, 65), (2, 33)):
            a, b = LYING[left](rows, inner), LYING[right](inner, columns)
            with torch.no_grad():
                found = matmul(a, b)
            assert found.dtype == torch.float32
            error, most = (found.double() - a.double() @ b.double()).abs(), a.abs().double() @ b.abs().double()
            assert (error <= inner * torch.finfo(torch.float32).eps * most).all()  # what any order of adding keeps to
        assert asked or {"every second", "one row over and over", "one column over and over"} & {left, right}

    def test_a_thin_gradient_goes_the_short_way(self, asked):
        with torch.no_grad():
            matmul(rand(100, 64).t(), rand(100, 5))
            matmul(rand(100, 64).t(), rand(100, 128))
        assert asked == [((5, 100), (100, 64)), ((64, 100), (100, 128))]

    def test_what_is_not_a_number_stays_so(self, asked):
        a, b = torch.full((40, 40), float("nan")), torch.zeros(40, 40)
        a[0] = float("inf")
        with torch.no_grad():
            assert matmul(a, b).isnan().all()
        assert len(asked) == 1

    def test_torch_s_switch_and_what_it_does_not_know(self, asked):
        a, w = rand(8, 8), rand(8, 8).requires_grad_()
        with torch.no_grad():
            with torch.backends.mkldnn.flags(enabled=False):
                assert torch.equal(matmul(a, a), a @ a)
            assert torch.equal(matmul(a.double(), a.double()), a.double() @ a.double())
            assert torch.equal(matmul(a[:1], a), a[:1] @ a)
        matmul(a, w).sum().backward()
        torch.testing.assert_close(w.grad, a.sum(0)[:, None].expand(8, 8))
        assert not asked

    def test_a_torch_that_calls_it_otherwise_is_left_to_itself(self, monkeypatch):
        def changed(a, b):
            raise TypeError("unexpected arguments")

        monkeypatch.setattr(module, "WORTH", 0)
        monkeypatch.setattr(module, "_product", changed)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        module._wide.cache_clear()
        try:
            a = rand(8, 8)
            assert torch.equal(matmul(a, a), a @ a)
        finally:
            module._wide.cache_clear()

    def test_small_products_are_left_to_torch(self, asked, monkeypatch):
        monkeypatch.setattr(module, "WORTH", 8**3 + 1)
        with torch.no_grad():
            matmul(rand(8, 8), rand(8, 8))
            assert not asked
            matmul(rand(8, 8), rand(8, 9))
            assert len(asked) == 1
