"""Compact gradients against the dense one, for every layout, route and side."""

import pytest
import torch

from neurograft.core.compact import gradients
from neurograft.core.compact.gradients import route, sampled_product
from neurograft.core.region import Region

ROWS, COLUMNS, TOKENS = 24, 40, 17


def cases():
    rng = torch.Generator().manual_seed(0)
    shape = (ROWS, COLUMNS)

    def some(n, k):
        return torch.randperm(n, generator=rng)[:k]

    one_per_row = torch.arange(ROWS) * COLUMNS + torch.randint(0, COLUMNS, (ROWS,), generator=rng)
    return {
        "thin product rows": Region.of(shape, "rows", some(ROWS, 5)),
        "thin product cols": Region.of(shape, "cols", some(COLUMNS, 7)),
        "blocks": Region.of(shape, "block", [0, 7, 11], block=(4, 4)),
        "dense chunks of blocks": Region.of(shape, "block", [0, 7, 11], block=(6, 10)),
        "loop": Region.of(shape, "flat", one_per_row),
        "sampled product": Region.of(shape, "flat", some(ROWS * COLUMNS, 60)),
        "dense chunks": Region.of(shape, "flat", some(ROWS * COLUMNS, 400)),
        "whole": Region.of(shape, "all"),
    }


@pytest.mark.parametrize("side", ["column", "row"])
@pytest.mark.parametrize("chunk", [256, 12])
@pytest.mark.parametrize("name", cases())
def test_the_routes_equal_the_dense_gradient(name, side, chunk, monkeypatch):
    monkeypatch.setattr(gradients, "CHUNK", chunk)
    region = cases()[name]
    a, b = torch.randn(TOKENS, ROWS, dtype=torch.float64), torch.randn(TOKENS, COLUMNS, dtype=torch.float64)
    dense = a.t() @ b
    chosen = route(region, side, torch.device("cpu"))
    assert name.startswith(chosen.name)
    x, g = (a, b) if side == "row" else (b, a)
    kept = x if chosen.keep is None else x.index_select(1, chosen.keep)
    found = chosen.gradient(kept, g).reshape(region.values_shape)
    torch.testing.assert_close(found, region.read(dense), rtol=0, atol=1e-10)


def test_input_side_units_keep_only_their_features(monkeypatch):
    columns = Region.of((ROWS, COLUMNS), "cols", [3, 9])
    assert route(columns, "column", torch.device("cpu")).keep.tolist() == [3, 9]
    assert route(columns, "row", torch.device("cpu")).keep is None
    blocks = Region.of((ROWS, COLUMNS), "block", [0, 4], block=(6, 10))
    monkeypatch.setattr(gradients, "BLOCKS", 1.0)
    assert route(blocks, "column", torch.device("cpu")).keep.tolist() == list(range(10))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_of_the_sampled_product_are_widened(dtype):
    a, b = torch.randn(5, 3).to(dtype), torch.randn(5, 4).to(dtype)
    crow, column = torch.tensor([0, 1, 1, 3]), torch.tensor([2, 0, 3])
    found = sampled_product(a, b, crow, column)
    dense = a.float().t() @ b.float()
    torch.testing.assert_close(found, dense[torch.tensor([0, 2, 2]), column])
