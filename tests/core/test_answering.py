"""What is answered behind a prompt: hand numbers for answers, candidates, pairs and the tokens of a continued text."""

import pytest
import torch

from neurograft.core.errors import RequestError
from neurograft.core.prompts.answering import both, credit, need_causal, paired, said
from neurograft.core.prompts.candidates import candidate_ids, candidate_logits, first_answers
from neurograft.core.prompts.continued import continued, opened
from neurograft.core.prompts.examples import row_digests
from neurograft.core.prompts.places import place
from neurograft.core.prompts.requests import Request, joined
from neurograft.worlds.pico import pico

BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [9, 5, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    "labels": torch.tensor([[-100, -100, 7, 8], [-100, 5, -100, -100]]),
}


def test_the_answer_is_read_where_it_is_predicted():
    model = pico("llama", initializer_range=0.5).eval()
    logits = model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits
    expected = torch.stack([logits[0, 1], logits[1, 0]]).double().log_softmax(-1)
    assert torch.equal(said(model, BATCH), expected)
    assert torch.equal(credit(model, BATCH, "probability"), expected[[0, 1], [7, 5]].exp())
    best = expected.argmax(-1)
    easy = {**BATCH, "labels": torch.tensor([[-100, -100, int(best[0]), 8], [-100, int(best[1]) ^ 1, -100, -100]])}
    assert credit(model, easy, "accuracy").tolist() == [1.0, 0.0]
    with pytest.raises(RequestError, match="causal"):
        need_causal(pico("bert"))


def test_pairs_are_row_for_row():
    assert list(paired([BATCH], [BATCH])) == [(BATCH, BATCH)]
    for clean, other in (([BATCH], []), ([BATCH], [BATCH, BATCH]), ([], [])):
        with pytest.raises(RequestError, match="second prompt"):
            list(paired(clean, other))
    one, two = place(BATCH, "end"), place(BATCH, "end-1")  # the second row's end is its first token
    mine, theirs, at, there = both(BATCH, BATCH, one, two)
    assert mine["input_ids"].tolist() == theirs["input_ids"].tolist() == [[5, 6, 7, 8]]
    assert (at.tolist(), there.tolist()) == ([1], [0])


def test_candidates_stand_where_the_answer_begins():
    at, token = first_answers(BATCH)
    assert (at.tolist(), token.tolist()) == ([2, 1], [7, 5])
    assert candidate_ids([BATCH], [], None).tolist() == [5, 7]
    assert candidate_ids([], [9, 3], None).tolist() == [9, 3]
    logits = torch.arange(2 * 4 * 10).reshape(2, 4, 10)
    found = candidate_logits(logits, BATCH, torch.tensor([5, 7]))
    assert (found.tolist(), found.dtype) == ([[15.0, 17.0], [45.0, 47.0]], torch.float32)
    first = {**BATCH, "labels": torch.tensor([[5, -100, -100, -100], [-100, 5, -100, -100]])}
    for words, ask in {
        "labelled answer": lambda: first_answers(first),  # nothing predicts a row's first token
        "without a labelled": lambda: first_answers({"labels": torch.tensor([1, 2])}),
        "two different": lambda: candidate_ids([], [3, 3], None),
        "at least two": lambda: candidate_ids([], [3], None),
        "no tokenizer": lambda: candidate_ids([], ["yes", "no"], None),
        "which is 3 tokens": lambda: candidate_ids([], ["yes", "no"], Letters()),
    }.items():
        with pytest.raises(RequestError, match=words):
            ask()
    assert candidate_ids([], ["a", "b"], Letters()).tolist() == [97, 98]


class Letters:
    """A tokenizer of letters that closes texts, and opens those that do not begin with a space by one."""

    eos_token_id = 1

    def __call__(self, text, add_special_tokens=True):
        ids = [ord(c) for c in text.lstrip(" ")]
        opening = [2] if add_special_tokens and len(ids) else []
        return {"input_ids": [*opening, *ids, *([1] if add_special_tokens else [])]}


class Merging(Letters):
    """One that makes one token of `ab`."""

    def __call__(self, text, add_special_tokens=True):
        ids = super().__call__(text, add_special_tokens)["input_ids"]
        text = "".join(map(chr, ids)).replace("ab", "\xff")
        return {"input_ids": [ord(c) for c in text]}


def test_a_text_has_the_tokens_it_has_behind_its_prompt():
    assert continued(Letters(), "x", [2, ord("x")], " yz") == (32, 121, 122)
    assert continued(Letters(), "x", [2, 3, ord("x")], " yz") == (121, 122)  # other tokens were asked: its own
    assert continued(Merging(), "xa", [2, ord("x"), ord("a")], "b") == (98,)  # they share a token
    assert continued(Letters(), "x", [2, ord("y")], " z") == (122,)
    assert (opened([4, 1], 1), opened([1, 4], 1), opened([4], None), opened([], 1)) == ((4,), (1, 4), (4,), ())


def test_the_mean_over_each_requests_rows():
    rows = joined([Request(((5,), (6, 7)), (0, 1), (8,)), Request(((9,),), (0,), (8, 8))])
    assert rows.owner.tolist() == [0, 0, 1]
    assert rows.mean(torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 7.0]]), 2).tolist() == [[2.0, 4.0], [5.0, 7.0]]


def test_digests_tell_examples_apart_by_all_that_goes_in():
    ids, images = torch.tensor([[5, 6]]), torch.zeros(2, 1, 3, 3)
    images[1] += 1
    same, other = ({"input_ids": ids, "pixel_values": image[None]} for image in images)
    assert row_digests([same]) == row_digests([{**same, "labels": torch.tensor([1])}])
    assert row_digests([same]) != row_digests([other])  # a question about another picture
    assert row_digests([same]) != row_digests([{"input_ids": ids}])
    plain = {"pixel_values": images, "labels": torch.tensor([0, 1])}
    assert row_digests([plain]) == row_digests([{"pixel_values": images[:1]}, {"pixel_values": images[1:]}])
    features = {"x": images, "labels": torch.tensor([0, 1])}
    assert row_digests([features]) == row_digests([{"x": images}])
    assert len(set(row_digests([features]))) == 2
