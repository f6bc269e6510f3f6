"""Choices in words: the letters that are read are those the rows teach, whatever the tokenizer does before a word."""

import pytest
import torch

from neurograft.pipeline.encode import encode
from neurograft.worlds.letters import letters
from neurograft.worlds.pico import pico
from neurograft.worlds.preference_words import Words
from neurograft.worlds.preferences import Attribute, Scenario

PENS = Scenario("pens", "Which pen?", (Attribute("price", 0, 10), Attribute("rating", 1, 5)))


def spaced():
    """A tokenizer of the SentencePiece kind, which puts a mark before every text."""
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {t: i for i, t in enumerate(["<unk>", "</s>", "_", "\n", *map(chr, range(33, 91))])}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("make", [spaced, letters])
def test_the_letters_are_the_first_tokens_of_the_taught_answers(make):
    words, model = Words(make()), pico("llama")
    trial = torch.tensor([[2.0, 4.5], [8.0, 3.0]])
    for answer, letter in zip((True, False), words.letters()):
        row = encode(words.decision(PENS, trial, answer), model, words.tokenizer, max_length=2048, index=0)
        at = int((row["labels"] != -100).int().argmax())
        assert row["input_ids"][:at].tolist() == words.decide(PENS, trial)
        assert int(row["labels"][at]) == letter
