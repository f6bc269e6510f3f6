"""LNets that find a face and an ANet that describes it, as one network from images to attributes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.card import method
from neurograft.core.errors import RequestError, one_of
from neurograft.core.seeds import derive
from neurograft.networks._tagged import Tagged, attribute_loss
from neurograft.networks.anet import ANet
from neurograft.networks.lnet import LNet
from neurograft.networks.localise import WAYS, localise


@method(paper="lnet-anet")
class Cascade(nn.Module):
    """One LNet after the other cuts a smaller window out of the image; an ANet reads patches of the last one.

    `logits` are those of one linear classifier an attribute, `svm`, over the units of all patches side by side; they
    are 0 until it is solved for. Windows are cut at whole pixels and kept inside of the image.

    Args:
        labels: how many attributes, A.
        identities: how many identities the ANet can be pre-trained on, I.
        windows: side of the window behind each LNet, the first (head and shoulders) wider than the last (the face).
        patch: side of a patch, the ANet's input.
        stride: pixels between patches, which tile the last window from edge to edge.
        localise: "peaks" or "threshold"; see `localise`.
        share: as there.
        apart: as there.
        lnet: more options of every `LNet`.
        anet: more options of the `ANet`.
        seed: names the weights.

    Raises:
        RequestError: windows that grow, or that patches do not tile.

    Example:
        >>> net = Cascade(windows=(24, 20))
        >>> x = torch.zeros(2, 3, 32, 32)
        >>> net(x).logits.shape, net.patches(x).shape
        (torch.Size([2, 6]), torch.Size([2, 4, 3, 16, 16]))
    """

    def __init__(
        self,
        *,
        labels: int = 6,
        identities: int = 64,
        windows: Sequence[int] = (24, 20),
        patch: int = 16,
        stride: int = 4,
        localise: str = "peaks",
        share: float = 0.4,
        apart: float = 2.0,
        lnet: dict[str, Any] | None = None,
        anet: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        rest = windows[-1] - patch if windows else -1
        if rest < 0 or stride < 1 or rest % stride or list(windows) != sorted(windows, reverse=True):
            raise RequestError(
                f"windows {tuple(windows)}, patches of {patch} every {stride}",
                expected="windows that shrink, the last a patch plus a multiple of the stride wide",
                do="windows=(24, 20), patch=16, stride=4",
            )
        self.windows, self.patch, self.stride = tuple(windows), patch, stride
        self.by, self.share, self.apart = one_of(localise, WAYS, what="way to localise"), share, apart
        self.labels, self.identities = labels, identities
        self.lnets = nn.ModuleList(
            LNet(labels=labels, seed=derive(seed, "level", i), **(lnet or {})) for i in range(len(windows))
        )
        self.anet = ANet(labels=labels, identities=identities, size=patch, seed=seed, **(anet or {}))
        self.svm = nn.Linear((rest // stride + 1) ** 2 * self.anet.fc.out_features, labels)
        nn.init.zeros_(self.svm.weight)
        nn.init.zeros_(self.svm.bias)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tagged:
        """Return the attributes' logits of images [B, channels, H, W], and the loss if labels [B, A] are given."""
        features = self.anet(self.patches(pixel_values)).features
        logits = self.svm(features.flatten(1))
        return Tagged(loss=attribute_loss(logits, labels), logits=logits, features=features)

    def patches(self, pixel_values: Tensor) -> Tensor:
        """Return overlapping patches of the last window, [B, P, channels, patch, patch], row by row."""
        window = self.window(pixel_values)
        wide = window.unfold(2, self.patch, self.stride).unfold(3, self.patch, self.stride)
        return wide.permute(0, 2, 3, 1, 4, 5).flatten(1, 2).contiguous()

    def window(self, pixel_values: Tensor, level: int | None = None) -> Tensor:
        """Return what the first `level` LNets cut out; all of them if None, the image itself for 0."""
        for i in range(len(self.windows) if level is None else level):
            pixel_values = cut(pixel_values, self.where(pixel_values, i), self.windows[i])
        return pixel_values

    @torch.no_grad()
    def where(self, pixel_values: Tensor, level: int = 0) -> Tensor:
        """Return the middle of the densest place in what an LNet is shown, in pixels (down, right), float32 [B, 2]."""
        response = self.lnets[level](pixel_values).response
        boxes = localise(response, by=self.by, share=self.share, apart=self.apart)
        cell = torch.tensor([pixel_values.shape[i + 2] / response.shape[i + 1] for i in range(2)])
        return torch.stack([(b[0, :2] + b[0, 2:]).cpu() / 2 for b in boxes]) * cell


cascade = Cascade  # a method is named by its file


def cut(images: Tensor, middle: Tensor, side: int) -> Tensor:
    """Return square windows around a place of each image, moved inside where they would stick out.

    Args:
        images: [B, channels, H, W].
        middle: [B, 2], in pixels.
        side: of the windows.

    Raises:
        RequestError: windows larger than the images.

    Example:
        >>> cut(torch.arange(16.0).reshape(1, 1, 4, 4), torch.tensor([[0.0, 3.0]]), 2).tolist()
        [[[[2.0, 3.0], [6.0, 7.0]]]]
    """
    size = torch.tensor(images.shape[2:])
    if side > int(size.min()):
        raise RequestError(
            f"windows of {side} pixels for images of {' x '.join(map(str, images.shape[2:]))}",
            expected="windows inside of the image",
            do="choose smaller windows=, or larger images",
        )
    corner = (middle - side / 2).round().long().clamp(min=0).minimum(size - side).to(images.device)
    rows, columns = (corner[:, i, None] + torch.arange(side, device=images.device) for i in range(2))
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    found: Tensor = images[batch, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
    return found
