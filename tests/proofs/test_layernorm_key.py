"""LayerNorm: the census, exactly the chosen entries, the ranking of components, squares before the mean."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from neurograft.anatomy.sites import sites
from neurograft.core.choose import choose
from neurograft.core.context import Context
from neurograft.core.resolve import resolve
from neurograft.core.units import Part, Site, census
from neurograft.pipeline.attach import attach
from neurograft.pipeline.recipe import recipe
from neurograft.pipeline.run import run
from neurograft.train.loop import fit
from neurograft.worlds.pairs import pairs
from neurograft.worlds.pico import pico
from neurograft.worlds.tiny import accuracy
from tests.proofs import effect, note, patched
from tests.proofs._relations import pair_rows, reader
from tests.proofs._spoilt import whole_batches_are_squared
from tests.proofs._tools import moved, snapshot

PAPER, SCALE = "layernorm-key", "tiny"


@contextmanager
def gain_and_shift_are_one_unit():
    """The entries of a norm are not chosen apart."""
    within = resolve("neurograft.locators.within")

    def together(context, **options):
        return within(context, **{**options, "apart": False})

    together.card = within.card
    with patched("neurograft.locators.within", "within", together):
        yield


@contextmanager
def components_are_ranked_by_relative_change():
    """The ranking divides by the size of the weights."""
    component_change = resolve("neurograft.audits.component_change")

    def relative(model, change, batches=(), *, norm="mean_abs"):
        found = component_change(model, change, norm="relative")
        return {**found, "components": [{**c, "mean_abs": c["relative"]} for c in found["components"]]}

    relative.card = component_change.card
    with patched("neurograft.audits.component_change", "component_change", relative):
        yield


BROKEN = (whole_batches_are_squared, gain_and_shift_are_one_unit, components_are_ranked_by_relative_change)


def test_the_census_of_bert_large_is_the_formula():
    """24 layers x 2 norms x 2 x 1024, and 2048 of the embeddings: 100,352; output norms alone 49,152."""
    from transformers import BertConfig, BertForSequenceClassification

    with torch.device("meta"):
        model = BertForSequenceClassification(
            BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
        )
    found = sites(model, "norm")
    assert census(found) == 24 * 2 * 2 * 1024 + 2048 == 100_352
    outputs = {n: s for n, s in found.items() if ".output.LayerNorm" in n and "attention" not in n}
    assert census(outputs) == 49_152


def test_norms_and_head_move_and_nothing_else():
    model = pico("bert")
    before = snapshot(model)
    changes = {"lr": 1e-2, "epochs": 1, "warmup": 0.0}
    graft = run("layernorm_key", model, pair_rows(), changes=changes).graft
    assert not moved(before, model)
    graft.apply(model)
    changed = moved(before, model)
    norms = {n for n in before if "LayerNorm" in n}
    assert {n for n in changed if "classifier" not in n} == norms
    assert all(len(changed[n]) == 32 for n in norms if n.endswith("weight"))
    assert any("classifier" in n for n in changed)


def test_a_subset_changes_exactly_the_chosen_entries():
    model = pico("bert")
    before = snapshot(model)
    changes = {"lr": 1e-2, "epochs": 1, "warmup": 0.0, "fraction": 0.2, "rehearse": 5}
    out = run("layernorm_key", model, pair_rows(), changes=changes)
    total = sum(p.numel() for n, p in model.named_parameters() if "LayerNorm" in n)
    chosen = {n: i for n, i in out.state["norms"].ids.items() if len(i)}
    assert sum(len(i) for i in chosen.values()) == round(0.2 * total)
    out.graft.apply(model)
    changed = {n: e for n, e in moved(before, model).items() if "LayerNorm" in n}
    expected = {f"{n.split('/')[0]}.{n.rpartition(':')[2]}": i for n, i in chosen.items()}
    assert set(changed) == set(expected)
    for name, entries in changed.items():
        assert torch.equal(entries, expected[name])


def test_a_shifted_component_ranks_first_by_exactly_its_shift():
    model = pico("bert")
    tuned = pico("bert")
    step = 2.0**-7
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith(".output.LayerNorm.weight") and "attention" not in name:
                parameter += step
            elif name.endswith("query.bias"):
                parameter += step / 2
    found = resolve("neurograft.audits.component_change")(model, tuned)["components"]
    assert found[0]["name"] == "bert.encoder.layer.*.output.LayerNorm.weight"
    assert found[0]["mean_abs"] == step
    assert found[0]["entries"] == 2 * 32
    assert found[1]["mean_abs"] == step / 2
    assert all(c["mean_abs"] == 0 for c in found[2:])
    apart = choose("locators", ("within", {"by": ("change", {}), "apart": True}))
    scores = apart(Context(model, sites(model, "norm"), against=tuned))
    name = "bert.encoder.layer.1.output.LayerNorm/norm:weight"
    assert scores.values[name].tolist() == [step] * 32
    assert float(sum(v.sum() for v in scores.values.values())) == pytest.approx(2 * 32 * step)


class Pulled(nn.Module):
    """A norm's gain, pulled up by one example and down by the other."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(2)
        self.classifier = nn.Linear(1, 1)

    def forward(self, pull, labels=None):
        return SimpleNamespace(loss=(self.norm.weight[0] * pull).mean(), logits=pull)


def test_squares_come_before_the_mean():
    """Two examples with gradients +1 and -1 give F = 1, not 0."""
    net = Pulled()
    site = Site("n", "norm", 2, (Part.entries("norm.weight", 2),))
    batch = {"pull": torch.tensor([1.0, -1.0]), "labels": torch.zeros(2, dtype=torch.int64)}
    context = Context(net, {"n": site}, [batch], loss=lambda m, b: m(**b).loss)
    assert resolve("neurograft.locators.fisher")(context).values["n"].tolist() == [1.0, 0.0]


def test_a_channel_that_nothing_reads_is_never_picked():
    model = pico("bert")
    with torch.no_grad():
        model.bert.pooler.dense.weight[:, 5] = 0.0
    batch = pairs("relation", count=1, batch=8, seed=4)[0]
    locate = recipe("layernorm_key", fraction=0.9, rehearse=3).steps[0]
    context = Context(model, sites(model, "norm"), [batch], loss=lambda m, b: m(**b).loss)
    before = snapshot(model)
    scores = choose("locators", locate["by"])(context)
    assert not moved(before, model)
    last = "bert.encoder.layer.1.output.LayerNorm/norm"
    for leaf in ("weight", "bias"):
        assert float(scores.values[f"{last}:{leaf}"][5]) == 0.0
        assert int((scores.values[f"{last}:{leaf}"] == 0).sum()) == 1
        assert 5 not in scores.top(fraction=0.9).ids[f"{last}:{leaf}"].tolist()


@effect
def test_norms_beat_the_head_alone():
    """A tiny BERT, 3 seeds, held-out loss and accuracy; 20 % of the entries by Fisher or chance are reported."""
    names = ("norms", "head", "fisher", "random")
    table = {f"{n}_{what}": [] for n in names for what in ("loss", "accuracy")}
    for seed in range(3):
        model, train, test = reader(seed, layers=2)
        whole = choose("locators", ("within", {"by": "noise", "apart": True}))(
            Context(model, sites(model, "norm"), seed=seed)
        )
        head = choose("locators", ("within", {"by": "noise", "roles": "head"}))(
            Context(model, sites(model, "module"))
        ).top(fraction=1.0)
        context = Context(model, sites(model, "norm"), train[:3], loss=lambda m, b: m(**b).loss)
        fisher = choose("locators", recipe("layernorm_key", fraction=0.2, rehearse=30).steps[0]["by"])(context)
        wheres = {
            "norms": whole.top(fraction=1.0) | head,
            "head": head,
            "fisher": fisher.top(fraction=0.2) | head,
            "random": whole.top(fraction=0.2) | head,
        }
        for name, where in wheres.items():
            with attach(model, where) as live:
                fit(live, train, steps=120, lr=1e-2, warmup=10, decay="linear")
                model.eval()
                table[f"{name}_accuracy"].append(accuracy(model, test))
                with torch.no_grad():
                    table[f"{name}_loss"].append(float(torch.stack([model(**b).loss for b in test]).mean()))
    note(**table)
    for seed in range(3):
        assert table["norms_loss"][seed] < table["head_loss"][seed]
        assert table["norms_accuracy"][seed] > table["head_accuracy"][seed]
