"""Structural similarity of random pixels: a nonlocal loss for fields trained on random rays.

Z. Xie, X. Yang, Y. Yang, Q. Sun, Y. Jiang, H. Wang, Y. Cai and M. Sun, "S3IM: Stochastic Structural
SIMilarity and Its Unreasonable Effectiveness for Neural Fields", 2023. A batch of B predicted and
true colours is laid out M times as a virtual image of `P_h` rows, `B = P_h P_w`: the concatenation
of M permutations of the batch, the first the identity, fills an image of `P_h x (P_w M)` row by
row, the same for both. Then

    loss = 1 - mean over windows and channels of SSIM(window of src, window of tar),

with windows of K x K pixels, their weights `exp(-(i^2 + j^2) / (2 sigma^2))` around the window's
pixel K // 2 normalised, C1 = (0.01 L)^2 and C2 = (0.03 L)^2. As each window holds pixels from
anywhere, the loss knows nothing of space: it asks for the right means, spreads and correlation of
colours, and so resists the fading to the mean that pointwise losses forgive.

Deviations from the paper: none with `padding="reference"`, which, as the authors' code does, pads
the virtual image with (K - 1) // 2 zeros on all sides, so that the first windows hold zeros and the
last pixels none; `padding="none"` leaves the padding out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchzoo import ops
from torchzoo.hub import ZooModel
from torchzoo.registry import Comparison, Example, register

PADDINGS = ("reference", "none")


def s3im(
    src: Tensor,
    tar: Tensor,
    *,
    indices: Tensor | None = None,
    kernel_size: int = 4,
    stride: int = 4,
    repeat: int = 10,
    patch_height: int = 64,
    patch_width: int = 64,
    sigma: float = 1.5,
    data_range: float = 1.0,
    padding: str = "reference",
    generator: torch.Generator | None = None,
) -> Tensor:
    """One minus the structural similarity of pixels in random company.

    float16 and bfloat16 are computed in float32.

    Args:
        src: Predicted colours.
        tar: True colours; the loss is symmetric, but usually no gradient is wanted here.
        indices: Which pixel is where in the virtual image, row by row; None: M permutations, the
            first the identity.
        kernel_size: Side K of a window.
        stride: Pixels from one window to the next.
        repeat: Permutations M.
        patch_height: Rows `P_h` of the virtual image.
        patch_width: Its columns `P_w` a permutation.
        sigma: Standard deviation of the window's weights, in pixels.
        data_range: Range of the colours L.
        padding: `"reference"`: `(K - 1) // 2` zeros on each side; `"none"`.
        generator: Draws the permutations.

    Shape:
        - src, tar: `(B, C)` with `B = P_h P_w`
        - indices: `(M B,)`
        - output: scalar, in [0, 2]

    Returns:
        One minus the structural similarity of the shuffled colours.

    Raises:
        ValueError: Shapes that don't fit, a window larger than the virtual image, or an option out
            of its range.

    Source:
        Xie et al., "S3IM", 2023, section 3.2.

    Example:
        >>> tar = torch.rand(64, 3)
        >>> small = {"patch_height": 8, "patch_width": 8, "generator": torch.manual_seed(0)}
        >>> bool(s3im(0.5 * tar, tar, **small) > s3im(0.9 * tar, tar, **small) > 0)
        True
    """
    _check_options(
        kernel_size, stride, repeat, patch_height, patch_width, sigma, data_range, padding
    )
    size = patch_height * patch_width
    _check_pixels(src, tar)
    if len(src) != size:
        raise ValueError(
            f"src: got {tuple(src.shape)}, expected ({size}, {src.shape[1]}) for a "
            f"{patch_height} x {patch_width} patch"
        )
    if indices is None:
        indices = draw_indices(size, repeat, device=src.device, generator=generator)
    elif indices.shape != (repeat * size,):
        raise ValueError(f"indices: got {tuple(indices.shape)}, expected ({repeat * size},)")
    similarity = ops.s3im_groups(
        src,
        tar,
        indices.reshape(patch_height, -1),
        kernel_size=kernel_size,
        stride=stride,
        margin=(kernel_size - 1) // 2 if padding == "reference" else 0,
        sigma=sigma,
        data_range=data_range,
    )
    return 1 - similarity.mean()


def draw_indices(
    size: int,
    repeat: int,
    *,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The identity and `repeat - 1` random permutations of `size` pixels, one after the other.

    Example:
        >>> draw_indices(3, 2).view(2, 3).sort().values
        tensor([[0, 1, 2],
                [0, 1, 2]])
    """
    first = torch.arange(size, device=device)
    others = torch.rand(repeat - 1, size, device=device, generator=generator).argsort(-1)
    return torch.cat([first, others.flatten()])


@register(
    paper=133,
    example=lambda: Example(
        {"patch_height": 6, "patch_width": 8, "repeat": 1},
        (torch.rand(48, 3), torch.rand(48, 3)),
        batch_dims=0,
        bad_options={
            "kernel_size": 7,
            "stride": 0,
            "repeat": 0,
            "patch_height": 0,
            "patch_width": 0,
            "sigma": 0.0,
            "data_range": -1.0,
            "padding": "same",
        },
    ),
    compare=lambda: Comparison(
        {},
        (
            torch.rand(4096, 3),
            torch.rand(4096, 3),
        ),
        ("torch.nn.L1Loss", "torch.nn.MSELoss"),
    ),
)
class S3IMLoss(ZooModel):
    """The loss `s3im` with new permutations at every call; add it to a pointwise loss.

    The authors use a weight of 1 with TensoRF and tune it by the model; a weight at which its
    gradient is about as long as that of the pointwise loss is a fair first guess. Pixels of a
    background can be left out beforehand: `loss(src[kept], tar[kept])` with `strict=False`.

    Args:
        kernel_size: Side K of a window.
        stride: Pixels from one window to the next.
        repeat: Permutations M; with 1 the loss is deterministic.
        patch_height: Rows `P_h` of the virtual image.
        patch_width: Its columns `P_w` a permutation.
        sigma: Standard deviation of the window's weights, in pixels.
        data_range: Range of the colours L.
        padding: `"reference"`, zeros around the virtual image as in the authors' code, or `"none"`.
        generator: Draws the permutations; it is not saved with the module.
        strict: Whether a batch must have `P_h P_w` pixels. Else the virtual image is as wide as
            the batch allows, and pixels left over are dropped at random.

    Shape:
        - src, tar: `(B, C)`
        - output: scalar, in [0, 2]

    Returns:
        One minus the structural similarity of the shuffled colours.

    Raises:
        ValueError: An option out of its range, or in `forward` shapes that don't fit.

    Source:
        Z. Xie et al., "S3IM: Stochastic Structural SIMilarity and Its Unreasonable Effectiveness
        for Neural Fields", 2023, section 3.2.

    Example:
        >>> loss = S3IMLoss(patch_height=16, patch_width=16)
        >>> rendered, true = torch.rand(256, 3, requires_grad=True), torch.rand(256, 3)
        >>> total = torch.nn.functional.mse_loss(rendered, true) + 1.0 * loss(rendered, true)
        >>> total.backward()
    """

    def __init__(
        self,
        kernel_size: int = 4,
        stride: int = 4,
        repeat: int = 10,
        patch_height: int = 64,
        patch_width: int = 64,
        *,
        sigma: float = 1.5,
        data_range: float = 1.0,
        padding: str = "reference",
        generator: torch.Generator | None = None,
        strict: bool = True,
    ):
        super().__init__()
        _check_options(
            kernel_size, stride, repeat, patch_height, patch_width, sigma, data_range, padding
        )
        self.kernel_size, self.stride, self.repeat = kernel_size, stride, repeat
        self.patch_height, self.patch_width = patch_height, patch_width
        self.sigma, self.data_range, self.padding = sigma, data_range, padding
        self.generator, self.strict = generator, strict

    def forward(self, src: Tensor, tar: Tensor) -> Tensor:
        width = self.patch_width
        if not self.strict:
            src, tar = self._trimmed(src, tar)
            width = len(src) // self.patch_height
        return s3im(
            src,
            tar,
            kernel_size=self.kernel_size,
            stride=self.stride,
            repeat=self.repeat,
            patch_height=self.patch_height,
            patch_width=width,
            sigma=self.sigma,
            data_range=self.data_range,
            padding=self.padding,
            generator=self.generator,
        )

    def _trimmed(self, src: Tensor, tar: Tensor) -> tuple[Tensor, Tensor]:
        """As many whole columns as there are pixels for, in their order."""
        _check_pixels(src, tar)
        width = len(src) // self.patch_height
        if width * self.repeat < self.kernel_size:
            raise ValueError(
                f"src: got {tuple(src.shape)}, expected more pixels for {self.patch_height} rows "
                f"and windows of {self.kernel_size}"
            )
        draw = torch.rand(len(src), device=src.device, generator=self.generator)
        kept = draw.argsort()[: width * self.patch_height].sort().values
        return src[kept], tar[kept]

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, repeat={self.repeat}, "
            f"patch={self.patch_height}x{self.patch_width}, padding={self.padding!r}"
        )


def _check_pixels(src: Tensor, tar: Tensor) -> None:
    if src.ndim != 2:
        raise ValueError(f"src: got {tuple(src.shape)}, expected (B, C)")
    if tar.shape != src.shape:
        raise ValueError(f"tar: got {tuple(tar.shape)}, expected {tuple(src.shape)} as src")


def _check_options(
    kernel_size: int,
    stride: int,
    repeat: int,
    patch_height: int,
    patch_width: int,
    sigma: float,
    data_range: float,
    padding: str,
) -> None:
    counts = {
        "kernel_size": kernel_size,
        "stride": stride,
        "repeat": repeat,
        "patch_height": patch_height,
        "patch_width": patch_width,
    }
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: got {count}, expected at least 1")
    for name, value in (("sigma", sigma), ("data_range", data_range)):
        if not value > 0:
            raise ValueError(f"{name}: got {value}, expected a number > 0")
    if padding not in PADDINGS:
        raise ValueError(f"padding: got {padding!r}, expected one of {PADDINGS}")
    if kernel_size > min(patch_height, patch_width * repeat):
        raise ValueError(
            f"kernel_size: got {kernel_size}, expected at most the patch's rows, {patch_height}, "
            f"and columns, {patch_width * repeat}"
        )
