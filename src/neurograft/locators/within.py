"""Another locator, asked about some of the sites only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from neurograft.anatomy.entering import with_streams
from neurograft.anatomy.roles import in_decoder, on_side, single, with_roles, without_roles
from neurograft.core.card import method
from neurograft.core.choose import choose
from neurograft.core.context import Context
from neurograft.core.selection import Scores


@method(takes={"against", "objective", "positions", "target"}, claims={"finite", "length", "permutes"})
def within(
    context: Context,
    *,
    by: Any = "magnitude",
    roles: Sequence[str] | str = (),
    language: bool = False,
    of: str = "all",
    without: Sequence[str] = (),
    streams: bool = False,
    apart: bool = False,
    entries: bool = False,
) -> Scores:
    """Score the units of some roles by another locator, and leave the other sites out of the scores.

    Args:
        context: what the other locator needs.
        by: the other locator: a choice of `locators`.
        roles: q, k, v, o, gate, up, down, norm, embedding, head; or the groups attention, ffn, block (all of the
            seven). Empty for every site.
        language: leave out what lies outside of the model's decoder: vision towers, projectors.
        of: "base" for what the model without its head owns, "head" for the rest, "all" for both.
        without: roles left out, words as for `roles`; parameters without a role stay.
        streams: leave out sub-layers that are not the first of their block, or whose output the block norms or scales
            before it adds it: the residual stream behind those is not known.
        apart: make a site of each part of the units, so that a norm's gains and shifts are units of their own.
        entries: make a site of the single numbers (kind "weight") of each parameter that the units own, whatever their
            kind: with units="module" every number of the model, embeddings and biases too.

    Raises:
        RequestError: an unknown role, one fused with others in a parameter, or no site left.
    """
    sites = dict(context.sites)
    if roles:
        sites = with_roles(context.model, sites, roles)
    if language:
        sites = in_decoder(context.model, sites)
    if of != "all":
        sites = on_side(context.model, sites, of)
    if without:
        sites = without_roles(context.model, sites, without)
    if streams:
        sites = with_streams(context.model, sites)
    if entries:
        sites = single(context.model, sites)
    if apart:
        sites = {
            f"{name}:{part.param.rpartition('.')[2]}": replace(
                site.with_parts(i), name=f"{name}:{part.param.rpartition('.')[2]}", tap=None
            )
            for name, site in sites.items()
            for i, part in enumerate(site.parts)
        }
    asked = choose("locators", by)
    found: Scores = asked(replace(context, sites=sites))
    return replace(found, card={**found.card, "within": list(roles) or None, "asked": asked.as_dict()})
