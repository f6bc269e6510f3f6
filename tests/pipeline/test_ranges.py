"""Numbers with which a recipe could do nothing are refused by name, before a model is loaded."""

import pytest

import neurograft as ng

WRONG = [
    ("bidirectional_bias", {"variants": 0}),
    ("bidirectional_bias", {"temperature": 0.0}),
    ("dft", {"batch": 0}),
    ("dft", {"lr": -1.0}),
    ("dft", {"epochs": 0.0}),
    ("dpo_neurons", {"C": 0.0}),
    ("goodvibe", {"k": 0}),
    ("h_neurons", {"iterations": 0}),
    ("instruction_vector", {"r": 0}),
    ("loki", {"steps": 0}),
    ("milan", {"most": -1}),
    ("milan", {"quantile": 2.0}),
    ("neurostrike", {"probe_epochs": 0}),
    ("self_interpretability", {"reports": 0}),
    ("sparcom", {"least": 2.0}),
    ("sparse_reward", {"hidden": 0}),
]


@pytest.mark.parametrize(("name", "changes"), WRONG, ids=[f"{n}-{next(iter(c))}" for n, c in WRONG])
def test_it_is_named(name, changes):
    ((option, _),) = changes.items()
    with pytest.raises(ng.RequestError, match=f"got {option}=.*expected (at least|more than|a share)"):
        ng.recipe(name, **changes)
