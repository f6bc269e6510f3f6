"""The two tables of selective tuning: their meters, and that together they have every row."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from neurograft.core.compact.meter import saved
from neurograft.train.adaptable import units_of
from neurograft.train.supernet import Episode, Supernet
from neurograft.worlds.pico import pico

FOLDER = Path(__file__).parents[2] / "benchmarks"
TABLES = ("selective", "selective_images")
BYTES = ("bytes_saved", "bytes_gradients", "bytes_optimizer", "bytes_file")
COSTS = ("test", "forgetting", "numbers", "step_ratio", "all_steps", *BYTES)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def quadratic(size, steps):
    """Train a weight by AdamW; a step saves what exp returns."""
    weight = nn.Parameter(torch.ones(size))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (weight.exp() ** 2).sum().backward()
        optimizer.step()


def test_every_optimizer_is_metered_by_itself(bench):
    costs = bench("_costs")
    with costs.each_optimizer(nn.Linear(2, 2)) as runs:
        quadratic(3, 4)
        quadratic(50, 1)
        quadratic(7, 2)
        assert all(run.watching is None for run in runs)  # a watch would slow the steps of others
        quadratic(5, 1)
    quadratic(3, 4)
    assert [len(run.seconds) for run in runs] == [4, 1, 2, 1]
    assert [run.gradients for run in runs] == [12, 200, 28, 20]
    assert [run.state for run in runs] == [2 * 12 + 4, 2 * 200 + 4, 2 * 28 + 4, 2 * 20 + 4]  # two moments and a count
    assert [run.saved for run in runs] == [12, 0, 28, 0]  # what exp returned in the second step, if there was one
    assert all(run.watching is None for run in runs)


def test_a_path_is_metered_as_its_own_step_is(bench):
    model = pico("vit")
    net = Supernet(model, units_of(model))
    x = {"pixel_values": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    labels = torch.tensor([0, 1, 0, 1])
    episode = Episode(x, labels, x, labels)
    path = torch.tensor([1.0, 0, 0, 1]).double()
    with bench("_costs").each_optimizer(model) as runs:
        own, _ = net.tuned(path, episode, steps=3, optimizer="AdamW", lr=1e-3)
    mine = {n: nn.Parameter(p.clone()) for n, p in own.items()}
    with saved(nn.ModuleList([model, nn.ParameterList(mine.values())])) as meter:
        net.loss(path, episode, mine, on_support=True)
    assert runs[0].saved == meter.bytes > 0
    assert runs[0].gradients == 4 * sum(p.numel() for p in own.values())
    assert len(runs[0].seconds) == 3


def test_the_costs_of_a_search_are_those_of_the_path_it_keeps(bench, monkeypatch):
    images, rivals, costs = bench("selective_images"), bench("_rivals"), bench("_costs").Costs()
    small = {"ways": 3, "shots": 1, "queries": 1, "episodes_to_train": 4, "episodes_to_search": 1, "population": 4}
    monkeypatch.setattr(images, "SEARCH", {**small, "top": 2, "generations": 1, "steps": 2, "apart": 0.1})
    model = pico("vit", image_size=8, patch_size=4, num_channels=1, num_labels=10)
    world = rivals.World(base=lambda seed: model, rows=images.rows, read=images.read, batch=50)
    steps = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *rest: steps.append(optimizer))
    tuned = images.searched(world, 0, {"learning_rate": 1e-3, "max_steps": 5}, costs)
    handle.remove()
    path = torch.tensor(tuned.graft.card["search"]["path"]).double()
    net = Supernet(model, units_of(model), prefix=1)
    assert costs.gradients == 4 * sum(net.own[n].numel() for n in net.awake(path))
    assert (len(costs.seconds), costs.before + len(costs.seconds)) == (5, len(steps))
    assert {"validation", "test", "head", "known"} == tuned.read(world, 0).keys()


def test_a_frozen_path_has_no_run(bench):
    card = {"paths": [[1, 0], [0, 0], [1, 1]], "support_losses": [0.3, 0.9, 0.2]}
    assert bench("selective_images").kept_of(["search", "search", "first", "third"], card) == "third"
    card["support_losses"] = [0.1, 0.9, 0.2]
    assert bench("selective_images").kept_of(["search", "search", "first", "third"], card) == "first"


def test_the_two_tables_have_every_row_of_the_papers(bench):
    found = {}
    for name in TABLES:
        data = json.loads((FOLDER / "results" / f"{name}.json").read_text())
        there = {n: r for n, r in data["contenders"].items() if "none" not in r}
        for rival, numbers in there.items():
            assert all(len(numbers[key]) == data["settings"]["seeds"] for key in COSTS), (name, rival)
        assert bench(name).lines(data["contenders"]).count("\n| ") == len(there)
        found |= there
    assert {slug.replace("-", "_") for slug in bench("_rivals").SELECTIVE} <= found.keys()
    assert len(bench("_rivals").SELECTIVE) == 25
