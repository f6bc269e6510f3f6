"""Planted neurons and deltas: the truth is what a behaviour or a change hangs on, and nothing else is."""

from copy import deepcopy

import pytest
import torch

from neurograft.core.errors import RequestError
from neurograft.core.selection import Scores, Selection
from neurograft.core.units import Part, Site
from neurograft.worlds.pico import pico
from neurograft.worlds.planted import planted
from neurograft.worlds.planted_delta import planted_delta
from neurograft.worlds.truth import Truth


def without(model, truth):
    model = deepcopy(model)
    with torch.no_grad():
        for name, flat in truth.entries.items():
            model.get_parameter(name).view(-1)[flat] = 0
    return model


def neurons(model):
    """Sites of whole neurons of a Llama, written out by hand."""
    found = {}
    for i in range(model.config.num_hidden_layers):
        mlp, d, n = f"model.layers.{i}.mlp", model.config.hidden_size, model.config.intermediate_size
        parts = (
            Part.rows(f"{mlp}.gate_proj.weight", (n, d)),
            Part.rows(f"{mlp}.up_proj.weight", (n, d)),
            Part.columns(f"{mlp}.down_proj.weight", (d, n)),
        )
        found[mlp] = Site(mlp, "neuron", n, parts, layer=i, writes=(2,))
    return found


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_behaviour_hangs_on_the_planted_neurons_alone(family, seed):
    world = planted(family, seed=seed)
    assert world.answers() == 1.0
    assert world.answers(triggered=False) == 0.0
    assert world.answers(model=without(world.model, world.truth)) == 0.0
    assert world.answers(model=without(world.model, world.decoys)) == 1.0


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_without_the_trigger_planted_neurons_are_exactly_zero(family):
    world = planted(family)
    (batch,) = world.batches(1, triggered=False)
    bare = without(world.model, world.truth)
    assert torch.equal(world.model(**batch).logits, bare(**batch).logits)
    (batch,) = world.batches(1)
    assert not torch.equal(world.model(**batch).logits, bare(**batch).logits)


def test_the_expert_that_holds_them_gets_the_trigger():
    world = planted("mixtral")
    chosen = {}
    for i in world.experts:
        gate = world.model.get_submodule(f"model.layers.{i}.mlp.gate")
        gate.register_forward_hook(lambda m, a, out, i=i: chosen.__setitem__(i, (a[0] @ m.weight.t()).argmax(-1)))
    (batch,) = world.batches(1)
    world.model(**batch)
    for i, expert in world.experts.items():
        at_trigger = chosen[i].reshape(batch["input_ids"].shape)[:, -2]
        assert (at_trigger == expert).all()


def test_planted_units_come_out_of_the_entries():
    world = planted(per_layer=2)
    sites = neurons(world.model)
    true = world.truth.selection(sites)
    assert [len(ids) for ids in true.ids.values()] == [2, 2]
    assert world.truth.found(true) == {"precision": 1.0, "recall": 1.0}
    assert len(true & world.decoys.selection(sites)) == 0
    assert len(true) == 4 < len(world.truth.selection(sites, share=1e-9)) + 1


def test_attribution_finds_them_and_activation_takes_decoys():
    """Grad x act at the input of down_proj, by hand: the world separates a right answer from a plausible one."""
    world, seen = planted(), {}
    sites = neurons(world.model)
    for name in sites:
        down = world.model.get_submodule(name).down_proj

        def keep(module, args, name=name):
            args[0].retain_grad()
            seen[name] = args[0]

        down.register_forward_pre_hook(keep)
    for batch in world.batches(2):
        world.model(**batch).loss.backward()
    product = {n: (a * a.grad).abs().sum((0, 1)) for n, a in seen.items()}
    size = {n: a[:, -2].detach().abs().mean(0) for n, a in seen.items()}
    assert world.truth.ranked(Scores(sites, product)) == {"precision_at_k": 1.0, "auroc": 1.0}
    assert world.truth.ranked(Scores(sites, size))["precision_at_k"] < 1.0
    assert world.decoys.ranked(Scores(sites, size))["auroc"] > 0.8


def test_ranked_on_paper():
    sites = {"a": Site("a", "row", 4, (Part.rows("w", (4, 2)),))}
    truth = Truth({"w": torch.tensor([0, 1, 4, 5])})  # rows 0 and 2
    got = truth.ranked(Scores(sites, {"a": torch.tensor([3.0, 2.0, 2.0, 1.0])}))
    assert got == {"precision_at_k": 0.5, "auroc": (2 + 0.5 + 1) / 4}


def test_no_planted_unit_is_an_error():
    sites = {"a": Site("a", "row", 4, (Part.rows("other", (4, 2)),))}
    with pytest.raises(RequestError, match="planted"):
        Truth({"w": torch.tensor([0])}).selection(sites)


def test_too_many_neurons_are_refused():
    with pytest.raises(RequestError, match="at most"):
        planted(per_layer=40, decoys=40)


def drawn(model, seed=0):
    sites = neurons(model)
    rng = torch.Generator().manual_seed(seed)
    return Selection.of(sites, {n: torch.randperm(s.n, generator=rng)[:3] for n, s in sites.items()})


@pytest.mark.parametrize("pattern", ["noise", "same", "alternate"])
def test_teacher_differs_from_student_on_the_support_only(pattern):
    student = pico("llama")
    where = drawn(student)
    before = {n: p.clone() for n, p in student.named_parameters()}
    world = planted_delta(student, where, pattern=pattern)
    differing = {}
    for name, parameter in world.teacher.named_parameters():
        assert torch.equal(student.get_parameter(name), before[name])
        at = (parameter != before[name]).reshape(-1).nonzero().reshape(-1)
        if len(at):
            differing[name] = at
    assert differing.keys() == world.truth.entries.keys()
    assert all(torch.equal(differing[n], world.truth.entries[n]) for n in differing)


def test_alternating_signs_cancel_in_a_mean_and_same_signs_do_not():
    student = pico("llama")
    sites = {"b": Site("b", "block", 24, (Part.blocks("model.layers.0.mlp.down_proj.weight", (32, 48), (8, 8)),))}
    where = Selection.of(sites, {"b": [3, 7]})
    for pattern, zero in (("alternate", True), ("same", False)):
        world = planted_delta(student, where, pattern=pattern)
        name = "model.layers.0.mlp.down_proj.weight"
        step = (world.teacher.get_parameter(name) - student.get_parameter(name)).reshape(4, 8, 6, 8)
        assert (step.mean((1, 3)).abs().max() < 1e-6) == zero


def test_loss_is_zero_at_the_teacher_and_training_the_support_reaches_it():
    student = pico("llama")
    world = planted_delta(student, drawn(student), count=4)
    assert world.distance(world.teacher) == 0.0
    far = world.distance(student)
    model = deepcopy(student)
    names = list(world.truth.entries)
    optimizer = torch.optim.Adam([model.get_parameter(n) for n in names], lr=3e-3)
    masks = {n: torch.zeros(model.get_parameter(n).numel()) for n in names}
    for n in names:
        masks[n][world.truth.entries[n]] = 1
    for step in range(60):
        optimizer.zero_grad()
        world.loss(model, world.train[step % len(world.train)]).backward()
        for n in names:
            weight = model.get_parameter(n)
            weight.grad *= masks[n].reshape(weight.shape)
        optimizer.step()
    assert world.distance(model) < 0.2 * far


def test_train_and_test_inputs_differ_and_the_seed_names_them():
    student = pico("llama")
    a, b, c = (planted_delta(student, drawn(student), seed=s) for s in (0, 0, 1))
    assert not torch.equal(a.train[0]["input_ids"], a.test[0]["input_ids"])
    assert torch.equal(a.train[0]["input_ids"], b.train[0]["input_ids"])
    assert not torch.equal(a.train[0]["input_ids"], c.train[0]["input_ids"])
    assert "labels" not in a.train[0]


def test_planted_leaves_the_global_random_state():
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    planted()
    planted_delta(pico("llama"), drawn(pico("llama")))
    assert torch.equal(torch.random.get_rng_state(), state)
