"""DFT: the gradient of -sg(p) log p is that of -p, so the model learns what it half believes and not noise."""

from contextlib import contextmanager
from copy import deepcopy

import torch
import torch.nn.functional as F

from neurograft.core.choose import choose
from neurograft.core.context import Step
from neurograft.core.resolve import resolve
from neurograft.core.seeds import generator
from neurograft.pipeline.attach import attach
from neurograft.pipeline.run import run
from neurograft.train.loop import fit
from neurograft.worlds.mixture import exact, mixture
from neurograft.worlds.pico import pico, pico_batch
from tests.proofs import effect, note, patched
from tests.proofs._tools import gradient_of, rows_in, said

PAPER, SCALE = "dft", "tiny"


def _weighed(weight):
    def spoilt(step, *, alpha=1.0):
        return step.mean(-(weight(step) ** alpha) * step.log_probs)

    spoilt.card = resolve("neurograft.objectives.dft").card
    return spoilt


@contextmanager
def gradient_flows_through_the_weight():
    """The weight is not detached."""
    with patched("neurograft.objectives.dft", "dft", _weighed(lambda step: step.log_probs.exp())):
        yield


@contextmanager
def one_weight_for_the_sequence():
    """Every token is weighed with the probability of the whole batch's tokens, not its own."""
    with patched("neurograft.objectives.dft", "dft", _weighed(lambda step: step.log_probs.detach().mean().exp())):
        yield


@contextmanager
def plain_cross_entropy():
    """There is no weight."""
    with patched("neurograft.objectives.dft", "dft", _weighed(lambda step: torch.ones_like(step.log_probs))):
        yield


BROKEN = (gradient_flows_through_the_weight, one_weight_for_the_sequence, plain_cross_entropy)


def spoken(n=6, v=11):
    rng = generator(0, "dft")
    logits = torch.randn(n, v, generator=rng, dtype=torch.float64) * 3
    return logits, torch.randint(v, (n,), generator=rng)


def test_the_gradient_is_that_of_minus_the_mean_probability():
    logits, labels = spoken()
    found = gradient_of("dft", said(logits, labels))
    free = logits.clone().requires_grad_(True)
    p = free.softmax(-1)[torch.arange(len(labels)), labels]
    (-p.mean()).backward()
    torch.testing.assert_close(found, free.grad, rtol=0, atol=1e-15)


def test_alpha_0_is_cross_entropy_and_half_way_is_its_power():
    logits, labels = spoken()
    free = logits.clone().requires_grad_(True)
    F.cross_entropy(free, labels).backward()
    torch.testing.assert_close(gradient_of("dft", said(logits, labels), alpha=0.0), free.grad, rtol=0, atol=1e-15)
    p = free.detach().softmax(-1)[torch.arange(len(labels)), labels]
    halved = gradient_of("dft", said(logits, labels), alpha=0.5)
    torch.testing.assert_close(halved, free.grad * p.sqrt()[:, None], rtol=0, atol=1e-15)


def test_the_recipe_asks_exactly_this():
    model = pico("llama")
    batch = pico_batch(model, batch=4)
    rows = rows_in(batch)
    graft = run("dft", model, rows, changes={"tune.args": {"max_steps": 1, "learning_rate": 1e-3}}).graft
    logits, labels = Step(model, batch).scored()
    p = logits.softmax(-1)[torch.arange(len(labels)), labels]
    assert abs(graft.card["losses"][0] - float(-(p * p.log()).mean().detach())) < 1e-5
    assert graft.card["objective"]["path"].endswith("dft")


@effect
def test_trl_says_the_same_on_a_padded_batch():
    import tempfile

    from trl import SFTConfig, SFTTrainer

    from neurograft.worlds.letters import letters

    model = pico("llama")
    batch = pico_batch(model, batch=3)
    batch["labels"][:, :3] = -100
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(output_dir=folder, loss_type="dft", report_to="none", use_cpu=True)
        rows = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 2
        from datasets import Dataset

        trainer = SFTTrainer(
            model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=letters()
        )
        theirs = trainer.compute_loss(trainer.model, dict(batch))
    theirs.backward()
    gradient = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    ours = choose("objectives", "dft")(Step(model, batch))
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.grad, gradient, rtol=1e-4, atol=1e-8)


def learned(model, batches, objective, steps, test, *, lr=3e-3):
    """Return accuracy after so many steps, and the last losses on the training batches."""
    with attach(model) as live:
        fit(live, batches, steps=steps, lr=lr, objective=objective, warmup=20)
        rights = exact(model.eval(), test)
        with torch.no_grad():
            loss = float(torch.stack([Step(model, b).log_probs.mean() for b in batches[:4]]).mean().neg())
        graft = live.graft()
    return rights, loss, graft


@effect
def test_noise_is_not_learned_and_nothing_is_learned_from_nothing():
    """20 % wrong labels, 3 seeds: better on the test, the training loss stays high; from scratch it is slower."""
    test = mixture(("shift",), count=2, batch=128, length=3, seed=99)
    table = {
        name: [] for name in ("likelihood", "dft", "likelihood_loss", "dft_loss", "likelihood_scratch", "dft_scratch")
    }
    for seed in range(3):
        fresh = pico("llama", seed=seed)
        base = deepcopy(fresh)
        clean = mixture(("shift",), count=120, batch=32, length=3, seed=100 + seed)
        learned(base, clean, "likelihood", 110, test)[2].apply(base)
        noisy = mixture(("shift",), count=4, batch=32, length=3, noise=0.2, seed=10 + seed)
        for name in ("likelihood", "dft"):
            rights, loss, _ = learned(base, noisy, name, 110, test)
            table[name].append(rights)
            table[f"{name}_loss"].append(loss)
            table[f"{name}_scratch"].append(learned(fresh, clean, name, 110, test)[0])
    note(**{k: [round(x, 3) for x in v] for k, v in table.items()})
    mean = {k: sum(v) / len(v) for k, v in table.items()}
    assert mean["dft"] > mean["likelihood"] + 0.1
    assert mean["dft_loss"] > 2 * mean["likelihood_loss"]
    assert mean["dft_scratch"] < mean["likelihood_scratch"] - 0.5
