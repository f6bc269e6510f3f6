"""Audits on what they are not usually shown: few or unlike rows, padding, training mode, other kinds of change."""

import copy

import pytest
import torch

from neurograft.anatomy.sites import sites
from neurograft.audits.concentration import concentration
from neurograft.audits.evidence import evidence
from neurograft.audits.landscape import landscape
from neurograft.audits.representation_drift import representation_drift
from neurograft.audits.spectral_balance import spectral_balance
from neurograft.audits.stereotype import stereotype
from neurograft.audits.task_energy import task_energy
from neurograft.core.context import Context
from neurograft.core.errors import RequestError
from neurograft.core.selection import Scores, Selection
from neurograft.core.units import Part, Site
from neurograft.locators.value import value
from neurograft.selectors.quantile import quantile
from neurograft.selectors.threshold import threshold
from neurograft.worlds.pico import pico, pico_batch


def moved(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "layers.0" in name or "layer.0" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return other


def test_the_drift_of_many_tokens_of_few_items_is_known_from_few_items():
    """Tokens of one item that all moved alike are one observation: 3 items of 8 equal tokens make n = 3."""
    model = pico("llama")
    tokens = torch.tensor([[5] * 8, [9] * 8, [11] * 8])
    found = representation_drift(model, moved(model), [{"input_ids": tokens}], nulls=0, draws=400)
    layer = found["layers"][0]
    assert (layer["tokens"], layer["items"], layer["cosine_drift"]["n"]) == (24, 3, 3)
    once = representation_drift(model, moved(model), [{"input_ids": tokens[:, :1]}], nulls=0, draws=400)
    assert once["layers"][0]["tokens"] == 3
    wide, narrow = (one["layers"][0]["shift"] for one in (found, once))
    # the same to the eye: repeating a token adds no evidence
    assert wide["high"] - wide["low"] == pytest.approx(narrow["high"] - narrow["low"], rel=0.2)


def test_items_are_told_across_batches_and_padding():
    model = pico("llama")
    batches = [pico_batch(model, batch=2, seed=s) for s in range(3)]
    found = representation_drift(model, moved(model), batches, nulls=0, draws=50)
    assert {layer["items"] for layer in found["layers"]} == {6}
    images = pico("resnet")
    found = representation_drift(images, moved(images), [pico_batch(images, batch=3)], nulls=0, draws=50)
    assert {layer["items"] for layer in found["layers"]} == {3}


def test_concentration_of_a_classifier_and_of_a_crowded_site():
    model = pico("bert").train()
    batch = pico_batch(model, batch=6)
    model.eval()
    with torch.no_grad():
        batch["labels"] = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.argmax(-1)
    model.train()
    where = sites(model, "neuron")
    values = {n: torch.arange(float(s.n)) + 1000 * (i == 0) for i, (n, s) in enumerate(where.items())}
    # the 40 best of 48 are in one site: there are not 40 others to silence instead
    found = concentration(model, Scores(where, values), [batch], count=40, controls=2)
    assert found["answered"] == 1.0
    assert len(found["random"]) == 2
    assert model.training


def test_stereotypes_need_labels_and_no_dropout():
    model = pico("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    tokens = torch.randint(5, 60, (6, 5), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(5) >= 3, tokens, -100)
    found = [stereotype(model, [{"input_ids": tokens, "labels": labels}]) for _ in range(2)]
    assert found[0] == found[1] == stereotype(model.eval(), [{"input_ids": tokens, "labels": labels}])
    with pytest.raises(RequestError, match="batch of 6 rows"):
        stereotype(model, [{"input_ids": tokens}])


def test_what_is_looked_at_under_a_change_may_be_any_change_and_is_no_padding():
    model = pico("llama")
    batch = pico_batch(model, batch=3)
    tuned = moved(model)
    assert spectral_balance(model, tuned)["parameters"] == spectral_balance(tuned)["parameters"]
    energy = task_energy(model, tuned, [batch])["sites"]
    assert energy == task_energy(tuned, None, [batch])["sites"]
    assert energy != task_energy(model, None, [batch])["sites"]
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 33, batch["input_ids"])}
    assert not torch.equal(other["input_ids"], batch["input_ids"])
    assert task_energy(model, None, [other])["sites"] == task_energy(model, None, [batch])["sites"]


def test_evidence_without_controls_is_refused():
    model = pico("llama")
    where = sites(model, "neuron")
    one = Selection.of(where, {next(iter(where)): [3]})
    with pytest.raises(RequestError, match="controls=0"):
        evidence(model, one, [pico_batch(model)], controls=0)


def test_the_landscape_counts_places_and_not_batches():
    model = pico("bert")
    batch = pico_batch(model, batch=5)
    with torch.no_grad():
        said = model(**batch).logits.argmax(-1)
    batch["labels"] = torch.where(torch.arange(5) < 4, said, (said + 1) % 3)
    uneven = [{k: v[:4] for k, v in batch.items()}, {k: v[4:] for k, v in batch.items()}]
    for batches in ([batch], uneven):
        assert landscape(model, model, batches, probes=2, sigma=1e-6)["base"]["reward"] == 0.8


def weights(rows, columns):
    return {"w": Site("w", "weight", rows * columns, (Part("w", ((rows, columns), (columns, 1))),))}


def test_quantiles_by_row_are_the_literal_ones_with_ties():
    rng = torch.Generator().manual_seed(0)
    values = torch.randint(0, 5, (7, 9), generator=rng).float()
    site = weights(7, 9)
    for q in (0.0, 0.34, 0.5, 0.95):
        found = quantile(Scores(site, {"w": values.reshape(-1)}), q=q, per="row").ids["w"].tolist()
        bars = [sorted(row)[min(8, int(q * 9))] for row in values.tolist()]
        assert found == [9 * i + j for i in range(7) for j in range(9) if values[i, j] >= bars[i]]


def test_a_threshold_that_takes_nothing_is_refused():
    scores = Scores(weights(2, 2), {"w": torch.arange(4.0)})
    for options in ({"most": 0}, {"least": 3, "most": 2}, {"least": -1}):
        with pytest.raises(RequestError, match="most"):
            threshold(scores, above=0.5, **options)
    assert threshold(scores, above=0.5, most=1).ids["w"].tolist() == [3]


def test_value_probes_ask_about_rollouts_of_either_kind():
    """12 rollouts, 2 of 12 numbers held out: were they counted through, both would be failures."""
    model = pico("llama")

    def side(seed, count):
        tokens = torch.randint(5, 60, (count, 6), generator=torch.Generator().manual_seed(seed))
        return [{"input_ids": tokens, "labels": torch.where(torch.arange(6) >= 3, tokens, -100)}]

    for good, bad in ((4, 8), (6, 6), (5, 30)):
        given = Context(model, sites(model, "channel"), side(1, good), side(2, bad))
        told = value(given, hidden=4, epochs=3).card["auroc"]
        assert all(0 <= a <= 1 for one in told.values() for a in one.values()), (good, bad)
