"""Every option of every method, recipe and verb has a type that can be read, so that none goes unchecked."""

import inspect

import pytest

import neurograft as ng
from neurograft.core.choose import ROOMS, methods
from neurograft.core.resolve import resolve
from neurograft.core.typed import annotations_of
from neurograft.pipeline.recipe import recipes

NAMES = [f"{room}.{name}" for room in ROOMS for name in methods(room)] + [f"recipes.{name}" for name in recipes()]
PUBLIC = {name: f for name in NAMES if callable(f := resolve(f"neurograft.{name}"))}
PUBLIC |= {name: f for name in ng.__all__ if inspect.isfunction(f := getattr(ng, name))}
NAMED = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_option_has_a_type(name):
    types = annotations_of(PUBLIC[name])
    parameters = inspect.signature(PUBLIC[name]).parameters.values()
    assert [p.name for p in parameters if p.kind in NAMED and p.name not in types] == []
