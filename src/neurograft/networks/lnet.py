"""LNet: a network that learns tags of whole images, and shows where they come from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from neurograft.core.card import method
from neurograft.core.errors import RequestError, one_of
from neurograft.core.seeds import seeded
from neurograft.networks._tagged import Tagged, attribute_loss, rectified

POOLS = ("max", "mean")


@method(
    paper="lnet-anet",
    departs="The maps of the last convolution are pooled over space in front of the logistic outputs, which lets the "
    "network take images of any size. Sizes are options; the first layer of the paper's has 96 filters of 11 x 11.",
)
class LNet(nn.Module):
    """Five convolutions with globally shared filters, max-poolings after the first two, logistic outputs for tags.

    Args:
        labels: how many tags, A.
        channels: of the images.
        filters: of the five convolutions.
        kernels: sides of their filters, odd.
        pool: how the last maps become one number a channel: their "max", which makes the response sharp, or "mean".
        seed: names the weights.

    Raises:
        RequestError: not five filters and five odd kernels, or an unknown pool.

    Example:
        >>> out = LNet(labels=4)(torch.zeros(2, 3, 32, 32))
        >>> out.logits.shape, out.response.shape
        (torch.Size([2, 4]), torch.Size([2, 8, 8]))
    """

    def __init__(
        self,
        *,
        labels: int = 6,
        channels: int = 3,
        filters: Sequence[int] = (16, 32, 32, 32, 64),
        kernels: Sequence[int] = (5, 3, 3, 3, 3),
        pool: str = "max",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if len(filters) != 5 or len(kernels) != 5 or not all(k % 2 for k in kernels):
            raise RequestError(
                f"filters {tuple(filters)} and kernels {tuple(kernels)}",
                expected="five of each, the kernels odd",
                do="give a number for each of the five convolutions",
            )
        self.pool = one_of(pool, POOLS, what="pool")
        wide = (channels, *filters)
        with seeded(seed, "lnet"):
            self.convs = nn.ModuleList(nn.Conv2d(a, b, k, padding=k // 2) for a, b, k in zip(wide, filters, kernels))
            rectified(self.convs)
            self.tags = nn.Linear(filters[-1], labels)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tagged:
        """Return logits and the response map of images [B, channels, H, W]; with labels [B, A] also the loss."""
        maps = pixel_values
        for i, conv in enumerate(self.convs):
            maps = conv(maps).relu()
            if i < 2:
                maps = nn.functional.max_pool2d(maps, 2)
        pooled = maps.amax((2, 3)) if self.pool == "max" else maps.mean((2, 3))
        logits = self.tags(pooled)
        return Tagged(loss=attribute_loss(logits, labels), logits=logits, response=maps.mean(1))


lnet = LNet  # a method is named by its file
