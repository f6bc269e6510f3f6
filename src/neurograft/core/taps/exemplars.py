"""Finding exemplars: the examples at which units are most active, and their activations in them.

Shape letters: n units, k exemplars, T tokens, h x w positions of a feature map.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.batches import Batch
from neurograft.core.errors import RequestError
from neurograft.core.prompts.examples import size
from neurograft.core.taps.look import look
from neurograft.core.taps.reducers import Exemplars, Sample
from neurograft.core.taps.shown import Exemplified
from neurograft.core.taps.stream import observe
from neurograft.core.taps.tap import per_unit, watch
from neurograft.core.units import Site

SAMPLED = 8192
PICTURED = ("vision", "visual", "image", "projector")  # in the names of modules of two-sided models that see pixels


def exemplify(
    model: nn.Module,
    sites: Mapping[str, Site],
    batches: Sequence[Batch],
    *,
    k: int = 15,
    quantile: float = 0.99,
    sampled: int = SAMPLED,
    seed: int = 0,
) -> dict[str, Exemplified]:
    """Find the k examples with the largest activation of every unit, and the activations in them.

    Args:
        model: run as it is, without gradients, once, and once more on the batches that hold an exemplar.
        sites: what to read; each needs a tap. Units of several features are read as the norm of these.
        batches: model inputs.
        k: exemplars of a unit, by its largest activation over positions; ties go to the earlier example.
        quantile: of a unit's activations over all examples and positions: its level.
        sampled: positions the quantile is taken over; exact up to so many, see `core.taps.reducers.Sample`.
        seed: names that sample.

    Raises:
        RequestError: k or the quantile out of range, a site without a tap, no batches, feature maps of several sizes.

    Example:
        >>> from neurograft.anatomy.sites import sites
        >>> from neurograft.worlds.pico import pico, pico_batch
        >>> net = pico("resnet")
        >>> where = sites(net, "channel", match="*embedder*")
        >>> (found,) = exemplify(net, where, [pico_batch(net, batch=4)], k=2).values()
        >>> found.maps.shape, found.mask(0, (16, 16)).shape
        (torch.Size([8, 2, 8, 8]), torch.Size([2, 16, 16]))
    """
    if k < 1 or not 0 < quantile < 1:
        raise RequestError(f"k={k}, quantile={quantile}", expected="k of at least 1, a quantile in (0, 1)", do="k=15")
    seen = observe(
        model,
        sites,
        batches,
        lambda n: {"top": Exemplars(n, k=k), "all": Sample(n, size=sampled, seed=seed)},
        pool={"top": "max", "all": "token"},
    )
    tops = {name: reducers["top"] for name, reducers in seen.items()}
    examples = {name: top.places[..., 0] for name, top in tops.items() if isinstance(top, Exemplars)}
    maps = _maps(model, sites, batches, examples)
    found = {}
    for name, top in tops.items():
        sample = seen[name]["all"]
        assert isinstance(top, Exemplars)
        assert isinstance(sample, Sample)
        found[name] = Exemplified(top.values, examples[name], sample.quantile(quantile), maps[name])
    return found


def as_seen(model: nn.Module, site: Site, batches: Sequence[Batch]) -> Sequence[Batch]:
    """Return batches of what a site sees: in an encoder-decoder's decoder its own tokens; of images with texts either.

    Args:
        model: the root.
        site: with a tap.
        batches: model inputs.

    Raises:
        RequestError: a decoder whose tokens cannot be told from the batches.
    """
    both = bool(batches) and {"input_ids", "pixel_values"} <= batches[0].keys()
    if both and site.tap is not None:
        other = "input_ids" if any(word in site.tap.module for word in PICTURED) else "pixel_values"
        return [{k: v for k, v in batch.items() if k != other} for batch in batches]
    if _runs_bare(model) or site.tap is None or ".decoder." not in f".{site.tap.module}.":
        return batches
    return [{"input_ids": _decoded(model, batch)} for batch in batches]


def _decoded(model: nn.Module, batch: Batch) -> Tensor:
    made: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    found: Tensor | None = batch.get("decoder_input_ids")
    if found is None and made is not None and "labels" in batch:
        found = made(batch["labels"])
    if found is None:
        raise RequestError(
            f"a {type(model).__name__} and batches of {', '.join(batch)}",
            expected="decoder_input_ids, or labels it can be made from",
            do="give the decoder's tokens, or choose units of the encoder",
        )
    return found


def _runs_bare(model: nn.Module) -> bool:
    """Say whether a model runs without labels: encoder-decoders make their decoder's input from them."""
    return not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def _maps(
    model: nn.Module, sites: Mapping[str, Site], batches: Sequence[Batch], examples: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the activations of every unit in its exemplars, by running their batches once more."""
    wanted = torch.cat([e.reshape(-1) for e in examples.values()]).unique()
    pieces: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in sites}
    grids: dict[str, tuple[int, ...]] = {}
    first = 0

    def read(name: str, x: Tensor) -> None:
        x = per_unit(x)
        rows, at = looking.place()
        assert looking.seen is not None
        lead = looking.seen.lead[1:]
        grid = tuple(lead) if len(lead) == 2 else (max(int(at.max()) + 1, *grids.get(name, (0,))),)
        if len(lead) == 2 and grids.get(name, grid) != grid:
            raise RequestError(
                f"feature maps of {grids[name]} and {grid} at {name}", expected="one size", do="crop or pad the images"
            )
        grids[name] = grid
        for example in (rows.unique() + first).tolist():
            slots = (examples[name] == example).nonzero()
            if len(slots):
                mine = rows + first == example
                pieces[name].append((slots, at[mine], x[mine.to(x.device)].float().cpu()))

    with watch(model, sites, read) as looking, torch.no_grad():
        for batch in batches:
            count = size(batch)
            if bool(((wanted >= first) & (wanted < first + count)).any()):
                look(model, batch)
            first += count
    found = {}
    for name, site in sites.items():
        k = len(examples[name])
        maps = torch.full((site.n, k, math.prod(grids.get(name, (1,)))), -torch.inf)
        for slots, at, x in pieces[name]:
            for slot, unit in slots.tolist():
                maps[unit, slot, at] = x[:, unit]
        found[name] = maps.reshape(site.n, k, *grids.get(name, (1,)))
    return found
