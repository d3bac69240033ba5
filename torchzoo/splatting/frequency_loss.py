"""A photometric loss that looks at smooth regions first and at edges last.

A. Hamdi et al., "GES: Generalized Exponential Splatting for Efficient Radiance Field Rendering",
2024, section 4:

    L = (1 - l_ssim - l_w) L1(x, y) + l_ssim (1 - SSIM(x, y)) + l_w L1(M x, M y)

with a mask M of zeros and ones from a difference of Gaussians, whose widths follow the training's
progress `w = 100 t`:

    sigma = 0.1 + 0.1 min(w, 100 - w),   D = blur(sigma) - blur(2 sigma) of the grey, small image,
    M = (D >= 1/2) from the middle of the training on, (1 - D >= 1/2) before,

D enlarged to the image and stretched to [0, 1], image by image. Before the middle M covers what D
calls flat, and after it the edges, ever finer ones. No gradient flows through M.

Deviations: none from the authors' code, which makes M of the rendered image; `mask_source="target"`
makes it of the true one. An image of one value, whose D can't be stretched, is covered whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from torchzoo.common.images import ssim
from torchzoo.hub import ZooModel
from torchzoo.registry import Comparison, Example, register
from torchzoo.splatting.losses import l1

__all__ = ["FrequencyModulatedLoss"]

MASK_SOURCES = ("render", "target")


@register(
    paper=46,
    example=lambda: Example(
        {},
        (torch.rand(2, 15, 20, 3), torch.rand(2, 15, 20, 3)),
        batch_dims=0,
        bad_options={
            "lambda_ssim": -0.1,
            "lambda_freq": 0.9,
            "downscale": 0.0,
            "mask_source": "both",
        },
    ),
    compare=lambda: Comparison(
        {},
        (
            torch.rand(1, 256, 256, 3),
            torch.rand(1, 256, 256, 3),
        ),
        ("torch.nn.L1Loss", "torch.nn.MSELoss"),
    ),
)
class FrequencyModulatedLoss(ZooModel):
    """L1, SSIM, and L1 within a mask that goes from smooth regions to edges during training.

    With a trainer it is `loss=lambda x, y: frequency_loss(x, y, trainer.progress)`.

    Args:
        lambda_ssim: Weight of `1 - SSIM`.
        lambda_freq: Weight of the masked L1; the unmasked has the rest.
        downscale: By what factor the image is made smaller for the mask.
        mask_source: `"render"` or `"target"`: of which image the mask is made.

    Shape:
        - image: `(..., H, W, C)`, rendered
        - target: `(..., H, W, C)`
        - output: scalar

    Returns:
        The loss, a mean over images. `progress` goes from 0 to 1, which is its default.

    Raises:
        ValueError: An option out of its range; in `forward` shapes that differ, images smaller than
            `1 / downscale` on a side, or a progress outside [0, 1].

    Source:
        Hamdi et al., "GES", 2024, section 4, and the authors' code for the constants.

    Example:
        >>> loss = FrequencyModulatedLoss()
        >>> image, target = torch.rand(1, 20, 20, 3), torch.rand(1, 20, 20, 3)
        >>> bool(loss(image, target, 0.3) > loss(target, target, 0.3))
        True
    """

    def __init__(
        self,
        *,
        lambda_ssim: float = 0.2,
        lambda_freq: float = 0.5,
        downscale: float = 0.2,
        mask_source: str = "render",
    ) -> None:
        super().__init__()
        for name, value in (("lambda_ssim", lambda_ssim), ("lambda_freq", lambda_freq)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: got {value}, expected a number in [0, 1]")
        if lambda_ssim + lambda_freq > 1:
            rest = 1 - lambda_ssim
            raise ValueError(f"lambda_freq: got {lambda_freq}, expected at most {rest:.4g}")
        if not 0 < downscale <= 1:
            raise ValueError(f"downscale: got {downscale}, expected a number in (0, 1]")
        if mask_source not in MASK_SOURCES:
            raise ValueError(f"mask_source: got {mask_source!r}, expected one of {MASK_SOURCES}")
        self.lambda_ssim, self.lambda_freq = lambda_ssim, lambda_freq
        self.downscale, self.mask_source = downscale, mask_source

    def forward(self, image: Tensor, target: Tensor, progress: float = 1.0) -> Tensor:
        self._check(image, progress)
        full = l1(image, target)
        first, second = (rearrange(x, "... h w c -> ... c h w") for x in (image, target))
        unlike = 1 - ssim(first, second).mean()
        mask = self.mask(image if self.mask_source == "render" else target, progress)[..., None]
        masked = l1(mask * image, mask * target)
        rest = 1 - self.lambda_ssim - self.lambda_freq
        return rest * full + self.lambda_ssim * unlike + self.lambda_freq * masked

    @torch.no_grad()
    def mask(self, image: Tensor, progress: float) -> Tensor:
        """Where the loss looks at a time of the training.

        Args:
            image: `(..., H, W, C)`.
            progress: From 0 to 1.

        Returns:
            Zeros and ones, `(..., H, W)`.

        Raises:
            ValueError: Images that are too small, or a progress outside [0, 1].
        """
        self._check(image, progress)
        late = progress >= 0.5
        sigma = 0.1 + 10 * min(progress, 1 - progress)
        grey = image.to(torch.promote_types(image.dtype, torch.float32)).mean(-1)
        planes = grey.reshape(-1, 1, *grey.shape[-2:])
        small = F.interpolate(planes, scale_factor=self.downscale, mode="bilinear")
        band = _blur(small, sigma) - _blur(small, 2 * sigma)
        band = F.interpolate(band, size=grey.shape[-2:], mode="bilinear")
        low, high = band.amin((-2, -1), keepdim=True), band.amax((-2, -1), keepdim=True)
        level = (band - low) / (high - low)
        chosen = (level if late else 1 - level) >= 0.5
        return (chosen | (high == low)).reshape(grey.shape).to(image.dtype)

    def _check(self, image: Tensor, progress: float) -> None:
        if image.ndim < 3 or min(int(side * self.downscale) for side in image.shape[-3:-1]) < 1:
            got, least = tuple(image.shape), 1 / self.downscale
            raise ValueError(f"image: got {got}, expected (..., H, W, C), sides from {least:.4g}")
        if not 0 <= progress <= 1:
            raise ValueError(f"progress: got {progress}, expected a number in [0, 1]")

    def extra_repr(self) -> str:
        return (
            f"lambda_ssim={self.lambda_ssim}, lambda_freq={self.lambda_freq}, "
            f"downscale={self.downscale}, mask_source={self.mask_source!r}"
        )


def _blur(planes: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of `(B, 1, h, w)` over `2 round(3 sigma) + 1` pixels, zeros beyond."""
    radius = round(3 * sigma)
    offset = torch.arange(-radius, radius + 1, dtype=planes.dtype, device=planes.device)
    weights = torch.softmax(-offset.square() / (2 * sigma**2), 0)
    for across in (1, 0):  # sums of products, which autocast leaves in their precision
        margin = (radius * across, radius * across, radius * (1 - across), radius * (1 - across))
        windows = F.pad(planes, margin).unfold(2 + across, 2 * radius + 1, 1)
        planes = (windows * weights).sum(-1)
    return planes
