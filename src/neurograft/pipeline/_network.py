"""A recipe's own network, by its dotted name."""

from __future__ import annotations

from torch import nn

from neurograft.core.choose import choose
from neurograft.core.errors import RequestError
from neurograft.pipeline.models import Model
from neurograft.pipeline.recipe import Recipe

HOME = "neurograft.networks."


def network(model: Model, plan: Recipe) -> Model:
    """Return a model as it is, or the network that it names, with the recipe's options if it is the recipe's own.

    Raises:
        RequestError: the name of something else, or options that the network does not have.
    """
    if not isinstance(model, str) or not model.startswith(HOME):
        return model
    name, options = plan.network if plan.network is not None else (model, {})
    chosen = choose("networks", model, **(options if name == model else {}))
    try:
        made = chosen()
    except TypeError as error:
        raise RequestError(
            f"the network {model}, which cannot be made so ({error})",
            expected=f"the network of the recipe, {name}, or one that needs no options",
            do="make it yourself and pass the live module",
        ) from error
    if not isinstance(made, nn.Module):
        raise RequestError(f"{model}, which makes a {type(made).__name__}", expected="a network", do="check the name")
    return made
