"""The box world's answers, read off the tokens by hand."""

import pytest
import torch

from neurograft.core.errors import RequestError
from neurograft.core.prompts.places import answers, place
from neurograft.worlds.boxes import BEHIND, FIRST, HOLDS, LABELS, QUERY, VOCABULARY, boxes, corrupted, counterfactual


def read(row):
    """Return a row's scene as (label, object) pairs, and the label asked for; one query with the word behind."""
    body, label = row[1:-3], row[-3]
    assert row[-2] == HOLDS
    return list(zip(body[::2], body[1::2])), label


def each(side):
    for batch in side:
        for row, wanted in zip(batch["input_ids"].tolist(), answers(batch).tolist()):
            scene, label = read(row)
            assert len(dict(scene)) == len({o for _, o in scene}) == len(scene)
            assert all(FIRST <= a < FIRST + LABELS <= b < VOCABULARY for a, b in scene)
            yield scene, label, wanted


def test_queries_are_answered_by_the_scene():
    for scene, label, wanted in each(boxes(count=2, boxes=5)):
        assert dict(scene)[label] == wanted
    (batch,) = boxes(count=1, queries=3, holds=0.0)
    asked = [t for t in range(batch["input_ids"].shape[1]) if int((batch["labels"][:, t] != -100).sum())]
    assert asked == [10, 12, 14]
    for row in batch["input_ids"].tolist():
        assert all(dict(zip(row[1:9:2], row[2:9:2]))[row[t - 1]] == row[t] for t in asked)
    (batch,) = boxes(count=1)
    behind = batch["input_ids"].gather(1, place(batch, BEHIND, query=QUERY).at[:, None])[:, 0]
    assert torch.equal(behind, answers(batch))


def test_corrupt_prompts_ask_for_what_is_not_there():
    pair = corrupted(count=2)
    assert all(dict(scene)[label] == wanted for scene, label, wanted in each(pair["positive"]))
    assert all(label not in dict(scene) for scene, label, _ in each(pair["negative"]))


@pytest.mark.parametrize("variable", ["position", "label", "object"])
def test_counterfactuals_differ_in_the_variable(variable):
    pair = counterfactual(variable, count=2)
    for (base, asked, wanted), (other, query, answer) in zip(each(pair["positive"]), each(pair["negative"])):
        at, there = [[a for a, _ in s].index(q) for s, q in ((base, asked), (other, query))]
        assert other[there][1] == answer
        if variable == "position":
            assert there != at
            assert base[there][1] == wanted
        elif variable == "label":
            assert query != asked
            assert {a for a, _ in base} == {a for a, _ in other}
            assert dict(base)[query] == wanted
        else:
            assert there == at
            assert wanted == answer


def test_bad_requests():
    with pytest.raises(RequestError, match="12 boxes"):
        boxes(boxes=12)
