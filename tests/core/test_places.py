"""Places in prompts, by hand."""

import torch

from neurograft.core.prompts.places import answers, ends, place


def test_a_mention_lies_before_the_query_and_what_is_behind_it_before_the_end():
    once, twice = torch.tensor([[5, 9, 6, 8, 7, 1]]), torch.tensor([[5, 9, 6, 8, 5, 1]])
    assert place({"input_ids": once}, "mention", query="end-1").at.tolist() == [-1]  # not the query itself
    for shift, at in ((0, 0), (1, 1), (5, 5), (6, -1), (-1, -1)):
        word = f"mention{shift:+d}" if shift else "mention"
        assert place({"input_ids": twice}, word, query="end-1").at.tolist() == [at]


def test_the_end_is_before_the_answer_or_the_last_real_token():
    tokens = torch.tensor([[3, 4, 5, 6], [0, 4, 5, 6], [4, 5, 6, 0]])
    real = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0]])
    labels = torch.tensor([[-100, -100, 5, 6], [-100, -100, -100, 6], [-100, -100, -100, -100]])
    batch = {"input_ids": tokens, "attention_mask": real, "labels": labels}
    assert ends(batch).tolist() == [1, 2, 2]
    assert ends({"input_ids": tokens, "attention_mask": real}).tolist() == [3, 3, 2]
    assert answers({k: v[:2] for k, v in batch.items()}).tolist() == [5, 6]
    assert place(batch, "end-2").at.tolist() == [-1, -1, 0]  # padding is no place
