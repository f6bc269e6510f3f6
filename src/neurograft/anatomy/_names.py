"""Names of repeated modules: which numbers in them only count layers, experts and the like."""

from __future__ import annotations

from torch import nn

from neurograft.anatomy.inventory import Inventory


def numbered(inventory: Inventory, name: str) -> bool:
    """Say whether a module is one of several of one class in a list, as the layers of a network are.

    Some lists of experts are dictionaries: "expert_3".
    """
    parent, _, last = name.rpartition(".")
    held = inventory.modules.get(parent)
    if not last[-1:].isdigit() or not isinstance(held, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
        return False
    return len({type(child) for child in held.children()}) == 1


def pattern(inventory: Inventory, name: str) -> str:
    """Return a module's name with the numbers of repeated modules as "#"."""
    steps, found = name.split("."), []
    for i, step in enumerate(steps):
        found.append("#" if numbered(inventory, ".".join(steps[: i + 1])) else step)
    return ".".join(found)


def repeated(inventory: Inventory, name: str) -> list[str]:
    """Return the repeated modules that hold a module, or are it, the innermost first."""
    steps = name.split(".")
    above = (".".join(steps[:i]) for i in range(len(steps), 0, -1))
    return [a for a in above if numbered(inventory, a)]
