"""ANet: features of a located face, from filters that differ from place to place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from neurograft.core.card import method
from neurograft.core.errors import RequestError
from neurograft.core.seeds import seeded
from neurograft.core.units import Part, Site, Tap
from neurograft.networks._tagged import Tagged, attribute_loss, rectified
from neurograft.networks.locally_shared_conv2d import LocallySharedConv2d


@method(
    paper="lnet-anet",
    departs="Patches run side by side as a batch; the paper's interweaved evaluation shares work between them and "
    "gives the same numbers. Sizes are options.",
)
class ANet(nn.Module):
    """Four convolutions, max-poolings after the first three, one fully connected layer of units.

    The first two convolutions share their filters everywhere, the last two within the cells of a grid.

    Args:
        labels: how many attributes, A.
        identities: how many identities it can be pre-trained on, I.
        size: side of its input, a multiple of 8.
        channels: of the images.
        filters: of the four convolutions.
        kernels: sides of their filters, odd.
        grids: cells each way in the third and in the fourth convolution.
        features: units of the fully connected layer, F.
        seed: names the weights.

    Raises:
        RequestError: not four filters and kernels and two grids, or a size that these do not divide.

    Example:
        >>> out = ANet(size=16)(torch.zeros(2, 4, 3, 16, 16))
        >>> out.features.shape, out.logits.shape
        (torch.Size([2, 4, 64]), torch.Size([2, 6]))
    """

    def __init__(
        self,
        *,
        labels: int = 6,
        identities: int = 64,
        size: int = 16,
        channels: int = 3,
        filters: Sequence[int] = (16, 32, 32, 32),
        kernels: Sequence[int] = (5, 3, 3, 3),
        grids: Sequence[int] = (2, 2),
        features: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if len(filters) != 4 or len(kernels) != 4 or len(grids) != 2:
            raise RequestError(
                f"filters {tuple(filters)}, kernels {tuple(kernels)}, grids {tuple(grids)}",
                expected="four filters, four kernels, two grids",
                do="give a number for each layer",
            )
        if size % 8 or (size // 4) % grids[0] or (size // 8) % grids[1]:
            raise RequestError(
                f"an input of {size} pixels with grids of {tuple(grids)} cells",
                expected="a multiple of 8, whose quarter the first and whose eighth the second grid divides",
                do="choose another size, such as 16, or other grids",
            )
        self.size = size
        with seeded(seed, "anet"):
            wide, cells = (channels, *filters), (1, 1, *grids)
            self.convs = nn.ModuleList(
                LocallySharedConv2d(a, b, k, grid=g) if g > 1 else nn.Conv2d(a, b, k, padding=k // 2)
                for a, b, k, g in zip(wide, filters, kernels, cells)
            )
            rectified(self.convs)
            self.fc = nn.Linear(filters[-1] * (size // 8) ** 2, features)
            self.act = nn.ReLU()
            self.attributes = nn.Linear(features, labels)
            self.identities = nn.Linear(features, identities)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tagged:
        """Return units and logits of patches.

        Args:
            pixel_values: [B, P, channels, size, size], or without P for one patch.
            labels: 0 or 1, [B, A]; the logits' mean over patches is held against them.

        Raises:
            RequestError: another size.
        """
        patches = pixel_values if pixel_values.dim() == 5 else pixel_values[:, None]
        if patches.shape[-2:] != (self.size, self.size):
            raise RequestError(
                f"patches of {' x '.join(map(str, patches.shape[-2:]))}",
                expected=f"{self.size} x {self.size}",
                do="make the network with size= the patches' side",
            )
        maps = patches.flatten(0, 1)
        for i, conv in enumerate(self.convs):
            maps = conv(maps).relu()
            if i < 3:
                maps = nn.functional.max_pool2d(maps, 2)
        features = self.act(self.fc(maps.reshape(*patches.shape[:2], -1)))
        logits = self.attributes(features).mean(1)
        return Tagged(
            loss=attribute_loss(logits, labels),
            logits=logits,
            features=features,
            identities=self.identities(features),
        )


def units_of(net: nn.Module, name: str = "fc/units") -> Site:
    """Return the units of an ANet's fully connected layer as they act, behind the rectifier."""
    fc: Any = net.fc
    parts = (Part.rows("fc.weight", tuple(fc.weight.shape)), Part.entries("fc.bias", fc.out_features))
    return Site(name, "neuron", fc.out_features, parts, Tap("act"))


anet = ANet  # a method is named by its file
