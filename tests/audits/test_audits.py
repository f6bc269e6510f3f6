"""Each audit's own numbers, from paper or from a literal twin."""

import math

import pytest
import torch
from _tables import Table, rows_graft
from test_paired import columns_graft

from neurograft.audits.calibration import calibration
from neurograft.audits.damage import damage
from neurograft.audits.divergence import divergence
from neurograft.audits.gain import gain
from neurograft.audits.loss import loss
from neurograft.audits.representation_drift import linear_cka, representation_drift
from neurograft.audits.weight_drift import spectrum, weight_drift
from neurograft.core.errors import RequestError
from neurograft.core.grafts.delta import LowRank, New, Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.region import Region
from neurograft.worlds.pico import pico, pico_batch

THREE = math.log(3)


def four_items(labels=(0, 0, 0, 1)):
    return [{"rows": torch.zeros(4, dtype=torch.long), "labels": torch.tensor(labels)}]


def test_gain_and_loss_on_paper():
    model = Table([[0.0, 0.0]])
    graft = rows_graft(model, [0], [[THREE, 0.0]])
    found = gain(model, graft, four_items(), nulls=0)
    wanted = (3 * math.log(1.5) - math.log(2)) / 4
    assert found["by"] == "accuracy"
    assert found["measures"]["likelihood"]["change"]["value"] == pytest.approx(wanted, rel=1e-6)
    assert found["measures"]["accuracy"]["changed"] == 0.75
    lost = loss(model, graft, four_items(), nulls=0)
    assert lost["measures"]["loss"]["change"]["value"] == pytest.approx(-wanted, rel=1e-6)
    assert lost["measures"]["loss"]["base"] == pytest.approx(math.log(2))
    assert lost["worst"][0]["item"] == 3
    assert sum(lost["histogram"]["counts"]) == lost["items"] == 4


def test_calibration_by_hand():
    # base: confidence 1/2, three of four right; changed: confidence 3/4, three of four right
    model = Table([[0.0, 0.0]])
    found = calibration(model, rows_graft(model, [0], [[THREE, 0.0]]), four_items(), nulls=0)
    ece, brier = found["measures"]["ece"], found["measures"]["brier"]
    assert (ece["base"], ece["changed"]) == (pytest.approx(0.25), pytest.approx(0.0, abs=1e-7))
    assert ece["change"]["value"] == pytest.approx(-0.25)
    assert (brier["base"], brier["changed"]) == (pytest.approx(0.5), pytest.approx((3 * 0.125 + 1.125) / 4))
    assert found["reliability"]["new"]["places"][11] == 4  # 3/4 lies in the twelfth of fifteen bins
    assert found["measures"]["confidence"]["change"]["value"] == pytest.approx(0.25)


def test_ece_of_two_bins_by_hand():
    # rows of confidence 3/4 (one of two right) and 9/10 (both right): (|1/2 - 3/4| + |1 - 9/10|) / 2
    model = Table([[THREE, 0.0], [math.log(9), 0.0]])
    batch = {"rows": torch.tensor([0, 0, 1, 1]), "labels": torch.tensor([0, 1, 0, 0])}
    found = calibration(model, Graft(), [batch], nulls=0)
    assert found["measures"]["ece"]["base"] == pytest.approx((0.25 + 0.1) / 2)
    one = calibration(model, Graft(), [batch], bins=1, nulls=0)
    assert one["measures"]["ece"]["base"] == pytest.approx(abs(0.75 - 0.825))
    with pytest.raises(RequestError, match="at least 1"):
        calibration(model, Graft(), [batch], bins=0)


def test_divergence_on_paper():
    model = Table([[0.0, 0.0]])
    found = divergence(model, rows_graft(model, [0], [[0.0, THREE]]), four_items(), nulls=0)["measures"]
    assert found["kl"]["change"]["value"] == pytest.approx(0.5 * math.log(4 / 3), rel=1e-5)
    assert found["kl_reverse"]["change"]["value"] == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2), rel=1e-5)
    assert found["flips"]["change"]["value"] == 1.0


def test_forgetting_is_the_cross_entropy_to_the_base():
    model = pico("llama")
    batch, graft = pico_batch(model), columns_graft(pico("llama"))
    found = divergence(model, graft, [batch], nulls=0)
    with torch.no_grad():
        p = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double().softmax(-1)
        with graft.on(model):
            q = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double().log_softmax(-1)
    crossed = -(p * q).sum(-1)[:, :-1][batch["labels"][:, 1:] != -100]
    assert found["forgetting_ce"] == pytest.approx(float(crossed.mean()), rel=1e-6)


def test_metrics_decide_when_given():
    model = Table([[0.0, 0.0]])
    graft = rows_graft(model, [0], [[1.0, 0.0]])
    found = gain(model, graft, four_items(), metrics={"margin": lambda m, b: m(b["rows"])[:, 0]}, nulls=3)
    assert found["by"] == "margin"
    assert set(found["measures"]) == {"margin"}
    assert found["measures"]["margin"]["change"]["value"] == pytest.approx(1.0)
    assert len(found["measures"]["margin"]["noise_floor"]["nulls"]) == 3
    lost = loss(model, graft, four_items(), metric=lambda m, b: m(b["rows"])[:, 0], nulls=3)
    assert lost["measures"]["loss"]["change"]["value"] == pytest.approx(-1.0)
    assert (lost["items"], sum(lost["histogram"]["counts"])) == (4, 4)
    rows = [{"rows": torch.zeros(4, dtype=torch.long)}]
    assert gain(model, graft, rows, metrics=lambda m, b: m(b["rows"])[:, 0])["by"] == "metric"
    with pytest.raises(RequestError, match="margin"):
        gain(model, graft, four_items(), by="nothing", metrics={"margin": lambda m, b: m(b["rows"])[:, 0]})
    with pytest.raises(RequestError, match="finite"):
        gain(model, graft, four_items(), metrics=lambda m, b: [float("nan")])


def test_exact_match_needs_every_place():
    model = pico("llama")
    batch = pico_batch(model)
    found = gain(model, Graft(), [batch], nulls=0)["measures"]["exact"]
    with torch.no_grad():
        top = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)[:, :-1]
    batch["labels"][0, 1:] = top[0]
    assert found["base"] == 0.0
    assert gain(model, Graft(), [batch], nulls=0)["measures"]["exact"]["base"] == 0.5


def test_weight_drift_by_hand():
    model = Table([[3.0, 4.0], [0.0, 0.0]])
    found = weight_drift(model, rows_graft(model, [0], [[3.0, 4.5]]))
    (p,) = found["parameters"]
    assert (p["norm"], p["relative"], p["relative_touched"]) == pytest.approx((0.5, 0.1, 0.1))
    assert (p["entries"], p["moved"], found["total"]) == (2, 1, 4)
    assert p["units"]["counts"] == [1, 0]
    assert p["units"]["norms"] == pytest.approx([0.5, 0.0])
    assert found["measures"]["relative_norm"]["change"]["value"] == pytest.approx(0.1)


def test_the_spectrum_of_a_low_rank_change():
    model = pico("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 32, generator=rng), torch.randn(48, 2, generator=rng)
    found = weight_drift(model, Graft.made(model, {name: LowRank((48, 32), a, b, 0.5)}))
    top = found["parameters"][0]["spectrum"]["top"]
    wanted = torch.linalg.svdvals(0.5 * b @ a)
    assert top[:2] == pytest.approx(wanted[:2].tolist(), rel=1e-4)
    assert max(top[2:]) < 1e-3
    assert found["parameters"][0]["layer"] == "model.layers.1"


@pytest.mark.parametrize("layout", ["rows", "cols", "flat"])
def test_the_spectrum_is_that_of_the_whole_difference(layout):
    model, ids = pico("llama"), {"rows": [3, 7], "cols": [1, 9, 20], "flat": [0, 33, 700, 1500]}[layout]
    name = "model.layers.0.mlp.up_proj.weight"
    weight = model.get_parameter(name).detach()
    region = Region.of(weight.shape, layout, ids)
    moved = torch.randn(region.values_shape, generator=torch.Generator().manual_seed(1))
    graft = Graft.made(model, {name: Slice(region, region.read(weight) + moved)})
    dense = torch.zeros_like(weight)
    region.write_(dense, moved)
    (p,) = weight_drift(model, graft)["parameters"]
    wanted = torch.linalg.svdvals(dense)
    assert p["spectrum"]["top"][: len(ids)] == pytest.approx(wanted[: min(8, len(ids))].tolist(), rel=1e-3, abs=1e-5)
    sides = dense.norm(dim=0 if layout == "cols" else 1)
    assert math.hypot(*p["units"]["norms"]) == pytest.approx(float(dense.norm()), rel=1e-4)
    assert p["units"]["touched"] == int((sides > 0).sum())


def test_ranks_of_known_matrices():
    assert spectrum(torch.eye(5))["effective_rank"] == pytest.approx(5)
    assert spectrum(torch.outer(torch.arange(1.0, 4), torch.ones(6)))["stable_rank"] == pytest.approx(1)
    wide = torch.randn(1100, 3) @ torch.randn(3, 1200)
    found = spectrum(wide)
    assert found["effective_rank"] is None
    assert found["top"][:3] == pytest.approx(torch.linalg.svdvals(wide)[:3].tolist(), rel=1e-3)


def test_new_parameters_are_named_and_not_measured():
    model = pico("bert")
    head = model.classifier.weight
    found = weight_drift(model, Graft.made(model, {"classifier.weight": New(torch.ones_like(head))}))
    assert found["new"] == ["classifier.weight"]
    assert found["parameters"] == []


def test_cka_identities():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=rng, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=rng, dtype=torch.float64)).Q
    y = torch.randn(60, 4, generator=rng, dtype=torch.float64)
    assert linear_cka(x, x) == 1.0
    assert linear_cka(x, 7 * x @ turn + 3) == pytest.approx(1)
    assert linear_cka(x, y) < 0.2
    a, b = x - x.mean(0), y - y.mean(0)
    twin = (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert linear_cka(x, y) == pytest.approx(float(twin))
    assert linear_cka(x[:4], x[:4] @ turn) == pytest.approx(1)  # fewer tokens than features: through the Gram matrix


def test_drift_starts_where_the_change_is():
    model = pico("llama", num_hidden_layers=3)
    name = "model.layers.1.mlp.down_proj.weight"
    graft = Graft.made(model, {name: Slice(Region.of((32, 48), "cols", range(48)), torch.randn(48, 32))})
    found = representation_drift(model, graft, [pico_batch(model)], nulls=2)
    before, at, after = (layer["cosine_drift"]["value"] for layer in found["layers"])
    assert before == 0.0
    assert min(at, after) > 0.05
    assert [layer["name"] for layer in found["layers"]] == [f"model.layers.{i}" for i in range(3)]


def test_damage_sits_where_it_was_put():
    model = pico("llama", num_hidden_layers=3)
    rng = torch.Generator().manual_seed(0)
    deltas = {}
    for layer, size in ((0, 0.001), (2, 3.0)):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        region, weight = Region.of((32, 48), "cols", [1, 2, 3]), model.get_parameter(name)
        deltas[name] = Slice(region, region.read(weight) + size * torch.randn(3, 32, generator=rng))
    graft, batches = Graft.made(model, deltas), [pico_batch(model, batch=8, seed=i) for i in range(2)]
    found = damage(model, graft, batches)
    assert [p["name"] for p in found["parts"]] in (
        ["model.layers.2", "model.layers.0"],
        ["model.layers.0", "model.layers.2"],
    )
    parts = {p["name"]: p["change"]["value"] for p in found["parts"]}
    assert abs(parts["model.layers.2"]) > 20 * abs(parts["model.layers.0"])
    half = Graft.made(model, {n: d for n, d in deltas.items() if ".2." not in n})
    whole, rest = (loss(model, g, batches, nulls=0)["measures"]["loss"]["change"]["value"] for g in (graft, half))
    assert parts["model.layers.2"] == pytest.approx(whole - rest, abs=1e-6)
    assert found["whole"] == pytest.approx(whole, abs=1e-6)
    by_parameter = damage(model, graft, batches, by="parameter")
    assert {p["name"] for p in by_parameter["parts"]} == set(deltas)
    with pytest.raises(RequestError, match="layer"):
        damage(model, graft, batches, by="neuron")
