"""Selections: algebra, chance overlap against combinatorics, controls, files."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from neurograft.anatomy.sites import sites
from neurograft.core.errors import RequestError
from neurograft.core.selection import Scores, Selection
from neurograft.core.units import Part, Site
from neurograft.pipeline.attach import attach
from neurograft.worlds.pico import pico


def site(name, n, layer=0):
    return Site(name, "row", n, (Part.rows(f"{name}.weight", (n, 4)),), layer=layer)


SITES = {"a": site("a", 10), "b": site("b", 6, layer=1)}


def test_overlap_with_chance_by_enumeration():
    one = Selection.of({"a": SITES["a"]}, {"a": [0, 1, 2]})
    two = Selection.of({"a": SITES["a"]}, {"a": [1, 2, 5, 6]})
    found = one.overlap(two)
    assert found["shared"] == 2
    assert found["expected"] == pytest.approx(3 * 4 / 10)
    tail = sum(math.comb(3, b) * math.comb(7, 4 - b) for b in (2, 3)) / math.comb(10, 4)
    assert found["p_value"] == pytest.approx(tail)
    assert found["jaccard"] == pytest.approx(2 / 5)


def test_overlap_over_two_sites_convolves():
    one = Selection.of(SITES, {"a": [0, 1], "b": [0]})
    two = Selection.of(SITES, {"a": [1], "b": [0, 3]})
    both_a = 2 / 10
    both_b = 1 - math.comb(5, 2) / math.comb(6, 2)
    assert one.overlap(two)["p_value"] == pytest.approx(both_a * both_b)


def test_random_like_matches_sizes_and_can_stay_outside():
    chosen = Selection.of(SITES, {"a": [0, 1, 2], "b": [5]})
    control = chosen.random_like(seed=1)
    assert control.counts() == chosen.counts()
    assert control.digest == chosen.random_like(seed=1).digest != chosen.random_like(seed=2).digest
    assert len(chosen & chosen.random_like(seed=3, outside=True)) == 0


def test_files_round_trip_and_refuse_each_other(tmp_path):
    scores = Scores(SITES, {"a": torch.randn(10), "b": torch.randn(6)}, {"by": "hand"})
    chosen = scores.top(count=3)
    assert Scores.load(scores.save(tmp_path / "s.safetensors")).digest == scores.digest
    again = Selection.load(chosen.save(tmp_path / "c.safetensors"))
    assert again.digest == chosen.digest
    assert again.sites == SITES
    assert again.card["scores"] == scores.digest
    with pytest.raises(RequestError, match="selection file"):
        Selection.load(tmp_path / "s.safetensors")
    (tmp_path / "junk").write_text("x")
    with pytest.raises(RequestError, match="safetensors"):
        Scores.load(tmp_path / "junk")


def test_bad_scores_and_units_are_refused():
    with pytest.raises(RequestError, match="no units"):
        Scores({}, {}).top(count=1)
    with pytest.raises(RequestError, match="finite"):
        Scores({"a": SITES["a"]}, {"a": torch.tensor([float("nan")] * 10)})
    with pytest.raises(RequestError, match="one number"):
        Scores({"a": SITES["a"]}, {"a": torch.zeros(9)})
    with pytest.raises(RequestError, match="unit 10"):
        Selection.of(SITES, {"a": [10]})
    with pytest.raises(RequestError, match="site"):
        Selection.of(SITES, {"c": [0]})


def test_masks_and_fractions_are_no_unit_numbers():
    """True and False would be taken for the units 1 and 0."""
    for wrong in (torch.tensor([True, False, True, True]), [False, True], [1.7]):
        with pytest.raises(RequestError, match="unit numbers"):
            Selection.of({"a": Site("a", "row", 4)}, {"a": wrong})
    with pytest.raises(RequestError, match="unit -1"):
        Selection.of({"a": Site("a", "row", 4)}, {"a": [-1, 2]})
    with pytest.raises(RequestError, match="one number for each unit"):
        Scores({"a": Site("a", "row", 4)}, {"a": torch.ones(3, 4)})
    assert Selection.of({"a": Site("a", "row", 4)}, {"a": torch.zeros(0)}).ids["a"].tolist() == []


def test_files_are_written_whole_and_checked_when_read(tmp_path, monkeypatch):
    sites, both = {n: Site(n, "row", 4) for n in "ab"}, torch.tensor([1, 2])
    path = Selection(sites, {"a": both, "b": both}).save(tmp_path / "w")  # one tensor under two names
    assert Selection.load(path).counts() == {"a": 2, "b": 2}
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    whole = path.read_bytes()

    def full(*args, **kwargs):
        Path(args[1]).write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("neurograft.core.unit_files.save_file", full)
        with pytest.raises(OSError, match="disk full"):
            Selection.of(sites, {"a": [3]}).save(path)
    assert path.read_bytes() == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plain", "w"]
    far = Selection(sites, {"a": torch.tensor([9])}).save(tmp_path / "far")
    with pytest.raises(RequestError, match="0 to 3"):
        Selection.load(far)
    save_file({}, tmp_path / "odd", metadata={"neurograft": '{"kind": "selection", "sites": [{"name": "a"}]}'})
    with pytest.raises(RequestError, match="spoiled"):
        Selection.load(tmp_path / "odd")


def test_quotas_are_exact_and_ties_go_to_the_lower_number():
    scores = Scores(SITES, {"a": torch.ones(10), "b": torch.ones(6)})
    assert {k: v.tolist() for k, v in scores.top(count=3).ids.items()} == {"a": [0, 1, 2], "b": []}
    assert {k: v.tolist() for k, v in scores.bottom(fraction=0.25, per="site").ids.items()} == {
        "a": [0, 1, 2],
        "b": [0, 1],
    }
    assert scores.top(count=2, per="layer").counts() == {"a": 2, "b": 2}


def test_per_row_takes_so_many_of_every_output_row():
    part = Part("w", ((3, 4), (4, 1)))
    weights = Site("w/weight", "weight", 12, (part,))
    scores = Scores({"w/weight": weights}, {"w/weight": torch.arange(12.0)})
    assert scores.top(count=1, per="row").ids["w/weight"].tolist() == [3, 7, 11]
    transposed = Site("t/weight", "weight", 12, (Part("t", ((3, 1), (4, 3))),))  # stored [in, out]
    chosen = Scores({"t/weight": transposed}, {"t/weight": torch.arange(12.0)}).top(count=1, per="row")
    assert part.flat(chosen.ids["t/weight"]).reshape(-1).tolist() == [3, 7, 11]
    assert transposed.parts[0].flat(chosen.ids["t/weight"]).reshape(-1).tolist() == [9, 10, 11]


def test_what_is_printed_of_scores_selections_and_grafts_is_a_line():
    model = pico("llama")
    scores = Scores(found := sites(model, "neuron"), {n: torch.arange(float(s.n)) for n, s in found.items()})
    where = scores.top(count=2)
    with attach(model, where) as live:
        graft = live.graft()
    said = [repr(scores), repr(where), repr(graft), repr(graft.scale(0.5))]
    assert said == [
        "<Scores: 96 units (neuron) in 2 sites>",
        "<Selection: 2 of 96 units (neuron), in 2 of 2 sites>",
        "<Graft: 192 numbers in 6 tensors>",
        "<Graft: 192 numbers in 6 tensors, strength 0.5>",
    ]
