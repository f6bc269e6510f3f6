"""An encoder of masked images: features of a vision model at several depths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurograft.core.errors import RequestError


class Pyramid:
    """At each depth, feature maps times the down-sampled mask that adds up to 1, summed; depths side by side.

    Args:
        model: a vision model that takes `pixel_values`; run as it is.
        modules: names of modules whose output is a feature map [k, C, h, w].

    Raises:
        RequestError: no such module, or an output of another shape.

    Example:
        >>> from transformers import ResNetConfig, ResNetModel
        >>> net = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).eval()
        >>> encode = Pyramid(net, ["embedder.embedder", "encoder.stages.1"])
        >>> encode(torch.randn(2, 3, 32, 32), torch.ones(2, 32, 32, dtype=torch.bool)).shape
        torch.Size([2, 24])
    """

    def __init__(self, model: nn.Module, modules: Sequence[str]) -> None:
        known = dict(model.named_modules())
        odd = [name for name in modules if name not in known]
        if odd or not modules:
            raise RequestError(
                f"the modules {list(modules)}", expected="names of its modules", do="see model.named_modules()"
            )
        self.model, self.modules = model, list(modules)

    @torch.no_grad()
    def __call__(self, images: Tensor, masks: Tensor) -> Tensor:
        """Return features of images [k, C, H, W] inside masks [k, H, W], float [k, sum of widths]."""
        maps: dict[str, Any] = {}

        def keep(name: str) -> Any:
            return lambda module, inputs, output: maps.__setitem__(name, output)

        hooks = [self.model.get_submodule(name).register_forward_hook(keep(name)) for name in self.modules]
        try:
            self.model(pixel_values=images)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat([_pooled(maps[name], masks, name) for name in self.modules], 1)


def _pooled(found: Any, masks: Tensor, name: str) -> Tensor:
    if not isinstance(found, Tensor) or found.dim() != 4:
        raise RequestError(
            f"the output of {name}", expected="a feature map [k, C, h, w]", do="name a convolution or a stage"
        )
    weights = F.interpolate(masks[:, None].float(), size=found.shape[-2:], mode="bilinear", align_corners=False)
    weights = weights / weights.sum((-1, -2), keepdim=True).clamp(min=1e-6)
    return (found * weights).sum((-1, -2))
