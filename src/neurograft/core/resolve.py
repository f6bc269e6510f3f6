"""From dotted names to callables: the one place where lower layers reach upward."""

from __future__ import annotations

import importlib
from typing import Any

from neurograft.core.errors import RequestError, near


def resolve(dotted: str) -> Any:
    """Return what a dotted name stands for.

    A method is named by its file: `neurograft.selectors.top` is the function `top` of that module. Any other
    module's attribute is named in full, `package.module.attribute`, also in somebody else's package.

    Raises:
        RequestError: no such module or attribute.

    Example:
        >>> resolve("neurograft.core.resolve").__name__
        'resolve'
    """
    parent, _, last = dotted.rpartition(".")
    if not parent or not all(part.isidentifier() for part in dotted.split(".")):
        raise RequestError(
            f"the name {dotted!r}",
            expected="a dotted name such as neurograft.selectors.top",
            do="write the package and module too",
        )
    try:
        module = importlib.import_module(dotted)
    except ModuleNotFoundError as error:
        if error.name is None or not (dotted + ".").startswith(error.name + "."):
            raise  # the module exists and lacks one of its own imports
        return _attribute(parent, last, dotted)
    return getattr(module, last, module)


def _attribute(parent: str, last: str, dotted: str) -> Any:
    try:
        module = importlib.import_module(parent)
    except ModuleNotFoundError as error:
        if error.name is None or not (parent + ".").startswith(error.name + "."):
            raise
        raise RequestError(
            f"the name {dotted!r}",
            expected="a module and an attribute in it",
            do=f"check {parent!r}, which cannot be imported",
        ) from error
    if not hasattr(module, last):
        names = [n for n in vars(module) if not n.startswith("_")]
        raise RequestError(f"the name {dotted!r}", expected=f"an attribute of {parent}", do=near(last, names))
    return getattr(module, last)
