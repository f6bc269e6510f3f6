"""Where the queries, keys and values of attention heads pass, before positions are put into them."""

from __future__ import annotations

from torch import nn

from neurograft.anatomy._reading import label, tap
from neurograft.anatomy.describe import anatomy
from neurograft.core.errors import RequestError, one_of
from neurograft.core.units import Site

LETTERS = {"queries": "q", "keys": "k", "values": "v"}


def projections(model: nn.Module, of: str) -> dict[str, Site]:
    """Return the site of each attention's queries, keys or values, by the name of the site of its heads.

    They are for reading and changing while the model runs: no numbers are owned. Keys and values that queries share
    are fewer than the heads; head h of n reads number h // (n / fewer).

    Args:
        model: any model whose attentions are known.
        of: "queries", "keys" or "values".

    Raises:
        RequestError: another word, or a model that makes them in no module of their own.

    Example:
        >>> from neurograft.worlds.pico import pico
        >>> found = projections(pico("gpt2"), "keys")
        >>> [(s.n, s.tap.module, s.tap.start) for s in found.values()][0]
        (4, 'transformer.h.0.attn.c_attn', 32)
    """
    letter, found = LETTERS[one_of(of, LETTERS, what="projection of an attention")], {}
    for block in anatomy(model).blocks:
        for attention in block.attentions:
            slot = attention.made.get(letter)
            passes = None if slot is None else tap(slot, "output")
            if slot is None or passes is None:
                raise RequestError(
                    f"{of} of {attention.module}, which no module makes alone",
                    expected="an attention with projections of queries, keys and values",
                    do="choose another model, or patch into the logits",
                )
            name = label(attention.module, "head")
            found[name] = Site(f"{name}@{letter}", "head", slot.span.n, (), passes, None, letter)
    return found
