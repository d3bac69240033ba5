"""Discretisation of diagonal state spaces and long convolutions by FFT."""

from __future__ import annotations

import torch
from torch import Tensor

SERIES_UP_TO = 0.5
SERIES_TERMS = 14  # the next one is below 1e-16 there


def exprel(z: Tensor) -> Tensor:
    """`(exp(z) - 1) / z`, with its limit 1 at 0, accurate and differentiable everywhere.

    Args:
        z: Real or complex numbers.

    Shape:
        - z: any
        - output: as `z`

    Example:
        >>> exprel(torch.tensor([0.0, 1e-6, 1.0]))
        tensor([1.0000, 1.0000, 1.7183])
    """
    near = z.abs() < SERIES_UP_TO
    small = torch.where(near, z, 0)  # neither branch sees the other's numbers, nor do gradients
    series = torch.ones_like(z)
    for k in range(SERIES_TERMS, 1, -1):
        series = 1 + series * small / k
    large = torch.where(near, 1, z)
    return torch.where(near, series, (large.exp() - 1) / large)


def log_transition(A: Tensor, dt: Tensor, disc: str = "zoh") -> Tensor:
    """The logarithm of the discrete transition, which is what `vandermonde` takes.

    Args:
        A: Eigenvalues of the continuous system, complex.
        dt: Step sizes; broadcasts with `A`.
        disc: `"zoh"` for `dt A`, `"bilinear"` for `log((1 + dt A / 2) / (1 - dt A / 2))`, whose
            real part does not lose digits where `dt A` is small.

    Shape:
        - A: `(..., N)`
        - dt: broadcasts with `A`, usually `(H, 1)`
        - output: the broadcast shape

    Raises:
        ValueError: Unknown `disc`.

    Example:
        >>> log_transition(torch.tensor([-1 + 0j]), torch.tensor([0.5]), "bilinear").exp()
        tensor([0.6000+0.j])
    """
    _check_disc(disc)
    if disc == "zoh":
        return dt * A
    half = dt * A / 2
    a, b = half.real, half.imag
    modulus = torch.log1p(4 * a / ((1 - a).square() + b.square())) / 2
    return torch.complex(modulus, torch.atan2(b, 1 + a) + torch.atan2(b, 1 - a))


def discretise(A: Tensor, dt: Tensor, B: Tensor, disc: str = "zoh") -> tuple[Tensor, Tensor]:
    """Turn the continuous `x' = A x + B u` into `x_l = A_bar x_(l-1) + B_bar u_l`.

    Args:
        A: Eigenvalues, complex.
        dt: Step sizes; broadcasts with `A`.
        B: Input weights; broadcasts with `A`.
        disc: `"zoh"` (input held over a step: `A_bar = exp(dt A)`,
            `B_bar = (A_bar - 1) / A B`, also where A is 0) or `"bilinear"`
            (`A_bar = (1 + dt A / 2) / (1 - dt A / 2)`, `B_bar = dt / (1 - dt A / 2) B`).

    Shape:
        - A, dt, B: broadcast together, usually `(H, N)`, `(H, 1)` and `(H, N)`
        - output: a pair of the broadcast shape of A and dt, and of all three

    Returns:
        `A_bar` and `B_bar`.

    Raises:
        ValueError: Unknown `disc`.

    Example:
        >>> A_bar, B_bar = discretise(torch.tensor([0j]), torch.tensor([0.1]), torch.tensor([2.0]))
        >>> A_bar, B_bar
        (tensor([1.+0.j]), tensor([0.2000+0.j]))
    """
    _check_disc(disc)
    z = dt * A
    if disc == "zoh":
        return z.exp(), dt * exprel(z) * B
    inverse = 1 / (1 - z / 2)
    return (1 + z / 2) * inverse, dt * inverse * B


def _check_disc(disc: str) -> None:
    if disc not in ("zoh", "bilinear"):
        raise ValueError(f"disc: expected 'zoh' or 'bilinear', got {disc!r}")


def fft_conv(u: Tensor, k: Tensor, k_reverse: Tensor | None = None) -> Tensor:
    """Convolve long sequences with long kernels, linearly: nothing wraps around.

    Computed in float32 at least, under autocast too.

        y_l = sum_(m=0..l) k_m u_(l-m) + sum_(m>=1) k_reverse_(m-1) u_(l+m)

    Args:
        u: Sequences.
        k: Causal kernels; their leading dimensions broadcast with those of `u`.
        k_reverse: Kernels for the reversed sequence, of the shape of `k`: the inputs to come, the
            next one first. None for a causal convolution.

    Shape:
        - u: `(..., L)`, usually `(B, H, L)`
        - k, k_reverse: `(..., K)`, usually `(H, L)`
        - output: `(..., L)`, of the type of `u`

    Raises:
        ValueError: An input is not real floating-point, or `k_reverse` has another shape than `k`.

    Example:
        >>> u = torch.tensor([[[1.0, 0.0, 2.0]]])
        >>> fft_conv(u, torch.tensor([[1.0, 0.5, 0.25]]))
        tensor([[[1.0000, 0.5000, 2.2500]]])
    """
    for name, value in (("u", u), ("k", k)):
        if not value.is_floating_point() or value.ndim < 1:
            raise ValueError(
                f"{name}: expected floats of shape (..., L), got {value.dtype} {tuple(value.shape)}"
            )
    if k_reverse is not None and k_reverse.shape != k.shape:
        raise ValueError(
            f"k_reverse: expected shape {tuple(k.shape)}, as k, got {tuple(k_reverse.shape)}"
        )
    length, taps = u.shape[-1], k.shape[-1]
    size = length + taps  # no lag of either kernel reaches around
    wide = torch.promote_types(torch.promote_types(u.dtype, k.dtype), torch.float32)
    kernel = torch.nn.functional.pad(k.to(wide), (0, length))
    if k_reverse is not None:
        kernel = kernel + torch.nn.functional.pad(k_reverse.to(wide).flip(-1), (length, 0))
    spectrum = torch.fft.rfft(u.to(wide), n=size) * torch.fft.rfft(kernel, n=size)
    return torch.fft.irfft(spectrum, n=size)[..., :length].to(u.dtype)
