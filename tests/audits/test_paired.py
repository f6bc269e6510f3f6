"""The paired forward: numbers from paper, a slow literal twin, and the models' own losses."""

import copy
import math

import pytest
import torch
import transformers
from _tables import BigramForCausalLM, Table, rows_graft

from neurograft.audits._changes import Null, as_change
from neurograft.audits._paired import metric_runs, runs
from neurograft.audits._scoring import Scored, label_sums, scored, scored_in_halves
from neurograft.audits.landscape import _right
from neurograft.core.compact.meter import Peak
from neurograft.core.errors import RequestError
from neurograft.core.grafts.delta import Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.region import Region
from neurograft.worlds.pico import families, pico, pico_batch


def columns_graft(model, amount=0.3):
    """A graft on some columns of the last wide matrix but the head."""
    name = [n for n, p in model.named_parameters() if p.dim() == 2 and min(p.shape) >= 32][-2]
    weight = model.get_parameter(name)
    region = Region.of(weight.shape, "cols", [0, 5, 9])
    noise = torch.randn(region.values_shape, generator=torch.Generator().manual_seed(0))
    return Graft.made(model, {name: Slice(region, region.read(weight) + amount * noise)})


def test_two_classes_on_paper():
    model = Table([[0.0, 0.0]])
    graft = rows_graft(model, [0], [[math.log(3), 0.0]])
    found = runs(model, graft, [{"rows": torch.tensor([0, 0]), "labels": torch.tensor([0, 1])}], nulls=0)["change"]
    assert found.base_logp.tolist() == pytest.approx([math.log(0.5)] * 2)
    assert found.new_logp.tolist() == pytest.approx([math.log(0.75), math.log(0.25)])
    assert found.kl.tolist() == pytest.approx([0.5 * math.log(4 / 3)] * 2, rel=1e-5)
    assert found.kl_reverse.tolist() == pytest.approx([0.75 * math.log(1.5) - 0.25 * math.log(2)] * 2, rel=1e-5)
    assert found.base_entropy.tolist() == pytest.approx([math.log(2)] * 2)
    assert found.new_top.tolist() == pytest.approx([0.75] * 2)
    assert found.new_right.tolist() == [True, False]
    assert found.base_brier.tolist() == pytest.approx([0.5] * 2)
    assert found.new_brier.tolist() == pytest.approx([0.125, 1.125])
    assert found.flip.tolist() == [False, False]


def test_next_tokens_padding_and_items():
    model = BigramForCausalLM(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))
    tokens = torch.tensor([[0, 1, 2, 3], [5, 5, 4, 1]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    found = runs(model, Graft(), [{"input_ids": tokens, "attention_mask": mask}], nulls=0)["change"]
    logp = model.weight.detach().log_softmax(-1)
    assert found.item.tolist() == [0, 0, 1]  # the first real token behind padding is not scored
    assert found.base_logp.tolist() == pytest.approx([float(logp[0, 1]), float(logp[1, 2]), float(logp[4, 1])])


@pytest.mark.parametrize("family", families())
def test_it_scores_what_the_model_trains_on(family):
    model = pico(family)
    batch = pico_batch(model, batch=3)
    if "labels" not in batch or "CTC" in type(model).__name__:  # nothing that could be told apart place by place
        with pytest.raises(RequestError, match="metrics=callable"):
            runs(model, Graft(), [batch], nulls=0)
        return
    found = runs(model, Graft(), [batch], nulls=0)["change"]
    with torch.no_grad():
        assert -float(found.base_logp.mean()) == pytest.approx(float(model(**batch).loss), rel=1e-5)


def test_encoder_decoders_and_masked_models():
    small = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**small, decoder_start_token_id=0)).eval()
    tokens = torch.randint(2, 40, (2, 5), generator=torch.Generator().manual_seed(0))
    labels = tokens[:, :4].clone()
    labels[1, 2:] = -100
    small = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**small, num_attention_heads=2)).eval()
    masked = torch.full_like(tokens, -100)
    masked[:, 2] = tokens[:, 2]
    for model, wanted in ((t5, labels), (bert, masked)):
        batch = {"input_ids": tokens, "labels": wanted}
        found = runs(model, Graft(), [batch], nulls=0)["change"]
        with torch.no_grad():
            assert -float(found.base_logp.mean()) == pytest.approx(float(model(**batch).loss), rel=1e-5)
        assert len(found) == int((wanted != -100).sum())


def test_it_equals_a_slow_twin_in_double():
    model = pico("llama")
    batch, graft = pico_batch(model, batch=2), columns_graft(pico("llama"))
    found = runs(model, graft, [batch], nulls=0)["change"]
    with torch.no_grad():
        base = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        with graft.on(model):
            new = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    i = 0
    for row in range(2):
        for t in range(7):
            label = int(batch["labels"][row, t + 1])
            if label == -100:
                continue
            p, q = base[row, t].double().softmax(0), new[row, t].double().softmax(0)
            forward = sum(float(a * (a / b).log()) for a, b in zip(p, q))
            reverse = sum(float(b * (b / a).log()) for a, b in zip(p, q))
            assert float(found.kl[i]) == pytest.approx(forward, rel=1e-4)
            assert float(found.kl_reverse[i]) == pytest.approx(reverse, rel=1e-4)
            assert float(found.new_entropy[i]) == pytest.approx(-float((q * q.log()).sum()), rel=1e-5)
            assert float(found.new_logp[i] - found.base_logp[i]) == pytest.approx(
                float((q[label] / p[label]).log()), abs=2e-6
            )
            assert bool(found.flip[i]) == (int(p.argmax()) != int(q.argmax()))
            assert int(found.item[i]) == row
            i += 1
    assert i == len(found)


def test_tiny_divergences_keep_their_digits():
    model = Table(torch.randn(1, 500, generator=torch.Generator().manual_seed(0)))
    direction = torch.randn(1, 500, generator=torch.Generator().manual_seed(1))
    found = []
    for size in (1e-3, 2e-3):
        graft = rows_graft(model, [0], model.weight.detach() + size * direction)
        batch = {"rows": torch.tensor([0]), "labels": torch.tensor([3])}
        found.append(float(runs(model, graft, [batch], nulls=0)["change"].kl[0]))
    assert found[1] / found[0] == pytest.approx(4, rel=0.02)  # the KL of a small change is quadratic in it


def test_groups_of_any_size_measure_the_same():
    model = pico("llama")
    batches, graft = [pico_batch(model, seed=i) for i in range(3)], columns_graft(pico("llama"))
    whole, single = (runs(model, graft, batches, nulls=2, budget=b) for b in (10**9, 1))
    for name in whole:
        for field in ("item", "new_logp", "kl", "flip"):
            assert torch.equal(getattr(whole[name], field), getattr(single[name], field))


def test_a_tuned_model_measures_like_its_graft():
    model = pico("bert")
    batches, graft = [pico_batch(model, batch=4)], columns_graft(pico("bert"))
    tuned = graft.apply(copy.deepcopy(model))
    by_graft, by_model = (runs(model, change, batches, nulls=0)["change"] for change in (graft, tuned))
    assert torch.equal(by_graft.new_logp, by_model.new_logp)
    assert float(by_graft.kl.sum()) > 0


def test_switching_leaves_every_bit_and_mode_alone():
    model = pico("llama").train()
    model.model.layers[0].eval()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    runs(model, columns_graft(pico("llama")), [pico_batch(model)], nulls=3)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert [m.training for m in model.modules()] == modes


def test_null_changes_have_the_size_and_places_of_the_change():
    model = pico("llama")
    change = as_change(model, columns_graft(model))
    (name,) = change.weights
    region, values = Null(change, 4).weights()[name]
    moved = values - region.read(model.get_parameter(name))
    assert float(moved.norm()) == pytest.approx(float(change.weights[name].delta.norm()), rel=1e-5)
    assert region.layout == "cols"
    assert len(region.ids) == 3
    again, other = Null(change, 4).weights()[name], Null(change, 5).weights()[name]
    assert torch.equal(values, again[1])
    assert not torch.equal(region.ids, other[0].ids) or not torch.equal(values, other[1])


def test_without_a_part_the_part_is_the_base():
    model = pico("llama")
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    deltas = {n: Slice(Region.of((48, 32), "rows", [1]), torch.zeros(1, 32)) for n in names}
    graft = Graft.made(model, deltas)
    base = {n: model.get_parameter(n).detach().clone() for n in names}
    with as_change(model, graft).without([names[0]]):
        assert torch.equal(model.get_parameter(names[0]), base[names[0]])
        assert float(model.get_parameter(names[1])[1].abs().sum()) == 0
    assert all(torch.equal(model.get_parameter(n), base[n]) for n in names)


def test_metrics_are_called_under_base_and_change():
    model = Table([[0.0, 0.0], [0.0, 0.0]])
    change = as_change(model, rows_graft(model, [0], [[2.0, 0.0]]))
    batch = {"rows": torch.tensor([0, 1]), "labels": torch.tensor([0, 0])}
    base, new = metric_runs(model, {"change": change}, [batch], lambda m, b: m(b["rows"])[:, 0])["change"]
    assert (base.tolist(), new.tolist()) == ([0.0, 0.0], [2.0, 0.0])


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"rows": torch.tensor([0])}, "labels"),
        ({"rows": torch.tensor([0]), "labels": torch.tensor([0.5])}, "metrics"),
        ({"rows": torch.tensor([0]), "labels": torch.tensor([[0, 1]])}, "logits of shape"),
    ],
)
def test_bad_batches_are_refused(batch, says):
    with pytest.raises(RequestError, match=says):
        scored(Table([[0.0, 0.0]]), batch)


def test_bad_changes_are_refused():
    model = Table([[0.0, 0.0]])
    batch = {"rows": torch.tensor([0]), "labels": torch.tensor([0])}
    with pytest.raises(RequestError, match="Graft"):
        runs(model, "a path", [batch])
    with pytest.raises(RequestError, match="NaN"):
        runs(model, rows_graft(model, [0], [[float("nan"), 0.0]]), [batch])
    with pytest.raises(RequestError, match="NaN"):
        runs(Table([[float("nan"), 0.0]]), Graft(), [batch])
    with pytest.raises(RequestError, match="no batches"):
        runs(model, Graft(), [])
    with pytest.raises(RequestError, match="the base's shapes, or rows added"):
        runs(model, Table([[0.0]]), [batch])


def test_both_reads_the_base_first_and_each_in_evaluation():
    model = pico("llama").train()
    graft = columns_graft(model)
    name = next(iter(as_change(model, graft).weights))
    before = model.get_parameter(name).detach().clone()
    with graft.on(model):
        after = model.get_parameter(name).detach().clone()
    assert not torch.equal(before, after)

    def read(net):
        return net.training, torch.is_grad_enabled(), net.get_parameter(name).detach().clone()

    found = as_change(model, graft).both(read)
    assert [one[:2] for one in found] == 2 * [(False, False)]
    assert [torch.equal(one[2], w) for one, w in zip(found, (before, after))] == [True, True]
    assert model.training
    assert torch.equal(model.get_parameter(name), before)


def test_what_was_scored_is_summed_by_row():
    logits = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.125, 0.875]]).log()
    found = Scored([(logits, None)], torch.tensor([0, 1, 0]), torch.tensor([0, 2, 2]), 3)
    told = torch.tensor([0.75, 0.5, 0.125]).log()
    torch.testing.assert_close(found.log_probs, told)
    torch.testing.assert_close(
        found.by_row(found.log_probs), torch.stack([told[0], told[0] * 0, told[1:].sum()]).double()
    )
    assert found.right.tolist() == [True, False, False]
    assert found.counts.tolist() == [1, 0, 2]


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "vit"])
@pytest.mark.parametrize("chunk", [1, 150, 1 << 20])
def test_a_few_places_at_a_time_give_what_all_at_once_give(family, chunk, monkeypatch):
    monkeypatch.setattr("neurograft.audits._scoring.CHUNK", chunk)
    model, graft = pico(family), Graft()
    batch = pico_batch(model, batch=3)
    with torch.no_grad():
        found, halves = scored(model, batch), scored_in_halves(model, batch)
    rows = torch.cat([part for _, part in found.pieces()])
    assert torch.equal(rows, found.logits)
    assert [at.indices(9999)[:2] for at, _ in found.pieces()][-1][1] == len(found.labels)
    assert torch.equal(torch.cat([part for _, part in halves.pieces()]), halves.logits)
    logp = found.logits.float().log_softmax(-1)
    assert torch.equal(found.log_probs, logp.gather(1, found.labels[:, None])[:, 0])
    some = torch.arange(len(halves.labels)) % 3 != 1
    assert torch.equal(halves.only(some).logits, halves.logits[some])
    assert torch.equal(halves.only(some).rows, halves.rows[some])
    measured = runs(model, graft, [batch], nulls=0)["change"]
    assert torch.equal(measured.base_logp, logp.gather(1, found.labels[:, None])[:, 0])


def test_scoring_holds_the_output_once_and_the_audit_the_base_beside_it(monkeypatch):
    monkeypatch.setattr("neurograft.audits._scoring.CHUNK", 1 << 14)
    # Over a vocabulary of 150,000 the output of one batch is what fills a memory; a copy of it would double that.
    model = pico("llama", vocab_size=4096)
    batch = pico_batch(model, batch=16)
    with torch.no_grad(), Peak() as forward:
        model(**{k: v for k, v in batch.items() if k != "labels"})
    with torch.no_grad():
        output = scored(model, batch).blocks[0][0].numel() * 4
        with Peak() as meter:
            label_sums(model, [batch])
    assert meter.peak < forward.peak + 0.5 * output
    with Peak() as meter:
        runs(model, Graft(), [batch], nulls=0)
    assert meter.peak < forward.peak + 1.6 * output  # the base's log-probabilities, and pieces


def test_batches_are_not_collected():
    model = pico("llama", vocab_size=512)
    batch = pico_batch(model, batch=8)
    peaks = []
    for count in (2, 8):
        with torch.no_grad(), Peak() as meter:
            label_sums(model, [batch] * count)
            _right(model, [batch] * count)
        peaks.append(meter.peak)
    assert peaks[1] < 1.1 * peaks[0]
