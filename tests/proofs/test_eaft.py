"""EAFT: the weight is the entropy, so that new facts are learned as fast and contradicted ones flip last."""

import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from neurograft.core.context import Step
from neurograft.core.resolve import resolve
from neurograft.core.seeds import generator
from neurograft.pipeline.attach import attach
from neurograft.pipeline.run import run
from neurograft.train.loop import fit
from neurograft.worlds.pico import pico, pico_batch
from tests.proofs import bar, effect, note, patched
from tests.proofs._tools import gradient_of, rows_in, said

PAPER, SCALE = "eaft", "identity"


def _weighed(weight):
    def spoilt(step, *, alpha=1.0, top=20, scale=3.0):
        return step.mean(-(weight(step, top, scale) ** alpha) * step.log_probs)

    spoilt.card = resolve("neurograft.objectives.eaft").card
    return spoilt


@contextmanager
def weighed_by_probability():
    """The weight is p_t, as in DFT, and not the entropy."""
    with patched(
        "neurograft.objectives.eaft", "eaft", _weighed(lambda step, top, scale: step.log_probs.detach().exp())
    ):
        yield


@contextmanager
def gradient_flows_through_the_weight():
    """The weight is not detached."""
    with patched(
        "neurograft.objectives.eaft", "eaft", _weighed(lambda step, top, scale: step.entropy(top=top) / scale)
    ):
        yield


@contextmanager
def confident_tokens_weigh_most():
    """The weight is 1 - H / scale."""
    turned = _weighed(lambda step, top, scale: 1 - step.entropy(top=top).detach() / scale)
    with patched("neurograft.objectives.eaft", "eaft", turned):
        yield


BROKEN = (weighed_by_probability, gradient_flows_through_the_weight, confident_tokens_weigh_most)


def test_hand_made_logits():
    """Uniform over 20 of 40 tokens weighs ln 20 / 3.0, a sure token nothing; the gradient is w (softmax - onehot)."""
    logits = torch.full((2, 40), -60.0, dtype=torch.float64)
    logits[0, :20], logits[1, 5] = 0.0, 60.0
    labels = torch.tensor([3, 7])
    found = gradient_of("eaft", said(logits, labels))
    pull = logits.softmax(-1) - F.one_hot(labels, 40)
    torch.testing.assert_close(found[0], math.log(20) / 3.0 * pull[0] / 2, rtol=0, atol=1e-12)
    assert float(found[1].abs().max()) < 1e-12


def test_the_gradient_is_the_weight_times_that_of_cross_entropy():
    rng = generator(0, "eaft")
    logits = torch.randn(7, 30, generator=rng, dtype=torch.float64) * 4
    labels = torch.randint(30, (7,), generator=rng)
    top = logits.sort(-1, descending=True).values[:, :20].softmax(-1)
    weight = -(top * top.log()).sum(-1) / 3.0
    pull = (logits.softmax(-1) - F.one_hot(labels, 30)) / 7
    found = gradient_of("eaft", said(logits, labels))
    torch.testing.assert_close(found, weight[:, None] * pull, rtol=0, atol=1e-14)
    squared = gradient_of("eaft", said(logits, labels), alpha=2.0)
    torch.testing.assert_close(squared, weight[:, None] ** 2 * pull, rtol=0, atol=1e-14)


def test_alpha_0_is_cross_entropy():
    rng = generator(1, "eaft")
    logits, labels = torch.randn(5, 12, generator=rng, dtype=torch.float64), torch.arange(5)
    pull = (logits.softmax(-1) - F.one_hot(labels, 12)) / 5
    torch.testing.assert_close(gradient_of("eaft", said(logits, labels), alpha=0.0), pull, rtol=0, atol=1e-15)


def test_the_recipe_asks_exactly_this():
    model = pico("llama")
    batch = pico_batch(model, batch=4)
    rows = rows_in(batch)
    graft = run("eaft", model, rows, changes={"tune.args": {"max_steps": 1, "learning_rate": 1e-3}}).graft
    with torch.no_grad():
        logits, labels = Step(model, batch).scored()
    top = logits.topk(20).values.softmax(-1)
    weight = -(top * top.log()).sum(-1) / 3.0
    assert (
        abs(graft.card["losses"][0] - float((weight * F.cross_entropy(logits, labels, reduction="none")).mean())) < 1e-5
    )


OLD, NEW, CONTRADICTED, VALUES, FIRST = 32, 24, 10, 24, 60


def facts(keys, values):
    """Rows <bos> key value, labels on the value."""
    tokens = torch.stack([torch.ones_like(keys), keys, values], 1)
    labels = torch.full_like(tokens, -100)
    labels[:, 2] = values
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def right(model, keys, values):
    with torch.no_grad():
        said = model(input_ids=facts(keys, values)["input_ids"]).logits[:, 1].argmax(-1)
    return float((said == values).float().mean())


def sure(seed):
    """A base that is sure of the old facts and open about the new ones, whose values it saw at random."""
    rng = generator(seed, "eaft facts")
    keys = FIRST + torch.randperm(100, generator=rng)[: OLD + NEW]
    values = 36 + torch.randint(VALUES, (OLD + NEW,), generator=rng)
    other = 36 + (values - 35 + torch.randint(VALUES - 1, values.shape, generator=rng)) % VALUES
    model = pico("llama", seed=seed, vocab_size=160, hidden_size=64, intermediate_size=128)
    batches = []
    for _ in range(60):
        old = torch.randint(OLD, (40,), generator=rng)
        new = OLD + torch.randint(NEW, (24,), generator=rng)
        drawn = 36 + torch.randint(VALUES, (24,), generator=rng)
        batches.append(facts(torch.cat([keys[old], keys[new]]), torch.cat([values[old], drawn])))
    with attach(model) as live:
        fit(live, batches, steps=300, lr=4e-3, warmup=20, decay="linear")
        graft = live.graft()
    graft.apply(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(
            3.0
        )  # surer still: the old facts' entropy falls below 1e-6, the new ones' stays at 2.5
    return model, keys, values, other


@effect
def test_new_facts_as_fast_as_by_cross_entropy_contradicted_ones_flip_last():
    """24 new facts, 10 contradictions, 22 old facts agreed with; 30 steps of SGD, 3 seeds.

    AdamW takes a small gradient for a large step, so it undoes much of the weight; the effect is shown with SGD. Of
    the contradicted old facts the card asks for 90 % kept, which this world does not reach.
    """
    table = {f"{name}_{what}": [] for name in ("likelihood", "dft", "eaft") for what in ("new", "old_kept")}
    for seed in range(3):
        model, keys, values, other = sure(seed)
        taught = torch.cat([values[OLD:], other[:CONTRADICTED], values[CONTRADICTED:OLD]])
        batch = [facts(torch.cat([keys[OLD:], keys[:OLD]]), taught)]
        for name in ("likelihood", "dft", "eaft"):
            with attach(model) as live:
                fit(live, batch, steps=30, lr=0.02, objective=name, optimizer=("SGD", {"momentum": 0.9}))
                table[f"{name}_new"].append(right(model.eval(), keys[OLD:], values[OLD:]))
                table[f"{name}_old_kept"].append(right(model, keys[:CONTRADICTED], values[:CONTRADICTED]))
    note(**{k: [round(x, 3) for x in v] for k, v in table.items()})
    mean = {k: sum(v) / len(v) for k, v in table.items()}
    bar("contradicted old facts kept", table["eaft_old_kept"], at_least=0.9, missed=True)
    assert mean["eaft_new"] >= mean["likelihood_new"]
    assert mean["eaft_old_kept"] > mean["likelihood_old_kept"] + 0.5
    assert mean["dft_old_kept"] > mean["likelihood_old_kept"] + 0.5
    assert mean["eaft_new"] > mean["dft_new"] + 0.3
