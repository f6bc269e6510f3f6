"""How often locators run the model, and what they hold: counts, never times."""

import pytest
import torch

from neurograft.anatomy.sites import sites
from neurograft.core.choose import choose
from neurograft.core.compact.meter import Peak
from neurograft.core.context import Context
from neurograft.core.taps.exemplars import exemplify
from neurograft.core.taps.stream import _pooled
from neurograft.core.units import Parameters
from neurograft.worlds.pico import pico, pico_batch


@pytest.fixture
def llama():
    return pico("llama")


def counting(model):
    """A list that gets, at every pass of a model, whether gradients are on and whether a parameter asks for one."""
    found = []
    asks = lambda: any(p.requires_grad for p in model.parameters())  # noqa: E731
    model.register_forward_pre_hook(lambda m, a: found.append((torch.is_grad_enabled(), asks())))
    return found


def prompts(model, count):
    """Batches of a row whose last token is the answer."""
    found = [pico_batch(model, batch=1, seed=seed) for seed in range(count)]
    for batch in found:
        batch["labels"][:, :-1] = -100
    return found


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_mask_over_heads_reads_the_other_prompts_once_and_asks_no_weight_for_a_gradient(llama, epochs):
    passes, rows = counting(llama), prompts(llama, 8)
    given = Context(llama, sites(llama, "head"), rows[:4], rows[4:])
    choose("locators", "dcm", epochs=epochs, batch_size=1)(given)
    # of four pairs two train and two tell the accuracy
    assert len(passes) == 2 + 2 * epochs + 2 * 2
    assert not any(grad and asks for grad, asks in passes)
    assert sum(grad for grad, _ in passes) == 2 * epochs


def test_the_end_of_a_path_is_measured_once_for_all_sites(llama):
    passes, where = counting(llama), sites(llama, "neuron")
    given = Context(llama, where, [pico_batch(llama, seed=s) for s in range(3)], asked=choose("objectives", "auto"))
    choose("locators", "integrated_gradients", steps=4)(given)
    assert len(passes) == 3 * (1 + len(where) * (4 + 1))


def test_exemplars_and_levels_come_from_one_pass(llama):
    passes = counting(llama)
    exemplify(llama, sites(llama, "neuron"), [pico_batch(llama, seed=s) for s in range(3)], k=1)
    assert len(passes) <= 3 + 3


def test_a_comparison_of_two_models_copies_one_matrix_at_a_time():
    model, other = (pico("llama", num_hidden_layers=8, vocab_size=8, seed=seed) for seed in range(2))
    where = sites(model, "row")
    whole = 4 * sum(p.numel() for p in Parameters.of(model).by_name.values())
    with Peak() as peak:
        choose("locators", "change")(Context(model, where, against=other))
    assert peak.peak < whole / 2


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_examples_are_pooled_as_one_by_one(pool):
    rng = torch.Generator().manual_seed(0)
    x, rows = torch.randn(50, 5, generator=rng), torch.randint(9, (50,), generator=rng)
    for order in (rows, rows.sort().values):
        places = torch.stack([order, torch.arange(50)], 1)
        found, starts = _pooled(x, places, pool)
        for i, example in enumerate(order.unique().tolist()):
            mine = x[order == example]
            assert torch.equal(found[i], mine.amax(0) if pool == "max" else mine.mean(0))
            assert starts[i].tolist() == [example, int((order == example).nonzero()[0])]
