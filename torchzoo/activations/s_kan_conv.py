"""S-KAN as a convolution: every patch of an image goes through one `SKANLinear`.

Z. Yang, J. Zhang, X. Luo, Z. Lu and L. Shen, Activation Space Selectable Kolmogorov-Arnold
Networks, 2024. A patch of C channels and a kernel of h by w has C h w nodes; all positions of the
image share functions and gates, and by default (our choice) the positions of the kernel share the
gates of their channel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from torchzoo import peers
from torchzoo.activations.basis import check_choice, check_count
from torchzoo.activations.pooled import POOL, PrunedKANLinear
from torchzoo.activations.s_kan import SKANLinear
from torchzoo.hub import ZooModel
from torchzoo.registry import Comparison, Example, register


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2:
        raise ValueError(f"{name}: expected one number or two, got {value!r}")
    for one in both:
        check_count(name, one, least)
    return both[0], both[1]


@register(
    paper=10,
    example=lambda: Example(
        {
            "in_channels": 2,
            "out_channels": 3,
            "kernel_size": 2,
            "padding": 1,
            "pool": ("rbf", "chebyshev"),
        },
        (2 * torch.rand(2, 2, 4, 3, generator=torch.Generator().manual_seed(0)) - 1,),
        bad_options={
            "in_channels": 0,
            "out_channels": 0,
            "kernel_size": 0,
            "stride": 0,
            "padding": -1,
            "gate": "edge",
            "pool": (),
        },
    ),
    compare=lambda: Comparison(
        {"in_channels": 8, "out_channels": 16, "kernel_size": 3, "padding": 1},
        (2 * torch.rand(8, 8, 16, 16) - 1,),
        peers.CONVOLUTION,
    ),
)
class SConvKAN2d(ZooModel):
    """A convolution whose products are learned functions, of families chosen among a pool.

    Args:
        in_channels: Channels C of the input.
        out_channels: Channels O of the output.
        kernel_size: Height and width of the kernel, or one number for both.
        stride: Steps of the kernel, two numbers or one.
        padding: Zeros added around the image, two numbers or one.
        pool: Names of families; see `SKANLinear`.
        gate: Gates for each `"channel"`, each `"node"` (channel and position in the kernel), or
            one set for the `"layer"`.
        bias: Whether a bias is added.
        channels_last: Images are `(..., H, W, C)`, of input and output.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - x: `(..., C, H, W)`
        - output: `(..., O, H', W')`, as a convolution's

    Returns:
        The image of outputs.

    Raises:
        ValueError: An option out of range, or x of another number of channels or smaller than the
            kernel.

    Source:
        Yang, Zhang, Luo, Lu and Shen, Activation Space Selectable Kolmogorov-Arnold Networks, 2024,
        section 3 (S-ConvKAN).

    Example:
        >>> SConvKAN2d(1, 4, 3, padding=1)(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        *,
        pool: Sequence[str] = POOL,
        gate: str = "channel",
        bias: bool = True,
        channels_last: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("in_channels", in_channels)
        check_count("out_channels", out_channels)
        check_choice("gate", gate, ("channel", "node", "layer"))
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = _pair("kernel_size", kernel_size, 1)
        self.stride = _pair("stride", stride, 1)
        self.padding = _pair("padding", padding, 0)
        self.channels_last = channels_last
        positions = self.kernel_size[0] * self.kernel_size[1]
        self.linear: SKANLinear | PrunedKANLinear = SKANLinear(
            in_channels * positions,
            out_channels,
            pool=pool,
            gate="layer" if gate == "layer" else "node",
            bias=bias,
            group_size=positions if gate == "channel" else 1,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        image = x.movedim(-1, -3) if self.channels_last and x.ndim >= 3 else x
        height, width = self._check(x, image)
        images = image.reshape(-1, *image.shape[-3:])
        if not len(images):  # of which unfold makes no patches
            images = images.new_zeros(1, *image.shape[-3:]) + images.sum()
        patches = F.unfold(images, self.kernel_size, padding=self.padding, stride=self.stride)
        y = self.linear(patches.mT)[: x.shape[:-3].numel()]
        y = rearrange(y, "n (h w) o -> n o h w", h=height, w=width)
        y = y.reshape(*x.shape[:-3], self.out_channels, height, width)
        return y.movedim(-3, -1) if self.channels_last else y

    def _check(self, x: Tensor, image: Tensor) -> tuple[int, int]:
        """Raise a ValueError for an input that doesn't fit; the output's height and width."""
        wanted = f"(..., {self.in_channels}, H, W)"
        if self.channels_last:
            wanted = f"(..., H, W, {self.in_channels})"
        if image.ndim < 3 or image.shape[-3] != self.in_channels or not x.is_floating_point():
            raise ValueError(
                f"x: expected floating point of shape {wanted}, got {x.dtype} of shape "
                f"{tuple(x.shape)}"
            )
        sizes = [
            (size + 2 * padding - kernel) // stride + 1
            for size, padding, kernel, stride in zip(
                image.shape[-2:], self.padding, self.kernel_size, self.stride, strict=True
            )
        ]
        if min(sizes) < 1:
            raise ValueError(
                f"x: expected an image of at least {self.kernel_size} with its padding, "
                f"got shape {tuple(x.shape)}"
            )
        return sizes[0], sizes[1]

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, channels_last={self.channels_last}"
        )
