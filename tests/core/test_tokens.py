"""New tokens: whatever holds a row or a number for each token grows with them, in every family, and shrinks again."""

import pytest
import torch
import transformers
from torch import nn

import neurograft as ng
from neurograft.anatomy.sites import sites
from neurograft.core.errors import RequestError
from neurograft.core.grafts.delta import New
from neurograft.core.grafts.graft import Graft
from neurograft.core.selection import Selection
from neurograft.core.tokens import beside, grown
from neurograft.pipeline.diff import diff
from neurograft.worlds._picos import PICO
from neurograft.worlds.pico import pico, pico_batch

TEXT = dict(PICO["bert"][1])
FIELDS = {
    "BertForMaskedLM": TEXT,
    "RobertaForMaskedLM": TEXT,
    "ElectraForMaskedLM": TEXT,
    "DebertaV2ForMaskedLM": TEXT,
    "ModernBertForMaskedLM": dict(PICO["modernbert"][1]),
    "DistilBertForMaskedLM": dict(PICO["distilbert"][1]),
    "PhiForCausalLM": dict(PICO["llama"][1]),
    "GPTJForCausalLM": {**PICO["gpt2"][1], "rotary_dim": 4},
}
NAMED = [n for n in PICO if "vocab_size" in PICO[n][1] and n not in ("hubert", "wav2vec2", "whisper")]


def made(name):
    """A pico model of a family, or of a class whose head has a bias."""
    if name in PICO:
        return pico(name)
    torch.manual_seed(0)
    found = getattr(transformers, name)
    return found(found.config_class(**FIELDS[name])).eval()


def longer(name):
    """The same model with three tokens more, and where its embedding is."""
    model = made(name)
    torch.manual_seed(1)
    model.resize_token_embeddings(67)
    return model, entry(model)


def entry(model):
    return next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)


def batch_of(model):
    """A batch in which a new token is read."""
    batch = pico_batch(model)
    batch["input_ids"] = batch["input_ids"].clone()
    batch["input_ids"][0, 3] = 65
    return batch


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def bits(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


@pytest.mark.parametrize("name", [*NAMED, *FIELDS])
def test_rows_tuned_beside_a_head_of_any_kind_come_with_all_that_grew(name, tmp_path):
    """A graft of the embedding's rows alone left BERT's bias at 64 of 67 tokens, and Llama's untied head, too."""
    base, (tuned, rows) = made(name), longer(name)
    before, batch, found = bits(base), batch_of(tuned), sites(tuned, "neuron")
    with ng.attach(tuned, Selection.of(found, {next(iter(found)): [0]}), new={rows: 64}) as live:
        optimizer = torch.optim.AdamW(live.parameters(), lr=1e-2)
        tuned(**batch).loss.backward()
        optimizer.step()
        with torch.no_grad():
            wanted = tuned(**batch)
    live.graft().save(tmp_path / "graft")
    graft = Graft.load(tmp_path / "graft")
    with graft.on(base), torch.no_grad():
        got = base(**batch)
        assert torch.equal(got.logits, wanted.logits)
        assert torch.equal(got.loss, wanted.loss)
        assert same(bits(base), bits(graft.apply(longer(name)[0])))
    assert same(bits(base), before)
    assert base.config.get_text_config().vocab_size == 64


@pytest.mark.parametrize("name", ["bart", "marian", "gpt_neox", "gemma2", "BertForMaskedLM", "PhiForCausalLM"])
def test_the_difference_of_a_model_with_more_tokens_goes_onto_its_base(name, tmp_path):
    base, (tuned, rows) = made(name), longer(name)
    before, batch = bits(base), batch_of(tuned)
    tuned.get_parameter(rows).data[64:] += 1
    with torch.no_grad():
        wanted = tuned(**batch)
    graft = diff(base, tuned)
    with graft.on(base), torch.no_grad():
        got = base(**batch)
        assert torch.equal(got.logits, wanted.logits)
        assert torch.equal(got.loss, wanted.loss)
    assert same(bits(base), before)
    graft.export(tmp_path / "merged", to="merged", model=base)
    again = type(base).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, wanted.logits)


def test_rows_made_by_hand_give_new_tokens_a_bias_of_zero():
    model = made("BertForMaskedLM")
    model.cls.predictions.bias.data.normal_(generator=torch.Generator().manual_seed(0))
    before = bits(model)
    graft = Graft.made(model, {entry(model): New(torch.zeros(2, 32), 64)})
    with graft.on(model), torch.no_grad():
        logits = model(**pico_batch(model)).logits
        assert model.cls.predictions.decoder.bias is model.cls.predictions.bias
    assert logits.shape[-1] == 66
    assert not logits[..., 64:].any()
    assert bool(logits[..., :64].all())
    assert same(bits(model), before)


def test_a_selection_in_a_head_that_grew_is_refused():
    """Its shape is no longer the base's: such a graft would fit nothing."""
    model, rows = longer("llama")
    found = sites(model, "row")
    where = Selection.of(found, {"lm_head/row": [1]})
    with (
        pytest.raises(RequestError, match="weight, to which new rows are added"),
        ng.attach(model, where, new={rows: 64}),
    ):
        pass


def test_a_buffer_of_other_numbers_for_new_tokens_is_refused():
    model, rows = longer("bart")
    model.final_logits_bias[0, 65] = 1
    found = sites(model, "neuron")
    where = Selection.of(found, {next(iter(found)): [0]})
    with (
        pytest.raises(RequestError, match="final_logits_bias with other numbers than 0"),
        ng.attach(model, where, new={rows: 64}),
    ):
        pass
    with pytest.raises(RequestError, match="final_logits_bias"):
        diff(made("bart"), model)


def test_a_change_of_a_head_and_rows_beside_it_refuse_each_other():
    base = made("PhiForCausalLM")
    before, changed = bits(base), made("PhiForCausalLM")
    changed.lm_head.bias.data[3] += 1
    bias = diff(base, changed)
    more = Graft.made(base, {entry(base): New(torch.zeros(2, 32), 64)})
    with bias.on(base), pytest.raises(RequestError, match="appends rows"):
        more.apply(base)
    assert same(bits(base), before)


def test_vocabularies_that_are_two_grow_one_at_a_time():
    apart = {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False, "decoder_vocab_size": 64}
    model = pico("marian", **apart)
    assert list(beside(model, "model.encoder.embed_tokens.weight")) == []
    assert list(beside(model, "lm_head.weight")) == ["final_logits_bias"]
    growths = grown(model, "lm_head.weight", 64, 66)
    assert (model.config.vocab_size, model.config.decoder_vocab_size) == (64, 66)
    assert model.final_logits_bias.shape == (1, 66)
    for growth in reversed(growths):
        growth.remove()
    assert (model.config.vocab_size, model.config.decoder_vocab_size) == (64, 64)


def test_a_table_of_as_many_positions_as_tokens_is_no_vocabulary():
    model = pico("gpt2")
    growths = grown(model, "transformer.wpe.weight", 64, 66)
    assert [g.names for g in growths] == [["transformer.wpe.weight"]]
    assert model.config.vocab_size == 64
    for growth in growths:
        growth.remove()


def test_a_head_of_a_plain_module_grows_with_its_bias():
    net = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 4))
    assert list(beside(net, "1.weight")) == ["1.bias"]
    assert list(beside(net, "0.weight")) == []


@pytest.mark.parametrize("adapter", ["mask", "lora", "slice_lora", "dense"])
def test_adapters_that_train_no_appended_rows_say_so(adapter):
    """They failed on a missing key, and only when the graft was taken."""
    model, rows = longer("llama")
    found = sites(model, "module" if adapter == "dense" else "neuron")
    where = Selection.of(found, {next(iter(found)): [0]})
    with (
        pytest.raises(RequestError, match="new tokens"),
        ng.attach(model, where, adapter=adapter, new={rows: 64}),
    ):
        pass
    assert all(p.requires_grad for p in model.parameters())
