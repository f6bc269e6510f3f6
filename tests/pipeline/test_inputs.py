"""Data in every form a user may have it: what the model gets, worked out by hand, and every way it can be wrong."""

import json

import numpy as np
import pytest
import torch

from neurograft.anatomy.sites import sites
from neurograft.core.errors import RequestError
from neurograft.core.prompts.collate import collator
from neurograft.core.taps.tap import watch
from neurograft.pipeline.given import Given
from neurograft.pipeline.inputs import as_batches, as_dataset, data_digest, processor_for
from neurograft.pipeline.models import load_model
from neurograft.pipeline.rows import read_rows
from neurograft.worlds.letters import letters
from neurograft.worlds.pico import pico, pico_batch

T = letters()
ROWS = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "10+1=", "completion": "11"}]


@pytest.fixture(scope="module")
def llama():
    return pico("llama")


def test_completions_have_labels_on_the_answer_alone(llama):
    first, second = as_dataset(ROWS, llama, processing_class=T)
    assert T.decode(second["input_ids"]) == "10+1=11</s>"
    assert second["labels"].tolist() == [-100] * 5 + second["input_ids"][5:].tolist()
    (batch,) = as_batches(ROWS, llama, processing_class=T)
    assert batch["input_ids"].shape == (2, 8)
    assert batch["attention_mask"][0].tolist() == [1] * 6 + [0, 0]
    assert batch["labels"][0].tolist() == [-100] * 4 + first["labels"][4:].tolist() + [-100, -100]


def test_messages_end_with_the_answer_that_has_labels(llama):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    (made,) = as_dataset([{"messages": chat}], llama, processing_class=T)
    assert T.decode(made["input_ids"]) == "u:hi</s>a:yo</s>"
    assert T.decode(made["labels"][made["labels"] != -100]) == "yo</s>"
    with pytest.raises(RequestError, match="assistant"):
        as_dataset([{"messages": chat[:1]}], llama, processing_class=T)


def test_text_of_a_causal_model_is_its_own_label_and_of_a_classifier_is_not(llama):
    (made,) = as_dataset([{"text": "abc"}], llama, processing_class=T)
    assert torch.equal(made["labels"], made["input_ids"])
    bert = pico("bert")
    (made,) = as_dataset([{"text": "abc", "label": 2}], bert, processing_class=T)
    assert int(made["labels"]) == 2
    with pytest.raises(RequestError, match="no classes"):
        as_dataset([{"text": "abc", "label": 2}], llama, processing_class=T)
    with pytest.raises(RequestError, match="label 'cat'"):
        as_dataset([{"text": "abc", "label": "cat"}], bert, processing_class=T)
    bert.config.label2id = {"cat": 1}
    assert int(as_dataset([{"text": "abc", "label": "cat"}], bert, processing_class=T)[0]["labels"]) == 1


def test_images_come_as_pixels_or_need_a_processor():
    vit = pico("vit")
    (made,) = as_batches([{"image": np.zeros((3, 16, 16), np.float32), "label": 1}] * 2, vit)
    assert made["pixel_values"].shape == (2, 3, 16, 16)
    with pytest.raises(RequestError, match="image processor"):
        as_batches([{"image": np.zeros((16, 16, 3), np.uint8), "label": 1}], vit)


def test_ready_batches_stay_whole_and_can_be_cut_into_examples(llama):
    batch = pico_batch(llama)
    (same,) = as_batches([batch], llama)
    assert all(torch.equal(same[k], batch[k]) for k in batch)
    examples = as_dataset([batch], llama)
    assert len(examples) == 2
    joined = collator(llama)(examples)
    assert all(torch.equal(joined[k], batch[k]) for k in batch)


def test_files_give_the_same_rows_as_lists(tmp_path, llama):
    lines = tmp_path / "d.jsonl"
    lines.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    whole = tmp_path / "d.json"
    whole.write_text(json.dumps(ROWS))
    import datasets
    import pyarrow as pa
    from pyarrow import feather, parquet

    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    feather.write_feather(pa.Table.from_pylist(ROWS), tmp_path / "d.feather")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    stream = next((tmp_path / "saved").glob("*.arrow"))
    table, tabs = tmp_path / "d.csv", tmp_path / "D.TSV"
    table.write_text("prompt,completion\r\n1+1=,2\r\n\r\n10+1=,11\r\n", encoding="utf-8-sig")
    tabs.write_text("prompt\tcompletion\n1+1=\t2\n10+1=\t11")
    paths = (lines, whole, tmp_path / "d.parquet", tmp_path / "d.feather", stream, table, tabs)
    for path in (*paths, tmp_path / "saved", tmp_path / "splits"):
        assert read_rows(path) == ROWS, path
    assert read_rows(lines, limit=1) == ROWS[:1]
    np.savez(tmp_path / "d.npz", pixel_values=np.zeros((2, 3, 16, 16)), labels=np.array([0, 1]))
    assert as_batches(tmp_path / "d.npz", pico("vit"))[0]["pixel_values"].shape == (2, 3, 16, 16)
    assert data_digest(as_batches(lines, llama, processing_class=T)) == data_digest(
        as_batches(ROWS, llama, processing_class=T)
    )


def test_cells_of_a_table_are_text_and_numbers_only_under_label(tmp_path):
    (tmp_path / "a.csv").write_text('text,label,group\n"a, ""b""\nc",1,07\n3,0.5,x\n4,cat,y\n5,,z\n')
    assert read_rows(tmp_path / "a.csv") == [
        {"text": 'a, "b"\nc', "label": 1, "group": "07"},
        {"text": "3", "label": 0.5, "group": "x"},
        {"text": "4", "label": "cat", "group": "y"},
        {"text": "5", "label": None, "group": "z"},
    ]


def test_every_line_of_plain_text_is_a_row(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone  \r\n\n två\n".encode())
    assert read_rows(tmp_path / "a.txt") == [{"text": "one  "}, {"text": " två"}]


SPOILED = {
    "cells.csv": (b"text,label\na,b,c\n", "line 2 of .* with 3 cells"),
    "head.csv": (b"text;label\na;1\n", "commas between"),
    "twice.csv": (b"text,text\na,b\n", "one name for each column"),
    "open.csv": (b'text\n"a\n', "cannot be read as a table"),
    "bytes.csv": (b"text\n\xff\n", "cannot be read as a table"),
    "none.csv": (b"text,label\n", "no rows"),
    "bytes.txt": (b"a\n\xff\n", "is no text"),
    "blank.txt": (b"\n \n", "no rows"),
    "bytes.arrow": (b"\x80\x04\x95" * 9, "cannot be read as Arrow"),
    "short.arrow": (b"ARROW1", "cannot be read as Arrow"),
    "under.json": (b'{"rows": [{"text": "a"}]}', "the list under 'rows' alone"),
    "data.xls": (b"", r"one of \.jsonl, "),
}


@pytest.mark.parametrize("name", SPOILED)
def test_files_that_cannot_be_read_are_named(name, tmp_path):
    data, words = SPOILED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RequestError, match=words):
        read_rows(tmp_path / name)


def test_a_folder_for_data_is_named_with_what_is_in_it(tmp_path):
    import datasets

    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(RequestError, match=r"the folder .*d\.jsonl.*name a file"):
        read_rows(tmp_path / "d.jsonl")
    (tmp_path / "d.jsonl" / "rows.csv").write_text("text\na\n")
    with pytest.raises(RequestError, match=r"such as .*rows\.csv"):
        read_rows(tmp_path / "d.jsonl")
    with pytest.raises(RequestError) as error:  # a folder is no near match of a file
        read_rows(tmp_path / "d.json")
    assert "d.jsonl" not in error.value.do
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    with pytest.raises(RequestError, match=r"without a split 'train'; expected one of test"):
        read_rows(tmp_path / "splits")


BAD = {
    "empty": ([], "no rows"),
    "no such file": ("nowhere.jsonl", "no file is"),
    "no dict": ([1], "row 0 of type int"),
    "unknown columns": ([{"body": "x"}], "columns body"),
    "not finite": ([{"input_ids": [3, 4], "weight": [float("nan")]}], "not finite"),
    "foreign token": ([{"input_ids": [3, 999]}], "vocabulary of 64"),
    "negative token": ([{"input_ids": [3, -100]}], "token -100 in row 0"),
    "foreign label": ([{"input_ids": [3, 4], "labels": [-100, 64]}], "label 64 of row 0"),
    "no text": ([{"text": "1"}, {"text": None}], r"None, a NoneType, where text belongs \(row 1\)"),
    "empty text": ([{"text": "1"}, {"text": ""}], "row 1, whose text is empty"),
    "a prompt of a number": ([{"prompt": 3, "completion": "y"}], "3, a int"),
    "an answer of a number": ([{"prompt": "x", "completion": 3}], "3, a int"),
    "messages that are none": ([{"messages": "hi"}], "messages of row 0, 'hi'"),
    "messages without a role": ([{"messages": [{"content": "x"}]}], "each with role and content"),
    "messages as pairs": ([{"messages": [["user", "x"]]}], "each with role and content"),
    "labels of another length": ([{"input_ids": [3, 4, 5], "labels": [3, 4]}], r"labels of shape \(2,\) .* in row 0"),
    "empty answer": ([{"prompt": "x" * 70, "completion": "y"}], "cut off"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_named(case, llama):
    data, words = BAD[case]
    with pytest.raises(RequestError, match=words) as error:
        as_batches(data, llama, processing_class=T, max_length=64)
    assert error.value.expected
    assert error.value.do


@pytest.mark.parametrize("more", [{"batch_size": 0}, {"limit": 0}, {"limit": -1}, {"max_length": -1}])
def test_batches_of_nothing_are_refused(more, llama):
    with pytest.raises(RequestError, match="at least 1"):
        as_batches(ROWS, llama, processing_class=T, **more)


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_outside_of_the_classes_is_named(label):
    rows = [{"text": "1", "label": 0}, {"text": "2", "label": label}]
    with pytest.raises(RequestError, match=f"label {label} of row 1"):
        as_batches(rows, pico("bert"), processing_class=T)


def test_raw_data_without_a_tokenizer_and_broken_files(tmp_path, llama):
    with pytest.raises(RequestError, match="no tokenizer"):
        as_batches(ROWS, llama)
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\nnonsense\n')
    with pytest.raises(RequestError, match="line 2"):
        read_rows(tmp_path / "d.jsonl")
    np.savez(tmp_path / "d.npz", a=np.zeros(2), b=np.zeros(3))
    with pytest.raises(RequestError, match="lengths"):
        read_rows(tmp_path / "d.npz")
    np.savez(tmp_path / "o.npz", a=np.array([object()], dtype=object))
    with pytest.raises(RequestError, match="pickled objects are never read"):
        read_rows(tmp_path / "o.npz")


def test_tokens_alone_are_filled_up_with_the_padding_token():
    model = pico("llama", pad_token_id=7)
    columns = ("input_ids", "labels", "attention_mask", "completion_mask", "position_ids")
    rows = [{k: torch.ones(n, dtype=torch.long) for k in columns} for n in (2, 3)]
    (batch,) = as_batches(rows, model)
    assert {k: int(v[0, 2]) for k, v in batch.items()} == {**dict.fromkeys(columns, 0), "input_ids": 7, "labels": -100}


def test_an_answer_is_written_in_the_tokens_of_the_target():
    """As tokenizers for translation do, whose two languages differ."""

    class Two:
        eos_token_id = 2

        def __call__(self, text=None, text_target=None, **how):
            return {"input_ids": [9, 2] if text is None else [5, 6, 2]}

    for row in ({"source": "a", "target": "b"}, {"prompt": "a", "completion": "b"}):
        (made,) = as_dataset([row], pico("t5"), processing_class=Two())
        assert (made["input_ids"].tolist(), made["labels"].tolist()) == ([5, 6, 2], [9, 2])


def test_labels_that_are_wide_numbers_are_brought_to_float32():
    (made,) = as_dataset([{"text": "abc", "label": np.float64(1.5)}], pico("bert"), processing_class=T)
    assert made["labels"].dtype == torch.float32


def test_labels_are_classes_the_model_has_or_numbers():
    bert = pico("bert", num_labels=3)
    with pytest.raises(RequestError, match=r"label 3 of row 1; expected a number from 0 to 2"):
        as_batches([{"input_ids": [3, 4], "labels": n} for n in (2, 3)], bert)
    bert.config.problem_type = "regression"
    assert as_batches([{"input_ids": [3, 4], "labels": 3}], bert)[0]["labels"].tolist() == [3]


def test_the_answers_of_a_multiple_choice_are_one_row():
    from transformers import BertConfig, BertForMultipleChoice

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForMultipleChoice(BertConfig(vocab_size=16, **sizes)).eval()
    rows = [{"input_ids": torch.randint(3, 16, (2, 5)), "labels": torch.tensor(i)} for i in (0, 1, 1)]
    (batch,) = as_batches(rows, model)
    assert batch["input_ids"].shape == (3, 2, 5)
    assert model(**batch).logits.shape == (3, 2)


def test_masks_of_masked_language_modelling_depend_on_row_and_seed_alone():
    mlm = pico("bert")
    mlm.__class__ = type("BertForMaskedLM", (type(mlm),), {})
    rows = [{"text": "the quick brown fox jumps over it"}] * 2
    a, b = as_dataset(rows, mlm, processing_class=T), as_dataset(rows, mlm, processing_class=T)
    assert all(torch.equal(x["input_ids"], y["input_ids"]) for x, y in zip(a, b))
    assert not torch.equal(a[0]["labels"], a[1]["labels"])
    assert not torch.equal(a[0]["labels"], as_dataset(rows, mlm, processing_class=T, seed=1)[0]["labels"])
    assert int((a[0]["labels"] != -100).sum()) == round(0.15 * len(a[0]["labels"]))
    (batch,) = as_batches(rows, mlm, processing_class=T, seed=1)
    assert torch.equal(batch["labels"][0], as_dataset(rows, mlm, processing_class=T, seed=1)[0]["labels"])


def test_models_load_from_folders_with_their_own_tokenizer(tmp_path, llama):
    llama.save_pretrained(tmp_path / "m")
    T.save_pretrained(tmp_path / "m")
    found = load_model(tmp_path / "m")
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), llama.state_dict().values()))
    assert len(as_batches(ROWS, found)) == 1
    assert load_model(tmp_path / "m", dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(llama) is llama


def test_models_that_cannot_be_had_are_named(tmp_path, llama):
    llama.save_pretrained(tmp_path / "model")
    for bad, words in {
        str(tmp_path / "modle"): "did you mean 'model'",
        str(tmp_path): "config.json",
        "nobody/nothing": "Hub",
    }.items():
        with pytest.raises(RequestError, match=words):
            load_model(bad)
    with pytest.raises(RequestError, match="dtype"):
        load_model(tmp_path / "model", dtype="int7")
    with pytest.raises(RequestError, match="live model"):
        load_model(llama, revision="main")
    with pytest.raises(RequestError, match="revision 'main' of the folder"):
        load_model(tmp_path / "model", revision="main")
    with pytest.raises(RequestError, match="SequenceClassification"):
        load_model(tmp_path / "model", head="SequenceClasification")
    made = load_model(tmp_path / "model", head="SequenceClassification", num_labels=5)
    assert made.score.weight.shape[0] == 5
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(llama.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(RequestError, match="pickled weights are never read"):
        load_model(tmp_path / "model")


def test_a_hub_id_without_a_connection_is_named_at_once_unless_it_is_in_the_cache(tmp_path, monkeypatch, llama):
    """The Hub's library asks six times for a file it does not have, and waits half a minute in between."""
    import datasets
    import huggingface_hub
    import transformers
    from huggingface_hub import constants

    class ConnectError(Exception):
        """As the library's own, which has this name too."""

    def unreachable(url):
        raise ConnectError(url)

    asked = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **more: asked.append(name) or ROWS)
    for kind in ("AutoConfig", "AutoTokenizer"):
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", lambda name, **more: asked.append(name))
    for wrong in (
        lambda: load_model("nobody/modle"),
        lambda: read_rows("nobody/rows"),
        lambda: as_batches(ROWS, llama, processing_class="nobody/modle"),
    ):
        with pytest.raises(RequestError, match="nobody/"):
            wrong()
    assert asked == []
    (tmp_path / "datasets--nobody--rows").mkdir()
    assert read_rows("nobody/rows") == ROWS
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: None)
    processor_for(llama, "nobody/modle")
    assert asked == ["nobody/rows", "nobody/modle"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: [], "a JSON list"),
        (lambda config: {**config, "hidden_size": "big"}, "cannot read .*hidden_size"),
        (lambda config: {**config, "intermediate_size": 40}, "other shapes than its config says"),
    ],
)
def test_a_config_that_does_not_fit_is_named(change, words, tmp_path, llama):
    llama.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(change(config)))
    with pytest.raises(RequestError, match=f"(?s){words}"):
        load_model(tmp_path)


def test_a_graft_and_nothing_in_the_place_of_a_model_are_named(tmp_path):
    (tmp_path / "graft.json").write_text("{}")
    with pytest.raises(RequestError, match="a graft's folder stands behind its base"):
        load_model(tmp_path)
    with pytest.raises(RequestError, match="an empty name"):
        load_model("")


def test_sounds_are_samples_at_the_processor_s_rate(tmp_path):
    from transformers import WhisperFeatureExtractor

    processor, model = WhisperFeatureExtractor(feature_size=8), pico("ast")
    for audio, words in (
        ("a.wav", "row 0, 'a.wav'"), ({"array": np.zeros(80), "sampling_rate": 8000}, "8000 samples a second"),
        ({"path": "a.wav"}, "row 0, None"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=words):
            as_batches([{"audio": audio, "label": 0}], model, processing_class=processor)


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("family", ["hubert", "wav2vec2"])
def test_the_statistics_of_sounds_do_not_depend_on_the_batch(family, norm):
    """A norm over time sees padding, which no mask tells of; each convolution has frames of its own."""
    from transformers import Wav2Vec2FeatureExtractor

    model, noise = pico(family, feat_extract_norm=norm), torch.Generator().manual_seed(0)
    processor = Wav2Vec2FeatureExtractor(return_attention_mask=norm == "layer")
    rows = [{"audio": torch.randn(n, generator=noise).tolist(), "label": 1} for n in (156, 100, 60, 60)]
    units = {n: s for kind in ("channel", "neuron") for n, s in sites(model, kind).items()}

    def seen(batch_size):
        batches = [
            {k: v for k, v in b.items() if k != "labels"}
            for b in as_batches(rows, model, processing_class=processor, batch_size=batch_size)
        ]
        sums = dict.fromkeys(units, 0.0)

        def read(name, x):
            sums[name] = sums[name] + x.double().sum(0)

        with watch(model, units, read) as found, torch.no_grad():
            for batch in batches:
                model(**batch)
        return sums, dict(found.tokens), len(batches)

    alone, counts, _ = seen(1)
    together, same, batches = seen(4)
    assert batches == (3 if norm == "group" else 1)
    assert same == counts
    frames = {n: counts[f"{family}.feature_extractor.conv_layers.{n}.conv/channel"] for n in (0, 1)}
    lengths = [((n - 8) // 4 + 1) for n in (156, 100, 60, 60)]
    assert frames == {0: sum(lengths), 1: sum((n - 4) // 2 + 1 for n in lengths)}
    for name in units:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-4, atol=1e-4)


def test_pictures_that_are_not_there_and_broken_lines_are_named(tmp_path):
    from transformers import ViTImageProcessor

    with pytest.raises(RequestError, match=r"'no\.png' of row 0, where no file is"):
        as_batches([{"image": "no.png", "label": 1}], pico("vit"), processing_class=ViTImageProcessor())
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(RequestError, match=r"line 2 of .*is no JSON \(Expecting value.*mend or delete line 2"):
        read_rows(tmp_path / "b.jsonl")


@pytest.mark.parametrize(("row", "family"), [({"audio": [0.0] * 80}, "ast"), ({"image": [[[0.0]]]}, "vit")])
def test_a_tokenizer_reads_no_sound_and_no_picture(row, family):
    with pytest.raises(RequestError, match=r"of row 0 and a \w+, which reads text"):
        as_batches([{**row, "label": 0}], pico(family), processing_class=T)


@pytest.mark.parametrize("text", ["{", "not json", '{"model": {"type": "nonsense"}}'])
def test_a_broken_tokenizer_is_named_and_not_taken_for_none(text, tmp_path):
    llama = pico("llama")
    llama.save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert processor_for(model) is None
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(RequestError, match=r"tokenizer\.json, which cannot be read"):
        processor_for(model)


def test_a_label_that_no_position_predicts_teaches_nothing():
    """Of a causal model the first token is asked of nobody: a row with that label alone is left out."""
    tokens = torch.tensor([[5, 6, 7], [5, 6, 7], [5, 6, 7]])
    labels = torch.tensor([[5, -100, -100], [-100, 6, -100], [-100, -100, -100]])
    given = Given([{"input_ids": tokens, "labels": labels}], [])
    kept, left_out = given.labelled(pico("llama"))
    assert left_out == 2
    assert kept.batches[0]["labels"].tolist() == [[-100, 6, -100]]
