"""What parts of pictures look like, in numbers without any training."""

from __future__ import annotations

import torch
from torch import Tensor


def regions(images: Tensor, masks: Tensor) -> Tensor:
    """Return features of the masked parts of images, float [k, 5 C + 11].

    Mean and spread of each channel inside and its mean outside of the mask, and these relative to each other; how
    colourful it is; edges across and along; where it is, how far from the middle and from a corner, how wide, how
    large. Images are brought to mean 0 and standard deviation 1 over the whole set first.

    Args:
        images: float [k, C, H, W].
        masks: bool [k, H, W], none of them empty.
    """
    images = (images - images.mean()) / images.std().clamp(min=1e-6)
    inside, outside = _shares(masks), _shares(~masks)
    mean, other = (torch.einsum("kchw,khw->kc", images, m) for m in (inside, outside))
    spread = (torch.einsum("kchw,khw->kc", images.square(), inside) - mean.square()).clamp(min=0).sqrt()
    grey = images.mean(1)
    down = torch.diff(grey, dim=1, prepend=grey[:, :1]).abs()
    across = torch.diff(grey, dim=2, prepend=grey[:, :, :1]).abs()
    edges = torch.stack([(e * inside).sum((1, 2)) for e in (down, across, down + across - (down - across).abs())], 1)
    y, x = (torch.linspace(-1, 1, n) for n in images.shape[-2:])
    at = torch.stack([(inside * y[:, None]).sum((1, 2)), (inside * x[None]).sum((1, 2))], 1)
    wide = torch.stack(
        [
            (inside * (y[:, None] - at[:, :1, None]).square()).sum((1, 2)),
            (inside * (x[None] - at[:, 1:, None]).square()).sum((1, 2)),
        ],
        1,
    ).sqrt()
    place = torch.cat([at, at.abs(), at.abs().prod(1, keepdim=True)], 1)
    colourful = mean.std(1, keepdim=True, unbiased=False)
    return torch.cat([mean, spread, other, mean - other, (mean - other).abs(), colourful, edges, place, wide], 1)


def _shares(masks: Tensor) -> Tensor:
    """Return masks that each add up to 1; all alike where one is empty."""
    flat = masks.float()
    total = flat.sum((1, 2), keepdim=True)
    return torch.where(total > 0, flat / total.clamp(min=1), torch.full_like(flat, 1 / flat[0].numel()))
