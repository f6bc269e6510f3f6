"""Selections by hand over any model, and the literal dense twin of compact training."""

from __future__ import annotations

import torch

from neurograft.core.choose import choose, methods
from neurograft.core.compact.mount import matrix_of, regions_of
from neurograft.core.errors import RequestError
from neurograft.core.seeds import generator
from neurograft.core.selection import Selection
from neurograft.core.units import Part, Site
from neurograft.worlds.pico import pico, pico_batch

LAYOUTS = ("rows", "cols", "block", "flat", "all")


def sites_of(model, name, weight, layout):
    """Sites that own a parameter by rows, columns, blocks, entries or whole; the nearest that fits it."""
    shape = tuple(weight.shape)
    matrix = bank, rows, columns = matrix_of(model, name, shape)
    if layout == "all":
        return [Site(name, "module", 1, (Part.whole(name, weight.numel()),))]
    if len(shape) < 2 or (layout == "block" and (bank > 1 or rows % 2 or columns % 2)):
        layout = "flat"
    if layout == "rows":
        return [Site(name, "row", bank * rows, (Part.rows(name, matrix),))]
    if layout == "cols":
        one = (rows, columns) if bank == 1 else shape
        return [Site(f"{name}/{e}", "column", columns, (Part.columns(name, one, bank=e),)) for e in range(bank)]
    if layout == "block":
        return [Site(name, "block", rows * columns // 4, (Part.blocks(name, (rows, columns), (2, 2)),))]
    return [Site(name, "weight", weight.numel(), (Part.entries(name, weight.numel()),))]


def some_of(model, layouts=LAYOUTS, *, match="", turn=0, fraction=0.3, seed=0):
    """Choose about a third of every parameter whose name holds `match`, the layouts taken in turn."""
    sites, ids = {}, {}
    named = [(n, p) for n, p in model.named_parameters() if p.is_floating_point() and match in n]
    for number, (name, weight) in enumerate(named):
        for site in sites_of(model, name, weight, layouts[(number + turn) % len(layouts)]):
            sites[site.name] = site
            count = max(1, int(site.n * fraction))
            ids[site.name] = torch.randperm(site.n, generator=generator(seed, site.name))[:count]
    return Selection.of(sites, ids)


def regions(model, where):
    """The selection's entries by parameter."""
    return regions_of(model, where, tied="both")


def dense_gradients(model, loss):
    """The gradient of every parameter, by setting all of them free."""
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    model.requires_grad_(True)
    loss(model).backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name]).grad = None
    return found


def bits(model):
    """A bitwise copy of a model's state."""
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same_bits(a, b):
    """Whether two states hold the same bits; -0.0 is not 0.0 and NaN is NaN."""
    return a.keys() == b.keys() and all(
        torch.equal(a[k].contiguous().view(torch.uint8), b[k].contiguous().view(torch.uint8)) for k in a if a[k].dim()
    )


def adapters(claim):
    """Every adapter that claims a promise, found in the folder."""
    return [name for name in methods("adapters") if claim in choose("adapters", name).card.claims]


def attached(name, model, **options):
    """Attach an adapter to the first selection it accepts: parts of weights, whole parameters, everything."""
    refused = []
    for where in (some_of(model, match="weight"), some_of(model, ("all",), match="proj"), None):
        try:
            return choose("adapters", name, **options)(model, where)
        except RequestError as error:
            refused.append(str(error))
    raise AssertionError(f"{name} accepts none of the selections: {refused}")


def loss_of(batch):
    """The model's loss on a batch, or the mean square of its first output."""

    def loss(model):
        out = model(**batch)
        return out.loss if getattr(out, "loss", None) is not None else out[0].pow(2).mean()

    return loss


def exact(family, **config):
    """A pico model in float64 with its loss; expert banks one by one, as their fused kernel has no float64."""
    model = pico(family, dtype=torch.float64, **config)
    if getattr(model.config, "_experts_implementation", None):
        model.set_experts_implementation("eager")
    batch = pico_batch(model)
    return model, loss_of({k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
