"""Exemplars: the examples at which units are most active, and the places in them where they are.

Shape letters: n units, k exemplars, T tokens, h x w positions of a feature map, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurograft.core.batches import Batch
from neurograft.core.errors import RequestError
from neurograft.core.prompts.examples import size
from neurograft.core.taps.look import look
from neurograft.core.taps.reducers import Exemplars, Sample
from neurograft.core.taps.stream import observe
from neurograft.core.taps.tap import per_unit, watch
from neurograft.core.units import Site

SAMPLED = 8192
PICTURED = ("vision", "visual", "image", "projector")  # in the names of modules of two-sided models that see pixels


@dataclass(frozen=True)
class Shown:
    """What a unit is described by: its exemplars and where in them it is active.

    Args:
        inputs: pixels, float [k, C, H, W], or tokens, int64 [k, T].
        masks: bool [k, H, W] or [k, T]; padding is never in them.
    """

    inputs: Tensor
    masks: Tensor


@dataclass(frozen=True)
class Exemplified:
    """The exemplars of a site's units.

    Args:
        values: largest activation in each exemplar, strongest first, float [k, n]; -inf where there are fewer.
        examples: which example it is, int64 [k, n]; -1 where there are fewer.
        level: each unit's own quantile over all examples and positions, float [n].
        maps: activations in the exemplars, float [n, k, h, w] or [n, k, T]; -inf where no activation is.
    """

    values: Tensor
    examples: Tensor
    level: Tensor
    maps: Tensor

    def mask(self, unit: int, pixels: tuple[int, int] | None = None) -> Tensor:
        """Return where a unit is above its level in its exemplars, bool [k, h, w], [k, T], or [k, *pixels].

        Where its level is its maximum, which many equal contexts can share, the places at it count; a constant unit
        is nowhere above.

        Args:
            unit: its number.
            pixels: size of the images, to which maps are up-sampled bilinearly before they are cut. Tokens of a square
                image are laid out as a square, without the ones that stand before its patches.

        Raises:
            RequestError: pixels for the tokens of an image that is no square.
        """
        maps = self.maps[unit][self.examples[:, unit] >= 0]
        if pixels is not None:
            maps = _grid(maps, pixels) if maps.dim() == 2 else maps
            maps = F.interpolate(maps[:, None], size=pixels, mode="bilinear", align_corners=False)[:, 0]
        level = self.level[unit]
        above = maps > level
        if not bool(above.any()) and bool((maps.isfinite() & (maps < level)).any()):
            above = maps >= level
        return above

    def shown(self, unit: int, batches: Sequence[Batch]) -> Shown:
        """Return a unit's exemplars and masks as a describer takes them; exemplars without any mask are left out.

        Args:
            unit: its number.
            batches: those the exemplars were taken from.

        Raises:
            RequestError: neither pixels nor tokens, or images of several sizes.
        """
        chosen = [e for e in self.examples[:, unit].tolist() if e >= 0]
        if not chosen:  # an expert that no token was sent to
            return Shown(torch.empty(0, 0, dtype=torch.int64), torch.empty(0, 0, dtype=torch.bool))
        inputs = _inputs(batches, chosen)
        pixels = (inputs.shape[-2], inputs.shape[-1]) if inputs.dim() == 4 else None
        masks = self.mask(unit, pixels)
        if pixels is None:
            masks = F.pad(masks, (0, max(0, inputs.shape[1] - masks.shape[1])))[:, : inputs.shape[1]]
        keep = masks.flatten(1).any(1)
        return Shown(inputs[keep], masks[keep])


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
        sampled: positions the quantile is taken over; exact up to so many, see `core.stream.Sample`.
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


def _grid(maps: Tensor, pixels: tuple[int, int]) -> Tensor:
    """Lay the tokens of square images out, [k, T] to [k, g, g]."""
    if pixels[0] != pixels[1]:
        raise RequestError(
            f"tokens of images of {pixels[0]} x {pixels[1]}",
            expected="square images",
            do="bring the images to a square",
        )
    side = math.isqrt(maps.shape[1])
    return maps[:, maps.shape[1] - side * side :].reshape(-1, side, side)


def _inputs(batches: Sequence[Batch], chosen: Sequence[int]) -> Tensor:
    """Return the pixels or tokens of some examples; tokens padded on the right."""
    name = next((n for n in ("pixel_values", "input_ids") if batches and n in batches[0]), None)
    if name is None:
        raise RequestError(
            f"examples of {', '.join(batches[0]) if batches else 'nothing'}",
            expected="pixel_values or input_ids",
            do="give images or texts",
        )
    rows: list[Tensor] = [row for batch in batches for row in batch[name]]
    if name == "input_ids":
        return torch.nn.utils.rnn.pad_sequence([rows[e].cpu() for e in chosen], batch_first=True)
    if len({rows[e].shape for e in chosen}) != 1:
        raise RequestError("images of several sizes", expected="one size", do="bring the images to one size")
    return torch.stack([rows[e].float().cpu() for e in chosen])
