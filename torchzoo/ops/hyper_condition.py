"""Conditional means of many Gaussians, each given by a block of its precision's Cholesky factor.

G. Serifi and M. C. Bühler, "HyperGaussians: High-Dimensional Gaussian Splatting for High-Fidelity
Animatable Face Avatars", 2025. An item's attribute o in R^m and latent i in R^d are jointly normal
with precision `L L^T`, `L = [[L11, 0], [L21, L22]]`. Given `i = z`, the attribute has

    mean        mu_o - L11^-T L21^T (z - mu_i)
    covariance  L11^-T L11^-1,

so that L22 is never needed, and the solve is one of m unknowns, whatever d is.

With `x = L11^-T t`, `t = L21^T (z - mu_i)` and g the gradient of the mean, the gradients are

    g_t = -L11^-1 g,   G_11 = -(x g_t^T) below and on the diagonal,   G_21 = (z - mu_i) g_t^T,
    g_z = L21 g_t = -g_mu_i.

L11 comes as its lower triangle row by row, with the logarithms of the diagonal.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from torchzoo.ops._splat_checks import check_types, common_dtype, expect
from torchzoo.ops.calling import below_autograd, no_autocast

MOST = 64
"""Components that the kernels hold for an item."""


def hyper_condition(
    z: Tensor, mean_out: Tensor, mean_latent: Tensor, raw_l11: Tensor, l21: Tensor
) -> Tensor:
    """Conditional mean of each item's attribute, given its latent.

    Differentiable once, in all inputs; the backward pass keeps the inputs alone.

    Args:
        z: What the latents are, one for each item or one for all.
        mean_out: The attributes' means mu_o.
        mean_latent: The latents' means mu_i.
        raw_l11: Lower triangle of L11, row by row, with the logarithms of its diagonal.
        l21: L21.

    Shape:
        - z: `(..., N, d)` or `(..., 1, d)`
        - mean_out: `(N, m)`
        - mean_latent: `(N, d)`
        - raw_l11: `(N, m (m + 1) / 2)`
        - l21: `(N, d, m)`
        - output: `(..., N, m)`

    Returns:
        The means, in the widest dtype of the inputs, float32 at least.

    Raises:
        ValueError: Shapes, dtypes or devices that don't fit.
        NotImplementedError: An input has a forward-mode tangent.

    Source:
        Serifi and Bühler, "HyperGaussians: High-Dimensional Gaussian Splatting for High-Fidelity
        Animatable Face Avatars", 2025, the inverse covariance trick.

    Example:
        >>> one, two = torch.ones(1, 1), torch.full((1, 1, 1), 2.0)
        >>> hyper_condition(3 * one, one, one, math.log(4) * one, two)  # 1 - 2 / 4 (3 - 1)
        tensor([[0.]])
    """
    if mean_out.ndim != 2 or not mean_out.shape[1]:
        raise ValueError(f"mean_out: got {tuple(mean_out.shape)}, expected (N, m) with m above 0")
    if mean_latent.ndim != 2:
        raise ValueError(f"mean_latent: got {tuple(mean_latent.shape)}, expected (N, d)")
    (N, m), d = mean_out.shape, mean_latent.shape[1]
    sizes = f"N={N}, m={m}, d={d}"
    expect("mean_latent", mean_latent, (N, d), f"(N, d) with {sizes}")
    expect("raw_l11", raw_l11, (N, m * (m + 1) // 2), f"(N, m (m + 1) / 2) with {sizes}")
    expect("l21", l21, (N, d, m), f"(N, d, m) with {sizes}")
    if z.ndim < 2 or z.shape[-1] != d or z.shape[-2] not in (1, N):
        raise ValueError(f"z: got {tuple(z.shape)}, expected (..., N, d) or (..., 1, d), {sizes}")
    named = {"z": z, "mean_out": mean_out, "mean_latent": mean_latent}
    check_types("hyper_condition", {**named, "raw_l11": raw_l11, "l21": l21})
    lead, given = z.shape[:-2], (mean_out, mean_latent, raw_l11, l21)
    dtype = common_dtype(z, *given)
    inputs = [x.to(dtype).contiguous() for x in given]
    flat = z.to(dtype).reshape(math.prod(lead), *z.shape[-2:]).contiguous()
    if m > MOST:
        return condition(flat, *inputs).view(*lead, N, m)
    with below_autograd(flat, *inputs):
        return _hyper_condition(flat, *inputs).view(*lead, N, m)


def unpack(raw: Tensor, m: int) -> Tensor:
    """L11 with the logarithms of its diagonal, items last: `(m, m, N)`."""
    full = raw.new_zeros(m * m, raw.shape[0])
    return full.index_copy(0, _places(m, raw.device), raw.mT).view(m, m, -1)


def _places(m: int, device: torch.device) -> Tensor:
    """Where the entries of a lower triangle, row by row, are in the whole matrix."""
    rows, columns = torch.tril_indices(m, m, device=device)
    return m * rows + columns


def solve_upper(l11: Tensor, t: Tensor) -> Tensor:
    """`L11^-T t` for t `(m, B, N)`, from the last component to the first."""
    found: list[Tensor] = []
    for k in reversed(range(len(t))):
        found.insert(0, t[k] * (-l11[k, k]).exp())
        t = torch.addcmul(t[:k], l11[k, :k, None], found[0], value=-1)
    return torch.stack(found)


def solve_lower(l11: Tensor, t: Tensor) -> Tensor:
    """`L11^-1 t` for t `(m, B, N)`, from the first component to the last."""
    found: list[Tensor] = []
    for k in range(len(l11)):
        found.append(t[0] * (-l11[k, k]).exp())
        t = torch.addcmul(t[1:], l11[k + 1 :, k, None], found[-1], value=-1)
    return torch.stack(found)


def _deviation(offset: Tensor, l11: Tensor, l21: Tensor) -> Tensor:
    """The x of the module for offsets `(N, B, d)`: `(m, B, N)`."""
    return solve_upper(l11, rearrange(torch.bmm(offset, l21), "n b m -> m b n").contiguous())


def condition(
    z: Tensor, mean_out: Tensor, mean_latent: Tensor, raw_l11: Tensor, l21: Tensor
) -> Tensor:
    """The reference, in operations that torch knows, for z `(B, N or 1, d)`: `(B, N, m)`."""
    offset = (z - mean_latent).transpose(0, 1)
    x = _deviation(offset, unpack(raw_l11, mean_out.shape[1]), l21)
    return mean_out - rearrange(x, "m b n -> b n m")


@torch.library.custom_op("torchzoo::hyper_condition", mutates_args=())
def _hyper_condition(
    z: Tensor, mean_out: Tensor, mean_latent: Tensor, raw_l11: Tensor, l21: Tensor
) -> Tensor:
    with no_autocast(z):
        return condition(z, mean_out, mean_latent, raw_l11, l21).contiguous()


@_hyper_condition.register_fake
def _(z: Tensor, mean_out: Tensor, mean_latent: Tensor, raw_l11: Tensor, l21: Tensor) -> Tensor:
    return mean_out.new_empty(z.shape[0], *mean_out.shape)


@torch.library.custom_op("torchzoo::hyper_condition_backward", mutates_args=())
def _hyper_condition_backward(
    z: Tensor, mean_latent: Tensor, raw_l11: Tensor, l21: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of z, mean_out, mean_latent, raw_l11 and l21, for g `(B, N, m)`."""
    with no_autocast(z):
        m = g.shape[-1]
        offset, l11 = (z - mean_latent).transpose(0, 1), unpack(raw_l11, m)
        x = _deviation(offset, l11, l21)
        g_t = -solve_lower(l11, rearrange(g, "b n m -> m b n").contiguous())
        g_l11 = -(x[:, None] * g_t).sum(2)
        diagonal = l11.diagonal().mT.exp()  # of a logarithm: times the number itself
        g_l11.diagonal().mT.mul_(diagonal)
        g_raw = g_l11.flatten(0, 1)[_places(m, g.device)].mT
        across = rearrange(g_t, "m b n -> n b m").contiguous()
        g_l21 = torch.bmm(offset.mT, across)
        g_offset = torch.bmm(across, l21.mT).transpose(0, 1)
        g_z = g_offset if z.shape[1] == len(l21) else g_offset.sum(1, keepdim=True)
        g_latent = -g_offset.sum(0)
        return g_z.contiguous(), g.sum(0), g_latent, g_raw.contiguous(), g_l21


@_hyper_condition_backward.register_fake
def _(
    z: Tensor, mean_latent: Tensor, raw_l11: Tensor, l21: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shapes = (z.shape, g.shape[1:], mean_latent.shape, raw_l11.shape, l21.shape)
    g_z, g_out, g_latent, g_raw, g_l21 = (g.new_empty(shape) for shape in shapes)
    return g_z, g_out, g_latent, g_raw, g_l21


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    z, _, *rest = inputs
    ctx.save_for_backward(z, *rest)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
    return tuple(_hyper_condition_backward(*ctx.saved_tensors, g.contiguous()))


_hyper_condition.register_autograd(_backward, setup_context=_setup)
