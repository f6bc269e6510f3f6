"""A mask over the chosen numbers: which of them stay, or which go over to a tuned model's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn

from neurograft.adapters._masked import MaskMount
from neurograft.core.card import method
from neurograft.core.compact.mask import Mask
from neurograft.core.compact.mount import Mount, regions_of
from neurograft.core.errors import RequestError, one_of
from neurograft.core.grafts.graft import Graft
from neurograft.core.selection import Selection


@method(claims={"undo", "only_the_selection", "zero_graft", "live_model", "resume", "coordinates"})
def mask(
    model: nn.Module,
    where: Selection | None,
    *,
    new: Iterable[str] | Mapping[str, int] = (),
    protect: Selection | None = None,
    toward: Any = None,
    shape: str = "straight",
    at: float | None = None,
    patch: float | None = None,
    tied: Literal["refuse", "both"] = "refuse",
    allow_dense: bool = False,
    seed: int = 0,
) -> Mount:
    """Train x = off + m * (on - off) for the numbers that the selected units own; only m moves.

    Without `toward`, off = 0 and on = the base's number, and the graft is the set of numbers shut: a bit each. With
    it, off = the base's number and on = the tuned one's, and the graft is a part of the tuned change. Weights keep
    their place and kernels; what is held beside them are s, the base's numbers and the tuned ones.

    Args:
        model: any module; everything else in it is frozen meanwhile.
        where: the units.
        new: parameters the base's checkpoint lacks, trained whole.
        protect: units whose numbers must not move.
        toward: a graft of this model, or a tuned copy of it; None for a mask over the base itself.
        shape: how m depends on s: one of `core.compact.mask.SHAPES`. Shapes other than "straight" train a soft m, which
            the graft rounds.
        at: threshold of "straight" (0.005; s begins at twice that), offset of "flip" (10).
        patch: share of the numbers, those that differ most from the tuned ones, whose m is 1 at the start; for "flip".
        tied: what to do with a parameter that has two names: "refuse", or mask it for "both".
        allow_dense: accept a dense gradient where an operation on a selected weight is not known.
        seed: names the start of "flip".

    Raises:
        RequestError: no selection, one that touches nothing or that another graft changes; a tuned model of another
            shape, or one that differs nowhere in the selection; a patch without `toward`.
    """
    if where is None:
        raise RequestError(
            "a mask without a selection", expected="the units it may shut", do="select them, e.g. all of kind 'column'"
        )
    if patch is not None and (toward is None or shape != "flip" or not 0 <= patch <= 1):
        raise RequestError(
            f"patch={patch} with toward={type(toward).__name__} and shape={shape!r}",
            expected="a share from 0 to 1, a tuned model and shape='flip'",
            do="mask(toward=graft, shape='flip', patch=0.01)",
        )
    if toward is not None and not isinstance(toward, (Graft, nn.Module)):
        raise RequestError(
            f"toward={type(toward).__name__}", expected="a graft or a tuned model", do="ng.Graft.load(folder)"
        )
    one_of(tied, ("refuse", "both"), what="rule for tied weights")
    how = Mask(shape, (10.0 if shape == "flip" else 5e-3) if at is None else at)
    regions = regions_of(model, where, protect=protect, tied=tied)
    return MaskMount(
        model, regions, new=new, allow_dense=allow_dense, mask=how, toward=toward, patch=patch or 0.0, seed=seed
    )
