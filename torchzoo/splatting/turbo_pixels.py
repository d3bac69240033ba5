"""Rendering every d-th pixel of each row and column, from a place on that changes.

The pixels are those of the full picture, value by value, while splats are paired with tiles,
sorted and blended on a grid of one d²-th as many pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchzoo.splatting.cameras import Cameras

if TYPE_CHECKING:
    from torchzoo.ops import RasterOutput
    from torchzoo.splatting.scene import GaussianScene

__all__ = ["DilatedRenderer", "dilated_pixels"]


def dilated_pixels(
    width: int,
    height: int,
    d: int,
    offset: tuple[int, int] = (0, 0),
    *,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Which pixels `rasterize(..., dilation=d, offset=offset)` renders.

    Over all d² offsets every pixel comes once.

    Args:
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.
        d: One pixel in so many of each row and column.
        offset: The first of them, `(x, y)`.
        device: Device of the grids.

    Shape:
        - outputs: `(ceil((height - y) / d), ceil((width - x) / d))`

    Returns:
        Rows and columns of the pixels: `image[:, rows, columns]` takes them.

    Raises:
        ValueError: `d` is below 1 or above a side, or the offset is not below d.

    Source:
        Lu et al., "Turbo-GS: Accelerating 3D Gaussian Fitting for High-Quality Radiance Fields",
        2024 (arXiv 2412.13547), dilated rendering.

    Example:
        >>> rows, columns = dilated_pixels(5, 3, 2, (1, 0))
        >>> rows, columns
        (tensor([[0, 0],
                [2, 2]]), tensor([[1, 3],
                [1, 3]]))
    """
    if not 1 <= d <= min(width, height):
        raise ValueError(f"d: got {d}, expected 1 to {min(width, height)}")
    if len(offset) != 2 or not all(0 <= o < d for o in offset):
        raise ValueError(f"offset: got {offset}, expected two from 0 to {d - 1}")
    x, y = offset
    rows, columns = (
        torch.arange(start, stop, d, device=device) for start, stop in ((y, height), (x, width))
    )
    grid = torch.meshgrid(rows, columns, indexing="ij")
    return grid[0], grid[1]


class DilatedRenderer:
    """Renders one pixel in d x d, from a random one on in every call.

    `SplatTrainer(..., dilation=d)` does so by itself; this is for loops of one's own.

    Args:
        d: One pixel in so many of each row and column.
        generator: Where the offsets are drawn from; None: torch's.

    Raises:
        ValueError: `d` is below 1; in a call, above a side of the pictures.

    Source:
        Lu et al., "Turbo-GS: Accelerating 3D Gaussian Fitting for High-Quality Radiance Fields",
        2024 (arXiv 2412.13547), dilated rendering.

    Example:
        >>> from torchzoo.splatting import GaussianScene
        >>> scene = GaussianScene.from_points(torch.randn(50, 3), torch.rand(50, 3))
        >>> cameras = Cameras.orbit(2, radius=4.0, width=32, height=24)
        >>> images = torch.rand(2, 24, 32, 3)
        >>> output, target = DilatedRenderer(2)(scene, cameras, images)
        >>> output.image.shape, target.shape
        (torch.Size([2, 12, 16, 3]), torch.Size([2, 12, 16, 3]))
    """

    def __init__(self, d: int = 2, *, generator: torch.Generator | None = None) -> None:
        if d < 1:
            raise ValueError(f"d: got {d}, expected at least 1")
        self.d, self.generator = d, generator

    def __call__(
        self, scene: GaussianScene, cameras: Cameras, images: Tensor, **options: Any
    ) -> tuple[RasterOutput, Tensor]:
        """Render some pixels, and take the same ones of other pictures.

        Args:
            scene: The scene.
            cameras: C cameras.
            images: What they should see, `(C, H, W, ...)`.
            **options: Further ones of `GaussianScene.render`.

        Returns:
            What was rendered, and the same pixels of `images`.
        """
        size = (len(cameras), cameras.height, cameras.width)
        if tuple(images.shape[:3]) != size:
            raise ValueError(f"images: got {tuple(images.shape)}, expected {size} and channels")
        device = None if self.generator is None else self.generator.device
        drawn = torch.randint(self.d, (2,), generator=self.generator, device=device)
        x, y = drawn.tolist()
        output = scene.render(cameras, dilation=self.d, offset=(x, y), **options)
        return output, images[:, y :: self.d, x :: self.d]

    def __repr__(self) -> str:
        return f"DilatedRenderer({self.d})"
