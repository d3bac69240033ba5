"""Gaussian process priors over time whose covariance is diagonal in a real Fourier basis.

The T steps are part of a circle of N_c >= T. On it the functions

    B_w(t) = sqrt(2 / N_c) cos(2 pi w t / N_c),  w >= 0,
    B_w(t) = sqrt(2 / N_c) sin(2 pi w t / N_c),  w < 0

(times 1 / sqrt 2 for w = 0 and w = N_c / 2) are orthonormal, and a stationary process with kernel k
is z(t) = sum_w a_w B_w(t) with independent coefficients a_w ~ N(0, c_w), c being the spectral
density of k:

    c_w = sqrt(2 pi) l exp(-(2 pi w l / N_c)^2 / 2)  for k(t) = exp(-t^2 / (2 l^2)).

Frequencies at which the density of the shortest length is below 1e-8 of its peak are left out.

R. Gondur, U. B. Sikandar, E. Schaffer, M. C. Aoi and S. L. Keeley, "Multi-modal Gaussian process
variational autoencoders for neural and behavioral data", 2024, section 3. Deviation: the circle is
longer than the steps by four lengths, not by a fifth, as first and last steps are neighbours on it.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from torchzoo.hub import ZooModel
from torchzoo.ops.calling import no_autocast
from torchzoo.registry import Example, register

_CONDITION = 1e8  # of the spectrum of the shortest length
_WRAP = 4.0  # lengths between the ends of the steps on the circle


class Paths(NamedTuple):
    """What Gaussian coefficients say of latents over time.

    Attributes:
        mean: Means over time, `(..., T, P)`.
        variance: Variances over time, `(..., T, P)`.
        kl: Divergence from the prior, `(..., P)`.
    """

    mean: Tensor
    variance: Tensor
    kl: Tensor


@register(
    paper=94,
    example=lambda: Example(
        {"num_latents": 2, "num_steps": 6, "min_lengthscale": 4.0, "lengthscale_init": 5.0},
        (
            torch.randn(3, 13, 2, generator=torch.Generator().manual_seed(0)),
            torch.randn(3, 13, 2, generator=torch.Generator().manual_seed(1)),
        ),
        bad_options={
            "num_latents": 0,
            "num_steps": 0,
            "min_lengthscale": 0.0,
            "extension": -0.1,
            "lengthscale_init": 0.0,
            "kernel": "periodic",
            "jitter": -1.0,
        },
    ),
    compare="a part of MMGPVAE, whose experiment has rivals",
)
class FourierGPPrior(ZooModel):
    """Independent Gaussian processes over T steps, by their Fourier coefficients.

    All costs are linear in the number N_f of coefficients; no matrix is factorised.

    Args:
        num_latents: Processes P, each with a length of its own.
        num_steps: Steps T.
        min_lengthscale: Shortest length for which the frequencies kept are enough.
        extension: By what share of T the circle is longer than T; `"auto"`: by four times
            `lengthscale_init`, so that the first and last steps do not see each other.
        lengthscale_init: Initial length.
        kernel: `"rbf"`, or `"matern"`, the Matérn-5/2 kernel; both of variance 1.
        jitter: Added to the spectrum, as coefficients of variance near 0 are hard to learn; 1e-8
            for the kernel itself.
        device: Device of parameters and buffers.
        dtype: Their dtype.

    Shape:
        - mean, logstd: means and log standard deviations of coefficients, `(..., N_f, P)`
        - output: `mean` and `variance` `(..., T, P)`, `kl` `(..., P)`

    Returns:
        `Paths`: Gaussian coefficients seen over time, and their divergence from the prior.

    Raises:
        ValueError: An option out of its range, or coefficients of another shape.

    Source:
        R. Gondur, U. B. Sikandar, E. Schaffer, M. C. Aoi and S. L. Keeley, "Multi-modal Gaussian
        process variational autoencoders for neural and behavioral data", 2024, section 3.

    Example:
        >>> prior = FourierGPPrior(1, 100, lengthscale_init=20.0, jitter=1e-8)
        >>> covariance = prior.basis.mT @ (prior.spectrum() * prior.basis)
        >>> round(covariance[0, 20].item(), 3), round(math.exp(-1 / 2), 3)
        (0.607, 0.607)
    """

    basis: Tensor
    frequencies: Tensor
    log_lengthscale: Tensor

    def __init__(
        self,
        num_latents: int,
        num_steps: int,
        *,
        min_lengthscale: float = 10.0,
        extension: float | Literal["auto"] = "auto",
        lengthscale_init: float = 30.0,
        kernel: Literal["rbf", "matern"] = "rbf",
        jitter: float = 1e-2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        for name, count in {"num_latents": num_latents, "num_steps": num_steps}.items():
            if count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}")
        lengths = {"min_lengthscale": min_lengthscale, "lengthscale_init": lengthscale_init}
        for name, length in lengths.items():
            if not length > 0:
                raise ValueError(f"{name}: expected above 0, got {length}")
        if extension != "auto" and not (isinstance(extension, float | int) and extension >= 0):
            raise ValueError(f"extension: expected 'auto' or at least 0, got {extension!r}")
        if kernel not in ("rbf", "matern"):
            raise ValueError(f"kernel: expected 'rbf' or 'matern', got {kernel!r}")
        if not jitter >= 0:
            raise ValueError(f"jitter: expected at least 0, got {jitter}")
        super().__init__()
        self.num_latents, self.num_steps = num_latents, num_steps
        self.extension, self.kernel, self.jitter = extension, kernel, jitter
        self._length = lengthscale_init
        more = _WRAP * lengthscale_init if extension == "auto" else extension * num_steps
        self.period = num_steps + math.ceil(more - 1e-9)  # 0.2 of 60 is 12, rounding aside
        frequencies, basis = fourier_basis(num_steps, self.period, min_lengthscale)
        device, dtype = device or torch.get_default_device(), dtype or torch.get_default_dtype()
        self.register_buffer("frequencies", frequencies.to(device, dtype))
        self.register_buffer("basis", basis.to(device, dtype))
        self.log_lengthscale = nn.Parameter(torch.empty(num_latents, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial length, for all latents."""
        nn.init.constant_(self.log_lengthscale, math.log(self._length))

    @property
    def lengthscale(self) -> Tensor:
        """Lengths `(P,)`, in steps."""
        return self.log_lengthscale.exp()

    def spectrum(self) -> Tensor:
        """Prior variances of the coefficients, `(N_f, P)`."""
        length = self.lengthscale
        scaled = (self.frequencies[:, None] * length).square()
        if self.kernel == "rbf":
            density = math.sqrt(2 * math.pi) * length * (-scaled / 2).exp()
        else:
            density = 16 / (3 * math.sqrt(5)) * length * (1 + scaled / 5) ** -3
        return density + self.jitter

    def to_time(self, coefficients: Tensor) -> Tensor:
        """Latents of coefficients.

        Shape:
            - coefficients: `(..., N_f, P)`
            - output: `(..., T, P)`
        """
        return self.basis.mT @ coefficients

    def kl(self, mean: Tensor, logstd: Tensor) -> Tensor:
        """Divergence of Gaussian coefficients from the prior, one number a latent.

        Shape:
            - mean, logstd: `(..., N_f, P)`
            - output: `(..., P)`
        """
        log_ratio = 2 * logstd - self.spectrum().log()
        quadratic = mean.square() / self.spectrum()
        return (quadratic + log_ratio.exp() - 1 - log_ratio).sum(-2) / 2

    def forward(self, mean: Tensor, logstd: Tensor) -> Paths:
        expected = (len(self.basis), self.num_latents)
        if mean.shape[-2:] != expected:
            raise ValueError(f"mean: expected (..., {expected}), got {tuple(mean.shape)}")
        if logstd.shape != mean.shape:
            raise ValueError(
                f"logstd: expected the shape of mean {tuple(mean.shape)}, got {tuple(logstd.shape)}"
            )
        with no_autocast(mean):
            mean, logstd = mean.to(self.basis.dtype), logstd.to(self.basis.dtype)
            variance = self.basis.square().mT @ (2 * logstd).exp()
            return Paths(self.to_time(mean), variance, self.kl(mean, logstd))

    def check_extension(self) -> None:
        """Warn where a learned length is too long for an automatic circle.

        There the ends of the steps begin to see each other around it: the prior correlates them.
        """
        longest = self.lengthscale.max().item()
        if self.extension == "auto" and _WRAP * longest > 1.0001 * (self.period - self.num_steps):
            warnings.warn(
                f"a length of {longest:.3g} steps has outgrown lengthscale_init = "
                f"{self._length:.3g}: first and last steps are correlated; build the prior with "
                "a longer lengthscale_init or a larger extension",
                stacklevel=2,
            )

    def extra_repr(self) -> str:
        return (
            f"{self.kernel}, {self.num_latents} latents, {self.num_steps} steps, "
            f"{len(self.basis)} coefficients"
        )


def fourier_basis(num_steps: int, period: int, min_lengthscale: float) -> tuple[Tensor, Tensor]:
    """Angular frequencies `(N_f,)` and the real Fourier basis `(N_f, T)`, in double precision.

    Args:
        num_steps: Steps T.
        period: Length N_c of the circle.
        min_lengthscale: Length whose spectrum must be kept, down to 1e-8 of its peak.

    Example:
        >>> frequencies, basis = fourier_basis(4, 4, min_lengthscale=1.0)
        >>> torch.allclose(basis @ basis.mT, torch.eye(4).double())
        True
    """
    highest = math.floor(period / (math.pi * min_lengthscale) * math.sqrt(math.log(_CONDITION) / 2))
    highest = min(highest, period // 2)
    sines = min(highest, (period - 1) // 2)  # at half the period the sine is 0
    index = torch.cat(
        [torch.arange(highest + 1, device="cpu"), torch.arange(-sines, 0, device="cpu")]
    ).double()
    angle = 2 * math.pi / period * index[:, None] * torch.arange(num_steps, device="cpu")
    rows = torch.where(index[:, None] >= 0, angle.cos(), angle.sin())
    alone = (index == 0) | (2 * index == period)  # cosines without a sine
    scale = torch.where(alone, 1 / period, 2 / period).sqrt()
    return 2 * math.pi / period * index.abs(), scale[:, None] * rows
