"""The verb `edit`: requests as people write them, what the card says, sequences, the command line, bad requests."""

import json

import numpy as np
import pytest
import torch
from tests._command import command

import neurograft as ng
from neurograft.anatomy.sites import sites
from neurograft.core.context import Context
from neurograft.core.prompts.requests import Request, joined
from neurograft.core.selection import Selection
from neurograft.core.taps.tap import watch
from neurograft.edits._amplified import amplified, mask_of
from neurograft.edits._memory import at_subjects, memories
from neurograft.edits._protected import covariances, earlier_requests
from neurograft.edits._values import wanted
from neurograft.edits.nmke import WIDTH
from neurograft.pipeline._edited import answered, said
from neurograft.pipeline.encode import encode
from neurograft.pipeline.requests import as_request, as_requests
from neurograft.worlds.letters import letters
from neurograft.worlds.pico import pico

BY = ("nmke", {"mask": "none", "null": None, "weight": 0.1, "layers": [0], "steps": 3, "lr": 0.5})
ROWS = [
    {"prompt": "ab is ", "subject": "ab", "target_new": "xy", "rephrase": "so ab is ", "locality": ["cd is ", "q"]},
    {"prompt": "who is cd? ", "subject": "cd", "target_new": "z"},
]


TOKENS = [{"prompt": [5, 6, 7, 8], "subject": [6], "target_new": [9, 11]}, {"prompt": [15, 16, 17], "target_new": [4]}]


def row(**change):
    return {k: v for k, v in {**ROWS[0], **change}.items() if v is not None}


def test_requests_become_tokens_with_the_subjects_last_one():
    tokenizer, model = letters(), pico("llama")
    first, second = as_requests(ROWS, model, tokenizer, contexts=["m. "])
    assert tokenizer.decode(first.prompts[0]) == "ab is "
    assert tokenizer.decode(first.prompts[1]) == "m. ab is "
    assert [tokenizer.decode(p[a]) for p, a in zip(first.prompts, first.at)] == ["b", "b"]
    assert second.at == (8, 11)
    assert tokenizer.decode(first.target) == "xy"
    assert first.end == tokenizer.eos_token_id
    assert as_request(row(subject=None), model, tokenizer, 0).at == (5,)
    assert as_request({"prompt": [7, 8, 9], "subject": [8], "target_new": [4]}, model, None, 0).at == (1,)
    again = Request.from_dict(json.loads(json.dumps(first.as_dict())))
    assert (again.prompts, again.at, again.target) == (first.prompts[:1], first.at[:1], first.target)


@pytest.mark.parametrize("kind", [torch.tensor, np.array, tuple, lambda ids: [np.int64(i) for i in ids]])
def test_tokens_may_come_in_any_series_and_the_card_stays_plain(kind, tmp_path):
    row = {"prompt": kind([5, 6, 7]), "subject": kind([6]), "target_new": kind([9]), "locality": [kind([8]), kind([9])]}
    graft = ng.edit(pico("llama"), [row], by=BY)
    assert graft.card["requests"][0]["prompt"] == [5, 6, 7]
    assert ng.Graft.load(graft.save(tmp_path / "edit")).card["requests"] == graft.card["requests"]


def test_a_subject_in_a_context_is_not_the_prompts():
    found = as_request(row(), pico("llama"), letters(), 0, contexts=["ab, "])
    assert found.at == (1, 5)


def spaced():
    """A tokenizer of the SentencePiece kind: characters, a mark for spaces, and one before every text."""
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", "_", *"abcdefghijklmnopqrstuvwxyzé"])}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_a_target_has_the_tokens_it_has_behind_its_prompt():
    """On its own such a tokenizer puts a space before it."""
    tokenizer, model = spaced(), pico("llama")
    whole = tokenizer("ab cd xy")["input_ids"]
    for prompt, target in (("ab cd", " xy"), ("ab c", "d xy")):
        found = as_request({"prompt": prompt, "target_new": target}, model, tokenizer, 0)
        assert [*found.prompts[0], *found.target] == whole
        row = {"prompt": prompt, "completion": target}
        made = encode(row, model, tokenizer, max_length=64, index=0)
        assert made["input_ids"].tolist() == [*whole, tokenizer.eos_token_id]
        assert made["labels"].tolist() == [-100] * len(found.prompts[0]) + [*found.target, tokenizer.eos_token_id]
        assert encode(row, model, tokenizer, max_length=len(found.prompts[0]) + 1, index=0)["labels"][-1] > 2
    assert tokenizer(" xy", add_special_tokens=False)["input_ids"] != list(found.target)[1:]


def test_a_subject_is_a_word_of_its_own_where_it_stands_as_one():
    tokenizer, model = spaced(), pico("llama")

    def at(prompt, subject):
        found = as_request({"prompt": prompt, "subject": subject, "target_new": "x"}, model, tokenizer, 0)
        return tokenizer.convert_ids_to_tokens(list(found.prompts[0][: found.at[0] + 1]))

    assert "".join(at("bart likes art", "art")) == "_bart_likes_art"
    assert "".join(at("art is art", "art")) == "_art"
    assert "".join(at("bart likes it", "art")) == "_bart"
    assert "".join(at("the café is", "café ")) == "_the_café"


def test_answers_are_read_as_the_model_generates_them():
    model, tokenizer = pico("llama"), letters()
    (request,) = as_requests(ROWS[:1], model, tokenizer)
    prompt = torch.tensor([request.prompts[0]])
    own = model.generate(prompt, max_new_tokens=2, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :].tolist()
    asked = [
        Request(request.prompts, request.at, tuple(own)),
        Request(request.prompts, request.at, (own[0], own[1] ^ 1)),
    ]
    assert answered(model, asked).tolist() == [True, False]
    assert said(model, asked).tolist() == [own[0]] * 2


def test_the_card_says_what_was_asked_and_what_came_of_it():
    model = pico("llama")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    graft = ng.edit(model, ROWS, by=BY, processing_class=letters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert [r["subject"] for r in graft.card["requests"]] == ["ab", "cd"]
    assert {"reliability", "rephrase", "locality", "by", "seed"} <= set(graft.card)
    with graft.on(model):
        requests = as_requests(ROWS, model, letters())
        assert graft.card["reliability"] == float(answered(model, requests).float().mean())


def test_one_edit_after_another():
    model, tokenizer = pico("llama"), letters()
    first = ng.edit(model, ROWS[:1], by=BY, processing_class=tokenizer)
    second = ng.edit(model, ROWS[1:], by=BY, processing_class=tokenizer, after=first)
    assert second.card["after"] == [first.identity]
    with first.on(model):
        live = ng.edit(model, ROWS[1:], by=BY, processing_class=tokenizer)
    assert live.identity == second.identity
    assert second.identity != ng.edit(model, ROWS[1:], by=BY, processing_class=tokenizer).identity
    both = ng.edit(model, ROWS, by=BY, processing_class=tokenizer, batch=1)
    total = first + second
    for name, delta in both.deltas.items():
        torch.testing.assert_close(delta.product(), total.deltas[name].product())


def test_a_graft_survives_its_folder_and_comes_off(tmp_path):
    model = pico("llama")
    graft = ng.edit(model, ROWS, by=BY, processing_class=letters())
    same = ng.Graft.load(graft.save(tmp_path / "edit"))
    assert same.identity == graft.identity


def test_an_edit_is_taken_back_by_its_place_or_its_words(tmp_path):
    graft = ng.edit(pico("llama"), ROWS, by=BY, processing_class=letters())
    folder = graft.save(tmp_path / "edit")
    rest = [ng.rollback(folder, which) for which in (0, "0", ["ab"], [ROWS[0]["prompt"]])]
    assert [[r["subject"] for r in g.card["requests"]] for g in rest] == [["cd"]] * 4
    assert len({g.identity for g in rest}) == 1
    for name, delta in rest[0].deltas.items():
        whole = graft.deltas[name]
        assert torch.equal(delta.A, whole.A[1:])
        assert torch.equal(delta.B, whole.B[:, 1:])
    for bad, words in ((2, "counted from 0"), ("aab", "did you mean"), ([0, 1], "some from 0")):
        with pytest.raises(ng.RequestError, match=words):
            ng.rollback(graft, bad)


def test_edits_whose_words_are_digits_are_taken_back_by_their_words():
    asked = [{"prompt": p, "target_new": "x"} for p in ("1984", "1", "zero")]
    graft = ng.edit(pico("llama"), asked, by=BY, processing_class=letters())

    def rest(edits):
        return [r["prompt"] for r in ng.rollback(graft, edits).card["requests"]]

    assert rest("1984") == ["1", "zero"]
    assert rest("1") == ["1984", "zero"]
    assert rest(("0", 2)) == ["1"]
    asked[1]["prompt"] = "0"
    graft = ng.edit(pico("llama"), asked, by=BY, processing_class=letters())
    for bad, words in (("0", "place of one.*words of another"), ([], "no edit"), ("²", "did|choose"), (1.5, "1.5")):
        with pytest.raises(ng.RequestError, match=words):
            ng.rollback(graft, bad)
    assert rest(0) == ["0", "zero"]


def test_a_sum_of_edits_keeps_all_requests_and_gives_none_back():
    """Of two edits in two layers each has as many ranks as the other: their numbers cannot be told apart."""
    model, other = pico("llama"), ("nmke", {**BY[1], "layers": [1]})
    first, second = (ng.edit(model, ROWS, by=by, processing_class=letters()) for by in (BY, other))
    both = first + second
    assert len(both.card["requests"]) == 4
    with pytest.raises(ng.RequestError, match="sum of grafts"):
        ng.rollback(both, [0])
    with both.on(model):
        assert len(earlier_requests(model)) == 4


def test_an_edit_by_data_lies_on_earlier_ones_and_takes_nothing_it_would_not_read():
    model = pico("llama")
    single = sites(model, "weight", match="*down_proj*")
    where = Selection.of(single, {name: [0] for name in single})
    first = ng.edit(model, ROWS[:1], by=BY, processing_class=letters())
    assert ng.edit(model, None, by="shut", where=where, after=first).card["after"] == [first.identity]
    for options, words in (({"general": ROWS}, "general"), ({"batch": 2}, "batch"), ({"contexts": ["a "]}, "contexts")):
        with pytest.raises(ng.RequestError, match=f"{words} for .*reads no requests"):
            ng.edit(model, None, by="shut", where=where, **options)
    heads = sites(model, "head")
    where = Selection.of(heads, {next(iter(heads)): [0]})
    with pytest.raises(ng.RequestError, match="0 batches"):
        ng.edit(model, None, by=("tarot", {"metric": "logit"}), where=where)


@pytest.mark.parametrize("by", [BY, "locft_bf", ("locft_bf", {"separate": True})])
def test_a_loss_that_is_no_number_is_an_error(by):
    model = pico("llama")
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ng.RunError, match="not finite"):
        ng.edit(model, TOKENS, by=by)
    assert all(torch.equal(p.nan_to_num(), before[n].nan_to_num()) for n, p in model.named_parameters())


BAD = {
    "no target": (row(target_new=None), "target_new"),
    "neither prompt nor target": ({"text": "x"}, "request 0 with text"),
    "an empty prompt": (row(prompt=""), "empty text"),
    "a subject elsewhere": (row(subject="nobody"), "words of the prompt"),
    "a foreign token": ({"prompt": [5, 999], "target_new": [4]}, "vocabulary"),
    "a number": (row(target_new=1984), "1984.*in quotes"),
    "text and tokens": ({"prompt": [5, 6], "target_new": "x"}, "all of them"),
    "a negative token": ({"prompt": [5, -6], "target_new": [4]}, "token -6"),
    "words among tokens": ({"prompt": [5, 6], "subject": "b", "target_new": [4]}, "subject 'b'.*tokens that stand"),
    "an empty subject": (row(subject=" "), "words of the prompt"),
    "a scattered subject": ({"prompt": [5, 6, 7], "subject": [5, 7], "target_new": [4]}, "side by side"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_named(name):
    request, words = BAD[name]
    with pytest.raises(ng.RequestError, match=words):
        ng.edit(pico("llama"), [request], by=BY, processing_class=letters())


@pytest.mark.parametrize("family", ["falcon", "gpt_neox", "gpt2", "opt", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_that_is_made_brings_the_stream_where_it_was_wanted(family, dtype):
    """Which families can be edited is measured, not listed; those that can be are edited rightly."""
    model = pico(family, dtype=dtype)
    requests = as_requests(TOKENS, model, None)
    (memory,) = memories(Context(model, sites(model, "neuron"), []), [0], (0, 1))
    rows, stream = joined(requests), {"s": memory.stream}
    start = at_subjects(model, stream, rows)["s"]
    how = {"steps": 5, "lr": 0.5, "clamp": 0.75, "decay": 0.5, "kl": 0.0625}
    goal = wanted(model, memory, requests, **how)
    graft = ng.edit(model, TOKENS, by=("nmke", {"mask": "none", "null": None, "ridge": 1e-9, "exact": True, **how}))
    with graft.on(model):
        there = at_subjects(model, stream, rows)["s"]
    assert float((there - goal).norm()) < (1e-4 if dtype == torch.float32 else 0.05) * float((start - goal).norm())


def test_a_selection_of_neurons_that_are_all_masked_is_named():
    model = pico("llama")
    context = Context(model, sites(model, "neuron"), [], requests=as_requests(TOKENS, model, None))
    (memory,) = memories(context, [0], (0, 1))
    spoken = mask_of(amplified(model, memory, joined(context.requests), gain=30 * memory.keys.n / WIDTH))
    silent = (~spoken).nonzero()[:, 0]
    where = Selection.of(context.sites, {memory.keys.name: silent})
    with pytest.raises(ng.RequestError, match="all masked"):
        ng.edit(model, TOKENS, by=("nmke", {"null": None, "layers": [0], "steps": 1}), where=where)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_many_requests_are_read_some_at_a_time_with_the_same_numbers(family):
    model, passes = pico(family), []
    requests = as_requests([{"prompt": [5 + i % 50, 7, 3], "target_new": [9]} for i in range(70)], model, None)
    context = Context(model, sites(model, "neuron"), [], requests=requests)
    (memory,) = memories(context, [0], (0, 1))
    hook = model.register_forward_pre_hook(lambda m, a, k: passes.append(len(k["input_ids"])), with_kwargs=True)
    keys = at_subjects(model, {"k": memory.keys}, joined(requests))["k"]
    held = covariances(context, [memory])[memory.keys.name]
    hook.remove()
    assert max(passes) == 64
    one = [at_subjects(model, {"k": memory.keys}, joined([r]))["k"] for r in requests]
    torch.testing.assert_close(keys, torch.cat(one))
    seen = []
    tokens = torch.tensor([r.prompts[0][:2] for r in requests])
    with watch(model, {"k": memory.keys}, lambda _, x: seen.append(x.double())):
        model(tokens)
    torch.testing.assert_close(held, seen[0].T @ seen[0] / len(seen[0]), rtol=1e-4, atol=1e-9)


def test_the_lens_has_no_part_of_the_stream_that_a_norm_takes_out(monkeypatch):
    """Under a norm that subtracts the mean, a constant written by a neuron says nothing; in chunks as at once."""
    model = pico("gpt_neox")
    name = "gpt_neox.layers.0.mlp.dense_4h_to_h.weight"
    with torch.no_grad():
        model.get_parameter("gpt_neox.final_layer_norm.weight")[0] = 0.0
        model.get_parameter(name).mul_(10).add_(1.0)
    requests = as_requests(TOKENS, model, None)
    (memory,) = memories(Context(model, sites(model, "neuron"), []), [0], (0, 1))
    first = amplified(model, memory, joined(requests), gain=30.0)
    monkeypatch.setattr("neurograft.edits._amplified.CHUNK", 7)
    torch.testing.assert_close(amplified(model, memory, joined(requests), gain=30.0), first)
    with torch.no_grad():
        model.get_parameter(name)[:, 3] += 5.0
        moved = amplified(model, memory, joined(requests), gain=30.0)
    assert bool(first.abs().gt(1e-3).any())
    torch.testing.assert_close(moved[:, 3], first[:, 3], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama", {"batch": 0}, "at least 1"),
        ("llama", {"layers": [9]}, "layers from 0"),
        ("llama", {"by": "nmk"}, "nmke"),
        ("llama", {"by": ("nmke", {"mask": "some"})}, "mask"),
        ("mixtral", {}, "without experts"),
        ("gemma2", {}, "does not reach the stream.*without a norm"),
        ("olmo2", {}, "does not reach the stream"),
        ("t5", {}, "a causal language model"),
        ("bert", {"by": "locft_bf"}, "a causal language model"),
        ("llama", {"by": ("nmke", {"steps": 0})}, "steps=0.*at least 1"),
        ("llama", {"by": ("locft_bf", {"epochs": 0})}, "epochs=0"),
        ("llama", {"by": ("locft_bf", {"together": 0})}, "together=0"),
        ("llama", {"by": ("locft_bf", {"sweep": -2})}, "sweep=-2"),
    ],
)
def test_bad_edits_are_named(family, options, words):
    with pytest.raises(ng.RequestError, match=words):
        ng.edit(pico(family), ROWS, **{"by": BY, "processing_class": letters(), **options})


def test_the_command_line_edits_and_says_how_far_it_came(tmp_path):
    pico("llama").save_pretrained(tmp_path / "model")
    letters().save_pretrained(tmp_path / "model")
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    words = ["edit", tmp_path / "model", tmp_path / "asked.jsonl", "--by", "nmke:mask=none,steps=2", "--layers", "0"]
    words += ["--batch", "1", "--json", "-o", tmp_path / "graft"]
    status, out, errors = command(*words)
    assert status == 0, errors
    found = json.loads(out)
    assert found["requests"] == 2
    assert set(found) >= {"reliability", "rephrase", "locality", "path"}
    assert ng.Graft.load(tmp_path / "graft").identity == found["identity"]
    status, _, errors = command("rollback", tmp_path / "graft", "ab", "--json", "-o", tmp_path / "rest")
    assert status == 0, errors
    assert ng.Graft.load(tmp_path / "rest").identity == ng.rollback(tmp_path / "graft", 0).identity
