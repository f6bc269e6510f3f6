"""Roles: what each parameter does in its block, so that "queries" and "gates" mean the same in every family."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from neurograft.anatomy.describe import Anatomy, anatomy
from neurograft.core.errors import RequestError, one_of
from neurograft.core.units import Parameters, Part, Site

ROLES = ("q", "k", "v", "o", "gate", "up", "down", "norm", "embedding", "head")
GROUPS: Mapping[str, tuple[str, ...]] = {
    "attention": ("q", "k", "v", "o"),
    "ffn": ("gate", "up", "down"),
    "block": ("q", "k", "v", "o", "gate", "up", "down"),
}


def roles(model: nn.Module) -> dict[str, frozenset[str]]:
    """Return parameter -> its roles, words of `ROLES`; a fused parameter has several, others may have none.

    Biases have the role of their matrix. Projections of attentions beyond q, k, v have none.

    Example:
        >>> from neurograft.worlds.pico import pico
        >>> sorted(roles(pico("gpt2"))["transformer.h.0.attn.c_attn.weight"])
        ['k', 'q', 'v']
    """
    found: dict[str, set[str]] = {}
    known, alias = anatomy(model), Parameters.of(model).alias
    for role, param in _of_blocks(known):
        if param in alias:
            found.setdefault(alias[param], set()).add(role)
    for role, modules in (("norm", known.norms), ("embedding", [known.embedding]), ("head", [known.head])):
        for module in modules:
            for name, _ in model.get_submodule(module).named_parameters(recurse=False) if module else ():
                found.setdefault(alias[f"{module}.{name}"], set()).add(role)
    return {name: frozenset(several) for name, several in found.items()}


def _of_blocks(known: Anatomy) -> Iterable[tuple[str, str]]:
    for block in known.blocks:
        for attention in block.attentions:
            for role, slot in [*attention.made.items(), ("o", attention.o)]:
                if role in ROLES:
                    yield role, slot.matrix.param
                    yield role, slot.matrix.bias or ""
        for ffn in block.ffns:
            for role, made in (("gate", ffn.gate), ("up", ffn.up), ("down", ffn.down)):
                if made is not None:
                    yield role, made.matrix.param
                    yield role, made.matrix.bias or ""


def with_roles(model: nn.Module, sites: Mapping[str, Site], wanted: Sequence[str] | str) -> dict[str, Site]:
    """Return the sites all of whose parameters have the wanted roles.

    Args:
        model: the model.
        sites: sites of it.
        wanted: words of `ROLES` or of `GROUPS`.

    Raises:
        RequestError: an unknown role, a parameter that holds wanted and other roles in one (fused) matrix, or no
            site left.
    """
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    for name in names:
        one_of(name, [*ROLES, *GROUPS], what="role")
    want = {role for name in names for role in GROUPS.get(name, (name,))}
    has, alias, found = roles(model), Parameters.of(model).alias, {}
    for name, site in sites.items():
        several = [has.get(alias[part.param], frozenset[str]()) for part in site.parts]
        fused = next((s for s in several if s & want and not s <= want), None)
        if fused:
            raise RequestError(
                f"the roles {', '.join(sorted(want))} at {name!r}, whose parameter holds {', '.join(sorted(fused))}",
                expected="roles that own whole parameters in this family",
                do=f"add {', '.join(sorted(fused - want))}, or choose units inside the parameter (row, neuron, head)",
            )
        if several and all(s and s <= want for s in several):
            found[name] = site
    if not found:
        raise RequestError(
            f"the roles {', '.join(names)} among {len(sites)} sites, of which none has them",
            expected=f"roles of this model: {', '.join(sorted({r for s in has.values() for r in s}))}",
            do="choose another role or kind of unit",
        )
    return found


def in_decoder(model: nn.Module, sites: Mapping[str, Site]) -> dict[str, Site]:
    """Return the sites that lie in the language decoder of a (multimodal) model; all of them if it has none.

    Raises:
        RequestError: none of them lies in it.
    """
    ask: Any = getattr(model, "get_decoder", None)
    decoder = None if ask is None else ask()
    prefix = next((n for n, m in model.named_modules() if m is decoder), "")
    found = {n: s for n, s in sites.items() if all(p.param.startswith(prefix + ".") for p in s.parts)}
    if not prefix:
        return dict(sites)
    if not found:
        raise RequestError(
            f"{len(sites)} sites outside of the decoder {prefix!r}",
            expected="units of the language model",
            do="leave language out, or choose other units",
        )
    return found


def without_roles(model: nn.Module, sites: Mapping[str, Site], unwanted: Sequence[str] | str) -> dict[str, Site]:
    """Return the sites none of whose parameters has an unwanted role.

    Raises:
        RequestError: an unknown role, or no site left.
    """
    names = [unwanted] if isinstance(unwanted, str) else list(unwanted)
    for name in names:
        one_of(name, [*ROLES, *GROUPS], what="role")
    away = {role for name in names for role in GROUPS.get(name, (name,))}
    has, alias = roles(model), Parameters.of(model).alias
    found = {
        n: s for n, s in sites.items() if not any(has.get(alias[p.param], frozenset[str]()) & away for p in s.parts)
    }
    return _some(found, f"{len(sites)} sites without {', '.join(names)}")


def on_side(model: nn.Module, sites: Mapping[str, Site], side: str) -> dict[str, Site]:
    """Return the sites in what transformers calls the base model, or outside of it, in the task's head.

    Args:
        model: a transformers model for a task.
        sites: sites of it.
        side: "base" or "head".

    Raises:
        RequestError: a model without such a part, or no site left.
    """
    one_of(side, ("base", "head"), what="side")
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not hasattr(model, prefix):
        raise RequestError(
            f"of={side!r} for {type(model).__name__}", expected="a base model with a head on it", do="leave it out"
        )
    alias = Parameters.of(model).alias
    inside = {n: all(alias[p.param].startswith(prefix + ".") for p in s.parts) for n, s in sites.items()}
    return _some({n: s for n, s in sites.items() if inside[n] is (side == "base")}, f"{len(sites)} sites of the {side}")


def single(model: nn.Module, sites: Mapping[str, Site]) -> dict[str, Site]:
    """Return a site of single numbers for each parameter that sites own, named `<parameter>/weight`.

    Example:
        >>> from neurograft.anatomy.sites import sites
        >>> from neurograft.worlds.pico import pico
        >>> model = pico("bert")
        >>> found = single(model, sites(model, "module"))
        >>> sum(s.n for s in found.values()) == sum(p.numel() for p in model.parameters())
        True
    """
    known, found = Parameters.of(model), {}
    for site in sites.values():
        for part in site.parts:
            param = known.alias[part.param]
            shape = known.by_name[param].shape
            grid = ((shape[0], shape[1:].numel()), (shape[1:].numel(), 1)) if len(shape) > 1 else ((shape.numel(), 1),)
            found[f"{param}/weight"] = Site(
                f"{param}/weight", "weight", shape.numel(), (Part(param, grid),), layer=site.layer
            )
    return found


def _some(found: dict[str, Site], what: str) -> dict[str, Site]:
    if not found:
        raise RequestError(f"{what}, of which none is left", expected="at least one", do="ask for others")
    return found
