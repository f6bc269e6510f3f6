"""`few_shot` given ready batches: examples are counted, not batches, and nothing can be shown before them."""

import pytest
import torch

from neurograft.core.errors import RequestError
from neurograft.pipeline.few_shot import few_shot
from neurograft.worlds.pico import pico, pico_batch


def ready(*sizes):
    """Batches whose every number tells its example: 0, 1, 2, ..."""
    numbers = torch.arange(sum(sizes)).split(list(sizes))
    return [
        {
            "input_ids": n[:, None].expand(-1, 4).clone(),
            "labels": n.clone(),
            "table": torch.arange(7),
            "return_dict": True,
        }
        for n in numbers
    ]


def shown(data, **how):
    return few_shot({"data": data, "common": {"seed": 0}}, **{"shots": [0], **how})["shown"]


@pytest.mark.parametrize(
    ("sizes", "size", "expected"),
    [
        ((3, 2, 4), 4, [3, 1]),
        ((3, 2, 4), 5, [3, 2]),
        ((3, 2, 4), 1, [1]),
        ((3, 2, 4), 9, [3, 2, 4]),
        ((3, 2, 4), 20, [3, 2, 4]),
        ((1, 1), 1, [1]),
    ],
)
def test_as_many_examples_as_asked_for_the_last_batch_cut(sizes, size, expected):
    found = shown(ready(*sizes), size=size)
    assert [len(b["input_ids"]) for b in found] == expected
    assert torch.cat([b["labels"] for b in found]).tolist() == list(range(sum(expected)))
    assert torch.cat([b["input_ids"] for b in found])[:, 0].tolist() == list(range(sum(expected)))


def test_what_has_no_axis_of_examples_stays_whole_and_the_given_batches_too():
    data = ready(3, 2)
    (found,) = shown(data, size=2)
    assert (len(found["table"]), found["return_dict"]) == (7, True)
    assert [len(b["input_ids"]) for b in data] == [3, 2]


def test_batches_of_a_model_go_through_it():
    model = pico("llama")
    (found,) = shown([pico_batch(model, batch=5)], size=3)
    with torch.no_grad():
        assert model(**found).logits.shape[0] == 3


def test_encoded_examples_are_rows():
    rows = [{"input_ids": torch.tensor([i, i]), "labels": torch.tensor(i)} for i in range(4)]
    assert [int(r["labels"]) for r in shown(rows, size=3)] == [0, 1, 2]


@pytest.mark.parametrize("sizes", [(3,), (3, 2, 4)])
def test_shots_before_ready_batches_are_refused_whatever_their_number(sizes):
    """One batch was told to bring more rows, which would not have helped."""
    with pytest.raises(RequestError, match=r"shots before ready batches.*pass shots=\[0\]"):
        shown(ready(*sizes), shots=[0, 2])
