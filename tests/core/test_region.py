"""Regions against hand-indexed entries."""

import math

import pytest
import torch

from neurograft.core.compact.mount import minus
from neurograft.core.errors import RequestError
from neurograft.core.region import Region, as_matrix, positions, region_of, union
from neurograft.core.units import Part

SHAPES = {"matrix": (6, 8), "bank": (3, 4, 6), "conv": (4, 6, 3, 3), "vector": (9,)}


def regions(shape):
    """Every layout that fits a shape, with a few random ids."""
    rng = torch.Generator().manual_seed(len(shape))
    layouts = ["rows", "cols", "flat"] if len(shape) > 1 else ["flat"]
    made = [Region.of(shape, "all")]
    for layout in layouts:
        empty = Region.of(shape, layout)
        made.append(Region.of(shape, layout, torch.randperm(empty.total, generator=rng)[: max(1, empty.total // 3)]))
    if len(shape) == 2:
        made.append(Region.of(shape, "block", [0, 3, 5], block=(2, 4)))
    return made


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_read_write_and_flat_agree_with_plain_indexing(shape):
    weight = torch.randn(shape)
    for region in regions(shape):
        flat = region.flat()
        assert region.numel == len(flat) == math.prod(region.values_shape)
        assert torch.equal(region.read(weight).reshape(-1), weight.reshape(-1)[flat])
        changed, values = weight.clone(), torch.randn(region.values_shape)
        region.write_(changed, values)
        twin = weight.clone().reshape(-1)
        twin[flat] = values.reshape(-1)
        assert torch.equal(changed.reshape(-1), twin)


def test_write_leaves_the_version_counter_alone():
    weight = torch.zeros(4, 3)
    Region.of((4, 3), "rows", [1]).write_(weight, torch.ones(1, 3))
    assert weight._version == 0
    assert weight.sum() == 3


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_union_and_positions_find_every_value_again(shape):
    weight = torch.randn(shape)
    found = regions(shape)
    for a in found:
        for b in found:
            both = union([a, b])
            values = both.read(weight).reshape(-1)
            for part in (a, b):
                assert torch.equal(values[positions(part, both)], part.read(weight).reshape(-1))
            assert both.numel == len(torch.cat([a.flat(), b.flat()]).unique())
            assert set(both.flat().tolist()) == {*a.flat().tolist(), *b.flat().tolist()}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_minus_leaves_the_entries_of_the_first_alone(shape):
    found = regions(shape)
    if len(shape) == 2:
        found.append(Region.of(shape, "block", [0, 1], block=(3, 2)))
    for a in found:
        for b in found:
            left = minus(a, b)
            assert set(left.flat().tolist()) == set(a.flat().tolist()) - set(b.flat().tolist())


def test_flattened_keeps_track_of_the_order():
    weight = torch.randn(6, 8)
    region = Region.of((6, 8), "cols", [1, 5])
    flat, order = region.flattened()
    assert torch.equal(flat.read(weight), region.read(weight).reshape(-1)[order])


@pytest.mark.parametrize(
    ("part", "ids", "layout"),
    [
        (Part.rows("w", (6, 8)), [0, 4], "rows"),
        (Part.rows("w", (6, 8), width=2), [1], "rows"),
        (Part.columns("w", (6, 8)), [7], "cols"),
        (Part.columns("w", (6, 8), start=2, count=2, width=3), [1], "cols"),
        (Part.blocks("w", (6, 8), (2, 4)), [3], "block"),
        (Part.entries("w", 48), [5, 40], "flat"),
        (Part.whole("w", 48), [0], "all"),
        (Part("w", ((2, 2),), repeat=3, run=2, repeat_stride=8), [1], "flat"),  # half-high columns
        (Part("w", ((2, 8),), run=8, start=4), [1], "flat"),  # windows over two rows
        (Part("w", ((3, 16), (2, 4)), repeat=2, run=2, repeat_stride=8), [3], "flat"),  # every other block
    ],
)
def test_the_narrowest_layout_holds_exactly_the_units_entries(part, ids, layout):
    region = region_of(part, torch.tensor(ids), (6, 8), (1, 6, 8))
    assert region.layout == layout
    assert torch.equal(region.flat().sort().values, part.flat(torch.tensor(ids)).reshape(-1).sort().values)


def test_columns_of_one_expert():
    part = Part.columns("w", (3, 4, 6), bank=2)
    region = region_of(part, torch.tensor([1]), (3, 4, 6), as_matrix((3, 4, 6)))
    assert region.layout == "cols"
    assert region.ids.tolist() == [13]
    assert torch.equal(region.read(torch.arange(72.0).view(3, 4, 6))[0], torch.arange(72.0).view(3, 4, 6)[2, :, 1])


def test_part_read_equals_its_flat_entries():
    weight = torch.randn(3, 4, 6)
    grid = Part("w", ((3, 24), (4, 6)), run=6)  # every row of every expert
    assert torch.equal(grid.read(weight), weight.reshape(12, 6))
    some = torch.tensor([0, 7, 11])
    column = Part.columns("w", (3, 4, 6), bank=1)
    assert torch.equal(column.read(weight, some[:1]), weight[1, :, 0][None])
    assert torch.equal(grid.read(weight, some), weight.reshape(12, 6)[some])


@pytest.mark.parametrize("ids", [[6], [-1], [2, 2]])
def test_bad_ids_are_refused(ids):
    with pytest.raises(RequestError, match="ids"):
        Region.of((6, 8), "rows", ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_writing_keeps_every_bit_of_what_lies_beside_and_of_what_is_written(shape, dtype):
    """NaN has many bit patterns, and an exact undo brings back the one that was there."""
    whole = torch.int32 if dtype == torch.float32 else torch.int16
    nan = torch.full(shape, float("nan"), dtype=dtype)
    for region in regions(shape):
        weight = nan.clone()
        region.write_(weight, region.read(nan))
        assert torch.equal(weight.view(whole), nan.view(whole)), region.layout
