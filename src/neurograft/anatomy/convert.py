"""From units of one kind to units of another: those that own the same numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from neurograft.core.errors import RequestError
from neurograft.core.selection import Selection
from neurograft.core.units import Site


def convert(selection: Selection, to: Mapping[str, Site], *, whole: bool = True) -> Selection:
    """Return the units among `to` all of whose numbers the selected units own; or any of them, with whole=False.

    A neuron chosen by its gate (`at="gate"`) is the same neuron by its activation; it is a row of the gate and of
    the up projection and a column of the down projection; whole layers are all of their neurons. A row alone is no
    neuron, and a query head no key/value head that others share: such conversions are refused, not guessed.

    Args:
        selection: units of any kind.
        to: sites of the same model, of another kind or `at`.
        whole: False takes every unit that owns a selected number, such as the neurons that rows belong to.

    Raises:
        RequestError: no unit of `to` consists of numbers that are selected.

    Example:
        >>> from neurograft.anatomy.sites import sites
        >>> from neurograft.worlds.pico import pico
        >>> model = pico("llama")
        >>> neurons = Selection.of(sites(model, "neuron", layers=0), {"model.layers.0.mlp/neuron": [3]})
        >>> columns = convert(neurons, sites(model, "column", layers=0))
        >>> {name: ids.tolist() for name, ids in columns.ids.items() if len(ids)}
        {'model.layers.0.mlp.down_proj/column': [3]}
    """
    owned = _owned(selection, to)
    ids = {name: _covered(site, owned, whole) for name, site in to.items()}
    if not any(len(chosen) for chosen in ids.values()):
        kinds = {f"{s.kind}@{s.at}" if s.at else s.kind for s in to.values()}
        raise RequestError(
            f"a selection that holds no {'whole unit' if whole else 'number'} of kind {', '.join(sorted(kinds))}",
            expected="units that own numbers of some other unit",
            do="convert toward smaller units, or locate units of that kind",
        )
    return Selection.of(to, ids, {"rule": "convert", "of": [selection.origin()]})


def _owned(selection: Selection, to: Mapping[str, Site]) -> dict[str, Tensor]:
    """Return parameter -> bool mask over its entries, as far as the selection and the targets reach."""
    size: dict[str, int] = {}
    for site in (*selection.sites.values(), *to.values()):
        for part in site.parts:
            last = part.flat(torch.tensor([part.n - 1])).max()
            size[part.param] = max(size.get(part.param, 0), int(last) + 1)
    owned = {param: torch.zeros(n, dtype=torch.bool) for param, n in size.items()}
    for name, ids in selection.ids.items():
        for part in selection.sites[name].parts:
            if len(ids):
                owned[part.param][part.flat(ids).reshape(-1)] = True
    return owned


def _covered(site: Site, owned: Mapping[str, Tensor], whole: bool) -> Tensor:
    every = torch.arange(site.n)
    found = torch.full((site.n,), whole)
    for part in site.parts:
        if not bool(owned[part.param].any()):
            if whole:
                return torch.empty(0, dtype=torch.int64)
            continue
        mine = owned[part.param][part.flat(every)]
        found = found & mine.all(1) if whole else found | mine.any(1)
    return found.nonzero().reshape(-1) if site.parts else torch.empty(0, dtype=torch.int64)
