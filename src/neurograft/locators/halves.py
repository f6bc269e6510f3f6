"""A random half of the modules, drawn by category: what trains in this round and what does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from neurograft.anatomy.roles import GROUPS, roles
from neurograft.core.card import method
from neurograft.core.context import Context
from neurograft.core.errors import RequestError, one_of
from neurograft.core.selection import Scores
from neurograft.core.units import Parameters, Site, census
from neurograft.locators._common import scored

GRANULARITIES = ("category", "layer", "model")
PAIRS = (("q", "o"), ("k", "v"))


@method(
    paper="hft",
    kinds={"module"},
    claims={"finite", "length"},
    departs="Layer and model level are inferred from their names. A category whose modules are not the paper's (q, k, "
    "v fused in one, a plain FFN of two, four norms) is halved as it is. Modules of layers that are of no category "
    "(routers), the final norm and all biases of trained matrices train.",
)
def halves(context: Context, *, granularity: str = "category", pairs: bool = False, round: int = 0) -> Scores:
    """Draw which half of the modules trains: 1 for those that do, 0 for those that stay.

    In every layer half of each category (attention, FFN, norms); of an odd number the larger half in a random half of
    the layers and the smaller one in the others, one layer more having the smaller. What lies in no layer trains.

    Args:
        context: model, and its modules as sites.
        granularity: "category"; "layer": a random half of the layers, whole; "model": half of all modules of layers.
        pairs: of attention one of q and o, and one of k and v: exactly half of the entries also under grouped queries.
        round: names the draw; a round is a task or a stage of training.

    Returns:
        Scores 0 and 1; the card says which share of the entries of layers trains (`share`).

    Raises:
        RequestError: pairs of a model whose queries, keys, values and outputs are not modules of their own.
    """
    one_of(granularity, GRANULARITIES, what="granularity")
    draw = _Draw(context, round)
    free = [n for n, s in context.sites.items() if s.layer is not None]
    if granularity == "layer":
        layers = sorted({s.layer for s in context.sites.values() if s.layer is not None})
        chosen = {str(i) for i in draw.some(list(map(str, layers)), len(layers) // 2, "layers")}
        frozen = {n for n in free if str(context.sites[n].layer) not in chosen}
    elif granularity == "model":
        frozen = set(free) - set(draw.some(free, len(free) // 2, "modules"))
    else:
        frozen = set()
        for category, of_layers in _categories(context).items():
            frozen |= draw.half(category, of_layers, pairs=pairs and category == "attention")
    inside: Mapping[str, Site] = {n: context.sites[n] for n in free}
    trained = census({n: s for n, s in inside.items() if n not in frozen}) / max(1, census(inside))
    values = {n: torch.full((s.n,), float(n not in frozen)) for n, s in context.sites.items()}
    return scored(context, values, {"share": trained, "granularity": granularity, "round": round})


class _Draw:
    def __init__(self, context: Context, number: int) -> None:
        self.context, self.number = context, number

    def some(self, among: Sequence[str], count: int, *names: object) -> list[str]:
        rng = self.context.generator("halves", self.number, *names)
        return [among[int(i)] for i in torch.randperm(len(among), generator=rng)[:count]]

    def half(self, category: str, of_layers: Mapping[int, Mapping[str, frozenset[str]]], *, pairs: bool) -> set[str]:
        """Return the modules of a category that stay."""
        odd = [str(layer) for layer, several in of_layers.items() if len(several) % 2]
        larger = set(self.some(odd, len(odd) // 2, category, "larger"))
        frozen: set[str] = set()
        for layer, several in of_layers.items():
            if pairs:
                frozen |= {self.some(pair, 1, category, layer, i)[0] for i, pair in enumerate(_paired(several))}
            else:
                trained = len(several) // 2 + (str(layer) in larger)
                frozen |= set(self.some(list(several), len(several) - trained, category, layer))
        return frozen


def _categories(context: Context) -> dict[str, dict[int, dict[str, frozenset[str]]]]:
    """Return category -> layer -> module -> its roles."""
    has, alias = roles(context.model), Parameters.of(context.model).alias
    found: dict[str, dict[int, dict[str, frozenset[str]]]] = {}
    for name, site in context.sites.items():
        mine = frozenset(r for part in site.parts for r in has.get(alias[part.param], ()))
        category = next((c for c in ("attention", "ffn") if mine & set(GROUPS[c])), "norm" if "norm" in mine else None)
        if site.layer is not None and category is not None:
            found.setdefault(category, {}).setdefault(site.layer, {})[name] = mine
    return found


def _paired(several: Mapping[str, frozenset[str]]) -> list[list[str]]:
    owner = {next(iter(r)): n for n, r in several.items() if len(r) == 1}
    if set(owner) != {"q", "k", "v", "o"} or len(several) != 4:
        raise RequestError(
            f"pairs among the modules {', '.join(several)}",
            expected="modules of their own for queries, keys, values and outputs",
            do="leave pairs out",
        )
    return [[owner[role] for role in pair] for pair in PAIRS]
