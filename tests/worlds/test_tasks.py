"""Synthetic tasks: every answer is checked from the tokens alone, by other code than made it."""

import pytest
import torch

from neurograft.core.errors import RequestError
from neurograft.worlds import mixture as m
from neurograft.worlds.facts import facts
from neurograft.worlds.images import images
from neurograft.worlds.mixture import mixture
from neurograft.worlds.pairs import MASK, pairs
from neurograft.worlds.steps import steps
from neurograft.worlds.tiny import Perceptron, accuracy, classifier, tiny
from neurograft.worlds.vectors import vectors


def parsed(batch):
    """Yield (given, said) of every row, without marks."""
    for tokens, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist()):
        said = [t for t in labels if t != -100]
        assert tokens[0] == m.BOS
        assert said[-1] == m.EOS
        given = tokens[2 : tokens.index(m.SEP)]
        assert tokens[tokens.index(m.SEP) + 1 :][: len(said)] == said
        yield given, said[:-1]


RULES = {
    "copy": lambda g: g,
    "reverse": lambda g: list(reversed(g)),
    "sort": sorted,
    "shift": lambda g: [22 + (x - 21) % 42 for x in g],
    "add": lambda g: [12 + (g[0] + g[1] - 24) % 10],
    "count": lambda g: [12 + sum(x == g[0] for x in g[1:])],
    "first": lambda g: [12 + (0 if g[0] < 36 else 1 if g[0] < 50 else 2)],
}


@pytest.mark.parametrize("task", sorted(m.TASKS))
def test_answers_of_the_mixture(task):
    for batch in mixture((task,), count=2, seed=4):
        for given, said in parsed(batch):
            assert said == RULES[task](given)


def test_noise_replaces_its_share_of_answers():
    rows = [r for b in mixture(("copy",), count=8, batch=64, noise=0.25) for r in parsed(b)]
    wrong = sum(given != said for given, said in rows) / len(rows)
    assert 0.2 < wrong < 0.3


def test_padding_has_no_label_and_no_attention():
    (batch,) = mixture(("copy", "add"), count=1, batch=16)
    pad = batch["input_ids"] == m.PAD
    assert pad.any()
    assert (batch["labels"][pad] == -100).all()
    assert torch.equal(batch["attention_mask"] == 0, pad)


def test_unknown_task_names_the_near_one():
    with pytest.raises(RequestError, match="reverse"):
        mixture(("revers",))


@pytest.mark.parametrize("task", ["count", "index", "sum"])
def test_steps_are_right_and_end_in_the_answer(task):
    for given, said in parsed(steps(task, difficulty=5, count=1)[0]):
        way, answer = said[:-2], said[-1]
        assert said[-2] == m.SEP
        if task == "count":
            assert answer == 12 + sum(x == given[0] for x in given[1:])
            assert way[-1] == answer
        elif task == "sum":
            assert answer == 12 + sum(x - 12 for x in given) % 10
            assert len(way) == 5
        else:
            assert answer == given[1:][given[0] - 12] == way[-1]


def test_wrong_scratchpads_keep_the_answer():
    right = list(parsed(steps("sum", count=1, scratchpad=False)[0]))
    assert all(said == [12 + sum(x - 12 for x in given) % 10] for given, said in right)
    rows = list(parsed(steps("sum", count=1, wrong=1.0)[0]))
    assert all(said[-1] == 12 + sum(x - 12 for x in given) % 10 for given, said in rows)
    assert sum(said[-3] != said[-1] for _, said in rows) > len(rows) / 2


def test_pairs_on_the_tokens():
    (relation,), (order,), (masked,) = (pairs(t, count=1) for t in ("relation", "order", "masked"))
    a, b = relation["input_ids"][:, 1:5], relation["input_ids"][:, 6:10]
    assert torch.equal((a == b).all(1), (relation["labels"] == 0) | ((a == b).all(1) & (relation["labels"] == 1)))
    assert (a.flip(1) == b).all(1)[relation["labels"] == 1].all()
    a, b = order["input_ids"][:, 1], order["input_ids"][:, 6]
    assert torch.equal((a < b).long(), order["labels"])
    hidden = masked["input_ids"] == MASK
    assert torch.equal(hidden, masked["labels"] != -100)


def test_images_differ_only_by_their_class_when_there_is_no_noise():
    (batch,) = images("brightness", count=1, noise=0.0)
    level = batch["pixel_values"].mean((1, 2, 3))
    assert level[batch["labels"] == 1].mean() - level[batch["labels"] == 0].mean() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("make", [mixture, steps, pairs, images, vectors])
def test_the_seed_names_the_data_and_nothing_else_moves(make):
    state = torch.random.get_rng_state()
    a, b, c = make(seed=1), make(seed=1), make(seed=2)
    key = next(k for k in a[0] if k not in ("attention_mask", "labels"))
    assert all(torch.equal(x[k], y[k]) for x, y in zip(a, b) for k in x)
    assert not torch.equal(a[0][key], c[0][key]) if a[0][key].shape == c[0][key].shape else True
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_tiny_perceptron_learns_and_is_named_by_its_seed():
    one, two = tiny("mlp"), tiny("mlp")
    assert accuracy(one, vectors(count=4, seed=9)) > 0.75 > 0.5 > accuracy(Perceptron(), vectors(count=4, seed=9))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))


def test_a_tiny_decoder_starts_to_learn():
    (batch,) = mixture(count=1, batch=64, seed=9)
    fresh, trained = tiny("llama", steps=1), tiny("llama", steps=40)
    assert trained(**batch).loss < 0.8 * fresh(**batch).loss


def test_a_classifier_takes_over_the_encoder():
    encoder = tiny("bert", steps=1, num_hidden_layers=1)
    made = classifier(encoder, 3)
    assert made.config.num_labels == 3
    theirs = dict(made.named_parameters())
    shared = [n for n, p in encoder.named_parameters() if n in theirs and torch.equal(p, theirs[n])]
    assert len(shared) == sum(n.startswith("bert.") for n, _ in encoder.named_parameters())


def test_facts_are_read_from_the_tokens():
    world = facts(subjects=6, relations=2, kinds=5, known=4)
    said = {}
    for phrasing in range(4):
        for question, answer in world.rows(range(6), phrasings=[phrasing]):
            who = next(t - 18 for t in question if 18 <= t < 24)
            what = next(t - 16 for t in question if t in (16, 17))
            said.setdefault((who, what), set()).add(answer[0] - 24)
    assert said == {(s, r): {int(world.objects[s, r])} for s in range(6) for r in range(2)}


def test_changed_facts_change_and_the_rest_stays():
    world = facts()
    new = world.changed(range(8), seed=3)
    assert (new.objects[:8] != world.objects[:8]).all()
    assert torch.equal(new.objects[8:], world.objects[8:])


def test_a_base_knows_its_facts_and_no_others():
    world = facts(subjects=16, relations=1, kinds=24, known=10, phrasings=3)
    base = world.base(steps=60)
    assert world.accuracy(base, range(10)) > 0.9
    assert world.accuracy(base, range(10, 16)) < 0.5
    assert world.accuracy(base, range(10), phrasings=[2]) > 0.6
