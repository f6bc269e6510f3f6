"""Laws of every adapter, trained through the Trainer: zero start, undo, the same bytes, resume, reference."""

import shutil

import pytest
import torch

import neurograft as ng
from neurograft.core.choose import choose, methods
from neurograft.core.selection import Selection
from neurograft.core.units import Part, Site
from neurograft.train.steps import reference_of
from neurograft.worlds.pico import pico, pico_batch

ADAPTERS = methods("adapters")


def claiming(promise):
    return [n for n in ADAPTERS if promise in choose("adapters", n).card.claims]


def rows(model):
    names = [f"model.layers.{i}.mlp.{k}_proj.weight" for i in (0, 1) for k in ("gate", "up")]
    sites = {n: Site(n, "row", 48, (Part.rows(n, (48, 32)),)) for n in names}
    return Selection.of(sites, {n: [1, 5, 40] for n in names})


def chosen(name, model):
    """Rows, or everything for an adapter that trains whole parameters only."""
    try:
        with ng.attach(model, rows(model), adapter=name):
            return rows(model)
    except ng.RequestError:
        return None


def data(model):
    return [{k: v[0] for k, v in pico_batch(model, batch=1, seed=s).items()} for s in range(12)]


def trained(name, model, folder, **more):
    args = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "output_dir": str(folder)}
    args |= {"save_strategy": "steps", "save_steps": 2, "use_cpu": True}
    return ng.tune(model, data(model), chosen(name, model), adapter=name, args=args, **more)


@pytest.mark.parametrize("name", claiming("zero_graft"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_changes_at_the_start(name, dtype):
    model = pico("llama", dtype=dtype)
    batch = pico_batch(model)
    before = model(**batch).logits
    with ng.attach(model, chosen(name, model), adapter=name) as live:
        assert torch.equal(model(**batch).logits, before)
        graft = live.graft()
    with graft.on(model):
        assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("name", claiming("undo"))
def test_trained_and_taken_out(name, tmp_path):
    model = pico("llama")
    batch, state = pico_batch(model), {k: v.clone() for k, v in model.state_dict().items()}
    before = model(**batch).logits
    graft = trained(name, model, tmp_path)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with graft.on(model):
        assert (model(**batch).logits - before).abs().max() > 1e-3
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(**batch).logits, before)
    assert graft.card["adapter"]["path"].endswith(name)


@pytest.mark.parametrize("name", claiming("only_the_selection"))
def test_only_the_selection_moves(name, tmp_path):
    model = pico("llama")
    where, state = chosen(name, model), {k: v.clone() for k, v in model.state_dict().items()}
    graft = trained(name, model, tmp_path)
    with graft.on(model):
        for key, value in model.state_dict().items():
            differs = (value != state[key]).reshape(len(value), -1).any(1)
            if where is not None:
                mine = where.ids.get(key, torch.empty(0, dtype=torch.int64))
                assert set(differs.nonzero().reshape(-1).tolist()) == set(mine.tolist()), key
            else:
                assert differs.any(), key


@pytest.mark.parametrize("name", claiming("resume"))
def test_resumed_and_repeated_runs_give_the_same_bytes(name, tmp_path):
    model = pico("llama", attention_dropout=0.1)
    first = trained(name, model, tmp_path / "a")
    torch.rand(7)
    second = trained(name, model, tmp_path / "b")
    assert first.identity == second.identity
    assert first.card["losses"] == second.card["losses"]
    shutil.rmtree(tmp_path / "a" / "checkpoint-4")
    resumed = trained(name, model, tmp_path / "a", resume_from_checkpoint=True)
    assert resumed.identity == first.identity
    other = trained(name, model, tmp_path / "c", seed=1)
    assert other.identity != first.identity


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_base_can_be_asked_while_training(name):
    model = pico("llama")
    batch = pico_batch(model)
    before = model(**batch).logits
    with ng.attach(model, chosen(name, model), adapter=name) as live:
        optimizer = torch.optim.Adam(live.parameters(), lr=1e-2)  # a mask has to cross its threshold
        for _ in range(2):
            model(**batch).loss.backward()
            optimizer.step()
        tuned = model(**batch).logits
        assert torch.equal(reference_of(live)(lambda: model(**batch).logits), before)
        assert torch.equal(model(**batch).logits, tuned)
        assert not torch.equal(tuned, before)
