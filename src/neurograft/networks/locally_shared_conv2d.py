"""A convolution with filters of its own for every cell of a grid."""

from __future__ import annotations

from torch import Tensor, nn

from neurograft.core.card import method
from neurograft.core.errors import RequestError


@method(paper="lnet-anet")
class LocallySharedConv2d(nn.Module):
    """Cut the maps into a grid of cells that do not overlap, and convolve each with filters of its own.

    Every cell is padded by itself, so no value crosses a border. The cells are the groups of one grouped convolution,
    `conv`, whose weight [G * out, in, k, k] holds the filters of cell 0 first; G = rows * columns of the grid.

    Args:
        in_channels: of the input.
        out_channels: of the output, the same for every cell.
        kernel_size: side of the filters.
        grid: cells in a column and in a row of cells, or one number for both. (1, 1) is `nn.Conv2d`.
        padding: of every cell, with zeros; half a filter if None, which keeps the size for odd filters.
        bias: one for each filter of each cell.

    Example:
        >>> import torch
        >>> layer = LocallySharedConv2d(3, 8, 3, grid=2)
        >>> layer(torch.zeros(1, 3, 8, 8)).shape, layer.conv.weight.shape
        (torch.Size([1, 8, 8, 8]), torch.Size([32, 3, 3, 3]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        grid: int | tuple[int, int] = 1,
        padding: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
        if min(self.grid) < 1:
            raise RequestError(f"a grid of {self.grid} cells", expected="at least one each way", do="grid=1 or more")
        self.out_channels, cells = out_channels, self.grid[0] * self.grid[1]
        self.conv = nn.Conv2d(
            in_channels * cells,
            out_channels * cells,
            kernel_size,
            padding=kernel_size // 2 if padding is None else padding,
            groups=cells,
            bias=bias,
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Convolve maps [B, in, H, W]; the grid must divide H and W.

        Raises:
            RequestError: it does not.
        """
        (high, wide), (batch, channels, h, w) = self.grid, maps.shape
        if h % high or w % wide:
            raise RequestError(
                f"maps of {h} x {w} for a grid of {high} x {wide} cells",
                expected="sides that the grid divides",
                do="choose another grid, or another size of the input",
            )
        cells = maps.reshape(batch, channels, high, h // high, wide, w // wide).permute(0, 2, 4, 1, 3, 5)
        made = self.conv(cells.reshape(batch, high * wide * channels, h // high, w // wide))
        tall, broad = made.shape[-2:]
        apart = made.reshape(batch, high, wide, self.out_channels, tall, broad).permute(0, 3, 1, 4, 2, 5)
        return apart.reshape(batch, self.out_channels, high * tall, wide * broad)


locally_shared_conv2d = LocallySharedConv2d  # a method is named by its file
