"""LMM skills: attention or gate and up alone move; the two probes read what they say, to the last digit."""

from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch

from neurograft.anatomy.sites import sites
from neurograft.audits._numbers import token_ids
from neurograft.core.choose import choose
from neurograft.core.context import Context, Step
from neurograft.core.resolve import resolve
from neurograft.core.seeds import generator
from neurograft.pipeline.recipe import recipe
from neurograft.pipeline.run import run
from neurograft.worlds.mixture import DIGITS, mixture
from neurograft.worlds.pico import pico, pico_batch
from tests.proofs import bar, effect, note, patched
from tests.proofs._tools import Says, base, moved, rows_in, snapshot, tuned_to

PAPER, SCALE = "lmm-skills", "identity"


@contextmanager
def logits_are_averaged():
    """The probe takes the probability of the mean logits and not the mean probability."""
    readings = resolve("neurograft.audits.token_marginal.readings")

    def averaged(logits, chosen):
        found = readings(logits.mean(0, keepdim=True), chosen)
        return {name: value.expand(len(logits)) for name, value in found.items()}

    with patched("neurograft.audits.token_marginal", "readings", averaged):
        yield


@contextmanager
def gram_matrices_in_float32():
    """||H(a_t - a_b)|| is found from Gram matrices of the logits in float32."""

    def gram(new, base, new_head, base_head):
        a, b, h, g = new.float(), base.float(), new_head.float(), base_head.float()
        own = ((a @ (h.t() @ h)) * a).sum(1) + ((b @ (g.t() @ g)) * b).sum(1)
        return (own - 2 * ((a @ (h.t() @ g)) * b).sum(1)).clamp(min=0).sqrt().double()

    with patched("neurograft.audits.layer_contribution", "drift", gram):
        yield


@contextmanager
def down_is_trained_too():
    """The roles of gate and up hold the down projection as well."""
    with_roles = resolve("neurograft.anatomy.roles.with_roles")

    def more(model, sites, wanted):
        return with_roles(model, sites, [*wanted, "down"] if "up" in wanted else wanted)

    with patched("neurograft.locators.within", "with_roles", more):
        yield


BROKEN = (logits_are_averaged, gram_matrices_in_float32, down_is_trained_too)


def marginal(*args, **options):
    return resolve("neurograft.audits.token_marginal")(*args, **options)


def contribution(*args, **options):
    return resolve("neurograft.audits.layer_contribution")(*args, **options)


def test_only_the_named_projections_move():
    model = pico("llama")
    batch = pico_batch(model, batch=4)
    rows = rows_in(batch)
    before = snapshot(model)
    for part, names in {"attention": "q_proj k_proj v_proj o_proj", "gate_up": "gate_proj up_proj"}.items():
        graft = run("lmm_skills", model, rows, changes={"train": part, "lr": 1e-3, "warmup": 0.0}).graft
        assert not moved(before, model)
        with graft.on(model):
            changed = moved(before, model)
        expected = {n for n in before if n.split(".")[-2] in names.split()}
        assert set(changed) == expected


def test_of_a_model_that_sees_only_its_language_layers_are_taken():
    model = pico("llava")
    scores = choose("locators", recipe("lmm_skills").steps[0]["by"])(Context(model, sites(model, "module")))
    assert all("language_model" in name and ("gate" in name or "up_proj" in name) for name in scores.sites)


def test_mass_on_a_set_of_tokens_by_hand():
    """Two steps of logits (0, 0, ln 2) and (0, 0, 0), V = {2}: masses 1/2 and 1/3, mean 5/12, maximum 1/2."""
    logits = torch.zeros(1, 3, 3, dtype=torch.float64)
    logits[0, 0, 2] = torch.tensor(2.0, dtype=torch.float64).log()
    batch = {"input_ids": torch.zeros(1, 3, dtype=torch.int64), "labels": torch.tensor([[-100, 1, 1]])}
    found = marginal(Says(logits), Says(logits), [batch], tokens=[2])
    for side in ("base", "changed"):
        assert found[side]["mass"]["mean"] == pytest.approx(5 / 12, abs=1e-12)
        assert found[side]["mass"]["max"] == pytest.approx(1 / 2, abs=1e-12)
        assert found[side]["logit"]["max"] == pytest.approx(float(torch.tensor(2.0).log()), abs=1e-6)
    assert found["measures"]["token_mass"]["change"]["value"] == 0.0


def test_samples_are_averaged_after_their_steps():
    """One sample with a step of mass 1 and one with three of mass 1/3 give 2/3, not 1/2."""
    logits = torch.zeros(2, 4, 3, dtype=torch.float64)
    logits[0, :, 2] = 60.0
    labels = torch.tensor([[-100, 1, -100, -100], [-100, 1, 1, 1]])
    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.int64), "labels": labels}
    found = marginal(Says(logits), Says(logits), [batch], tokens=[2])
    assert found["base"]["mass"]["mean"] == pytest.approx(2 / 3, abs=1e-12)
    assert found["base"]["mass"]["mean_spread"] == pytest.approx(1 / 3, abs=1e-12)


def test_numbers_of_a_vocabulary():
    words = ["7", "12th", "3.5", " Two", "x7", "²", "often", "Ġbillion", "▁1,000", "21st", "3.", "٣", "MILLION"]
    found = token_ids({w: i for i, w in enumerate(words)})
    assert [words[i] for i in found] == ["7", "12th", "3.5", " Two", "Ġbillion", "▁1,000", "21st", "MILLION"]


def test_free_generation_reads_raw_logits_of_its_own_steps():
    model = pico("llama")
    prompt = pico_batch(model, batch=1, length=5)
    prompt = {"input_ids": prompt["input_ids"], "attention_mask": torch.ones(1, 5, dtype=torch.int64)}
    found = marginal(model, model, [prompt], tokens=[5, 6, 7], forced=False, length=3)
    tokens, masses = prompt["input_ids"], []
    for _ in range(3):
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[:, -1].double()
        masses.append(float(logits.softmax(-1)[0, [5, 6, 7]].sum()))
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
        if int(tokens[0, -1]) == model.config.eos_token_id:
            break
    assert found["base"]["mass"]["mean"] == pytest.approx(sum(masses) / len(masses), abs=1e-6)
    assert found["base"]["mass"]["max"] == pytest.approx(max(masses), abs=1e-6)


def test_contribution_is_the_norm_of_the_difference_in_logit_space():
    """Against itself 0; a change far below float32's Gram resolution is still read; the direct norm in float64."""
    rng = generator(0, "drift")
    head = torch.randn(50, 16, generator=rng)
    a = torch.randn(7, 16, generator=rng) * 100
    b = a + 1e-5 * torch.randn(7, 16, generator=rng)
    drift = resolve("neurograft.audits.layer_contribution.drift")
    direct = ((a.double() - b.double()) @ head.double().t()).norm(dim=1)
    torch.testing.assert_close(drift(a, b, head, head.clone()), direct, rtol=1e-9, atol=0)
    other = head + 1e-4
    stacked = torch.cat([a, -b], 1).double()
    both = torch.cat([other, head], 1).double()
    gram = ((stacked @ (both.t() @ both)) * stacked).sum(1).sqrt()
    torch.testing.assert_close(drift(a, b, other, head), gram, rtol=1e-6, atol=0)


def test_contribution_names_the_layer_that_changed():
    model = pico("llama")
    tuned = deepcopy(model)
    with torch.no_grad():
        tuned.model.layers[1].mlp.down_proj.weight += 0.01
    batches = [pico_batch(model, seed=s) for s in range(2)]
    nothing = contribution(model, deepcopy(model), batches)
    assert all(v == 0.0 for layer in nothing["layers"] for k, v in layer.items() if k != "name")
    found = contribution(model, tuned, batches)
    assert found["largest"] == "model.layers.1.mlp.down_proj"
    assert found["layers"][0] == nothing["layers"][0]
    assert found["layers"][1]["attention"] == 0.0
    per_sample = []
    for batch in batches:
        seen = {}
        for name, net in (("base", model), ("new", tuned)):
            down = net.model.layers[1].mlp.down_proj
            handle = down.register_forward_hook(lambda m, i, o, name=name, seen=seen: seen.update({name: o.detach()}))
            with torch.no_grad():
                net(**{k: v for k, v in batch.items() if k != "labels"})
            handle.remove()
        norms = ((seen["new"] - seen["base"]).double() @ model.lm_head.weight.detach().double().t()).norm(dim=-1)
        for row in range(2):
            answers = [t - 1 for t in range(1, 8) if batch["labels"][row, t] != -100]
            per_sample.append(float(norms[row, answers].mean()))
    assert found["layers"][1]["ffn"] == pytest.approx(sum(per_sample) / len(per_sample), rel=1e-6)


@effect
def test_full_fine_tuning_moves_held_out_predictions_more_than_gate_and_up():
    """A task answered in digits, learned to one loss; 3 seeds.

    The paper's order does not show whole at this size, which is why the scale says "identity": held-out KL is larger
    for full tuning than for gate and up, but not for down alone, and the mass on digits does not order them.
    """
    held = mixture(("copy", "reverse"), count=1, batch=128, length=3, seed=91)
    rates = {"gate_up": 1e-3, "attention": 1e-3, "down": 1e-3, "full": 1e-3}
    table = {f"{name}_{what}": [] for name in rates for what in ("kl", "digits", "steps")}
    for seed in range(3):
        model = base(seed)
        with torch.no_grad():
            plain = float(Step(model, held[0]).scored()[0].softmax(-1)[:, list(DIGITS)].sum(-1).mean())
        for name, lr in rates.items():
            where = None
            if name != "full":
                locate = recipe("lmm_skills", train=name).steps[0]
                scores = choose("locators", locate["by"])(Context(model, sites(model, "module")))
                where = scores.top(fraction=1.0)

            def probe(model=model, plain=plain):
                with torch.no_grad():
                    mass = Step(model, held[0]).scored()[0].softmax(-1)[:, list(DIGITS)].sum(-1)
                return {"digits": float(mass.mean()) - plain}

            found = tuned_to(model, where, lr=lr, target=0.6, task="first", seed=seed, probe=probe)
            for what in ("kl", "digits", "steps"):
                table[f"{name}_{what}"].append(found[what])
    note(**table)
    for name, what, missed in (
        ("full", "kl", False),
        ("down", "kl", True),
        ("full", "digits", True),
        ("down", "digits", True),  # its sign turns with the order of the tensors, which rounds differently
    ):
        more = [x - y for x, y in zip(table[f"{name}_{what}"], table[f"gate_up_{what}"])]
        words = {"kl": "held-out KL", "digits": "mass on digits"}[what]
        bar(f"{words} of {name} less that of gate and up", more, at_least=0.0, missed=missed)
