"""Every option of every recipe changes what the recipe does: none is taken and left out."""

import inspect

import pytest

import neurograft as ng
from neurograft.core.choose import option_names
from neurograft.core.errors import RequestError
from neurograft.core.resolve import resolve
from neurograft.pipeline.recipe import recipes

CASES = [(name, option) for name in recipes() for option in option_names(resolve(f"neurograft.recipes.{name}"))]
# What an option needs beside itself to have a meaning, as its description says.
BESIDE = {
    ("cones", "lr"): {"tune_steps": 5},
    ("entity_tracking", "lam"): {"desiderata": {"a": "a.jsonl"}},
    ("entity_tracking", "mask_lr"): {"desiderata": {"a": "a.jsonl"}},
    ("entity_tracking", "mask_epochs"): {"desiderata": {"a": "a.jsonl"}},
    ("lape_subnetwork", "pool"): {"language": "de"},
    ("layernorm_key", "rehearse"): {"fraction": 0.5},
    ("smt", "warmup_lr"): {"warmup": "rewind"},
    ("neurostrike", "anchor"): {"keep": "keep.jsonl"},
}


def others(default):
    """Values an option might take instead."""
    words = ["x.jsonl", "grad", "depth", "last", "all", "mean", "weights", "linear", "SGD", "up", "nll", "attention"]
    words += ["backward", "residual", "layer", "inclusive", "accuracy", "random", "writes", "none", "dopamine", "pairs"]
    words += [
        "threshold",
        "everywhere",
        "pooled",
        "token",
        "lora",
        "givens",
        "frozen",
        "cosine",
        "coupled",
        "W",
        "mlp",
        "row",
    ]
    words += ["rewind", "freeze"]
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, (int, float)):
        return [default + 1, default / 2, default * 0.9, default * 2, 3]
    several = [[0], ["x"], ["q"], [["x"]], (0, 1), {"a": "b"}, [{"name": "a", "share": 0.5}]]
    return [*several, *words] if isinstance(default, (tuple, list)) else [*words, 3, 0.5, *several, True]


def made(name, changes):
    recipe = ng.recipe(name, **changes)
    return repr((recipe.steps, recipe.network))


@pytest.mark.parametrize(("name", "option"), CASES)
def test_an_option_changes_the_recipe(name, option):
    beside = BESIDE.get((name, option), {})
    default = inspect.signature(resolve(f"neurograft.recipes.{name}")).parameters[option].default
    before, taken = made(name, beside), False
    for value in others(default):
        try:
            after = made(name, {**beside, option: value})
        except (RequestError, TypeError, KeyError, ValueError):
            continue
        taken = True
        if after != before:
            return
    assert taken, f"no value was taken for {option}"
    raise AssertionError(f"{option} of {name} changes nothing")
