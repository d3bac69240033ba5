"""Stationary kernels with a mixture spectrum, and their derivatives in closed form.

In each input dimension, with Q components of weight w, frequency mu (cycles a unit) and envelope
rho,

    kappa(r) = sum_q w_q rho_q(r) cos(2 pi mu_q r),
    d^m kappa / dr^m = sum_q w_q sum_k C(m, k) rho_q^(k)(r) d^(m-k) cos(2 pi mu_q r) / dr^(m-k),

and dimensions multiply. Both envelopes are even functions of r whose derivatives are written out,
as automatic differentiation of abs(r) gives a wrong second derivative at r = 0. Weights are learned
in the logarithm, which acts as the prior p(w) ~ 1/w and drives superfluous ones to 0.

S. Fang, M. Cooley, D. Long, S. Li, R. M. Kirby and S. Zhe, "Solving high frequency and multi-scale
PDEs with Gaussian processes", 2024, sections 3 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from gpytorch.kernels import Kernel
from torch import Tensor, nn

MAX_ORDER = 4


class _MixtureKernel(Kernel):
    """What the two mixtures share; a subclass gives the envelope and its derivatives."""

    has_lengthscale = False
    is_stationary = True

    def __init__(
        self,
        num_components: int = 30,
        *,
        freq_scale: float = 20.0,
        ard_num_dims: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ):
        if num_components < 1:
            raise ValueError(f"num_components: expected at least 1, got {num_components}")
        if not freq_scale >= 0:
            raise ValueError(f"freq_scale: expected at least 0, got {freq_scale}")
        if ard_num_dims is not None and ard_num_dims < 1:
            raise ValueError(f"ard_num_dims: expected at least 1 or None, got {ard_num_dims}")
        with torch.device("cpu"):  # gpytorch looks into a tensor that it makes
            super().__init__(ard_num_dims=ard_num_dims, **kwargs)
        self.freq_scale = freq_scale
        dims = () if ard_num_dims is None else (ard_num_dims,)
        shape = (*self.batch_shape, *dims, num_components)
        self.log_weights = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.raw_frequencies = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.log_scales = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Equal weights that sum to 1, frequencies spread over `[0, freq_scale]`, scales of 1."""
        count = self.num_components
        options: dict[str, Any] = {"dtype": torch.float64, "device": self.log_weights.device}
        spread = torch.linspace(0, 1, count, **options) * self.freq_scale
        with torch.no_grad():
            self.log_weights.fill_(-math.log(count))
            self.raw_frequencies.copy_(spread.expand(self.raw_frequencies.shape))
            self.log_scales.zero_()

    @property
    def num_components(self) -> int:
        """Components Q of each dimension."""
        return self.log_weights.shape[-1]

    @property
    def weights(self) -> Tensor:
        """Weights w, above 0; they sum to the variance of their dimension."""
        return self.log_weights.exp()

    @property
    def frequencies(self) -> Tensor:
        """Frequencies mu of at least 0, in cycles a unit."""
        return self.raw_frequencies.abs()

    @property
    def inverse_lengthscale(self) -> Tensor:
        """One over the length of each envelope."""
        return self.log_scales.exp()

    def forward(
        self,
        x1: Tensor,
        x2: Tensor,
        diag: bool = False,
        last_dim_is_batch: bool = False,
        **params: Any,
    ) -> Tensor:
        """Covariance matrix, or its diagonal."""
        if last_dim_is_batch:
            raise ValueError("last_dim_is_batch: expected False, got True")
        return self._product(x1, x2, 0, 0, diag)

    def derivative(
        self, x1: Tensor, x2: Tensor, order1: int | Sequence[int], order2: int | Sequence[int] = 0
    ) -> Tensor:
        """Derivatives of the covariance in both arguments, in closed form.

        Args:
            x1: First inputs.
            x2: Second inputs.
            order1: Order in x1, one for each input dimension; a number where there is one.
            order2: Order in x2, likewise.

        Shape:
            - x1: `(..., n, d)`
            - x2: `(..., m, d)`
            - output: `(..., n, m)`

        Raises:
            ValueError: Inputs that don't fit the kernel, or an order that it doesn't have.
        """
        return self._product(x1, x2, order1, order2, False)

    def prune(self, threshold: float = 1e-3) -> int:
        """Drop components whose weight is below a share of the largest, in every dimension.

        The parameters are replaced: make optimizers after this.

        Returns:
            How many were dropped.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold: expected within [0, 1], got {threshold}")
        weights = self.weights.detach()
        kept = (weights >= threshold * weights.amax(-1, keepdim=True)).reshape(
            -1, weights.shape[-1]
        )
        index = kept.any(0).nonzero()[:, 0]
        for name in ("log_weights", "raw_frequencies", "log_scales"):
            old = getattr(self, name)
            new = nn.Parameter(old.detach()[..., index].clone(), requires_grad=old.requires_grad)
            setattr(self, name, new)
        return weights.shape[-1] - len(index)

    def extra_repr(self) -> str:
        return f"num_components={self.num_components}, freq_scale={self.freq_scale:g}"

    def _product(
        self,
        x1: Tensor,
        x2: Tensor,
        order1: int | Sequence[int],
        order2: int | Sequence[int],
        diag: bool,
    ) -> Tensor:
        dims = self.ard_num_dims or 1
        for name, x in (("x1", x1), ("x2", x2)):
            if x.ndim < 2 or x.shape[-1] != dims:
                raise ValueError(f"{name}: expected (..., n, {dims}), got {tuple(x.shape)}")
        first, second = self._orders("order1", order1), self._orders("order2", order2)
        r = x1 - x2 if diag else x1[..., :, None, :] - x2[..., None, :, :]
        one = self.ard_num_dims is None
        value = None
        for dim, (m, n) in enumerate(zip(first, second, strict=True)):
            parts = [
                (p if one else p[..., dim, :])[(..., *[None] * (1 if diag else 2), slice(None))]
                for p in (self.weights, self.raw_frequencies, self.log_scales)
            ]
            kappa = (-1) ** n * self._kappa(r[..., dim, None], m + n, *parts)
            value = kappa if value is None else value * kappa
        assert value is not None
        return value

    def _kappa(self, r: Tensor, order: int, weights: Tensor, mu: Tensor, scale: Tensor) -> Tensor:
        """The derivative of this order of kappa; r and parameters broadcast, the last dim is Q."""
        if order > self.max_order:
            raise ValueError(f"order1: expected at most {self.max_order} in all, got {order}")
        omega = 2 * math.pi * mu
        cos, sin = (omega * r).cos(), (omega * r).sin()
        waves = (cos, -sin, -cos, sin)
        total = torch.zeros_like(r * weights)
        for k, rho in enumerate(self._envelope(r, scale, order)):
            j = order - k
            total = total + math.comb(order, k) * rho * omega**j * waves[j % 4]
        return (weights * total).sum(-1)

    def _orders(self, name: str, order: int | Sequence[int]) -> tuple[int, ...]:
        orders = (order,) if isinstance(order, int) else tuple(order)
        dims = self.ard_num_dims or 1
        if isinstance(order, int) and order == 0:
            orders = (0,) * dims
        if len(orders) != dims or any(m < 0 for m in orders):
            raise ValueError(f"{name}: expected {dims} orders of at least 0, got {order}")
        return orders

    @property
    def max_order(self) -> int:
        """The highest derivative that the covariance function has here."""
        return MAX_ORDER

    def _envelope(self, r: Tensor, log_scale: Tensor, order: int) -> list[Tensor]:
        """The envelope and its derivatives up to an order."""
        raise NotImplementedError


class StudentTMixtureKernel(_MixtureKernel):
    """Mixture of Matérn envelopes on cosines: its spectrum is a mixture of Student-t densities.

    Args:
        num_components: Components Q of each dimension.
        freq_scale: Highest frequency at the start, in cycles a unit of the inputs; should cover
            the highest of the data.
        nu: Half an odd number; 2 nu degrees of freedom of the spectrum. With 2.5 the envelope is
            `(1 + z + z²/3) exp(-z)`, `z = sqrt(5) a abs(r)`, a the inverse lengthscale.
        ard_num_dims: Input dimensions, each with a mixture of its own; None: one, and parameters
            without an axis for it.
        device: Device of the parameters.
        dtype: Their dtype.
        **kwargs: `batch_shape` and others of `gpytorch.kernels.Kernel`.

    Shape:
        - x1: `(..., n, d)`
        - x2: `(..., m, d)`
        - output: `(..., n, m)`
        - parameters: `(*batch_shape, Q)`, or `(*batch_shape, d, Q)` with `ard_num_dims`

    Returns:
        As every gpytorch kernel, a lazy covariance matrix.

    Raises:
        ValueError: An option out of its range, or inputs of another dimension.

    Source:
        S. Fang and others, "Solving high frequency and multi-scale PDEs with Gaussian processes",
        2024, section 3.

    Example:
        >>> kernel = StudentTMixtureKernel(2, freq_scale=3.0)
        >>> x = torch.tensor([[0.0], [0.5]])
        >>> kernel(x).to_dense().shape, kernel.derivative(x, x, 1, 1).diagonal().shape
        (torch.Size([2, 2]), torch.Size([2]))
    """

    def __init__(
        self,
        num_components: int = 30,
        *,
        freq_scale: float = 20.0,
        nu: float = 2.5,
        ard_num_dims: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ):
        if not nu > 0 or (2 * nu) % 2 != 1:
            raise ValueError(f"nu: expected half of an odd number above 0, got {nu}")
        self._polynomials = _matern_polynomials(round(nu - 0.5))
        self.nu = nu
        super().__init__(
            num_components,
            freq_scale=freq_scale,
            ard_num_dims=ard_num_dims,
            device=device,
            dtype=dtype,
            **kwargs,
        )

    @property
    def max_order(self) -> int:
        """The highest derivative of the covariance: 2 nu - 1, and at most 4."""
        return min(MAX_ORDER, round(2 * self.nu) - 1)

    def _envelope(self, r: Tensor, log_scale: Tensor, order: int) -> list[Tensor]:
        """`rho^(k) = c^k P_k(c abs(r)) exp(-c abs(r)) sign(r)^k`, with c = sqrt(2 nu) a.

        For odd k, P_k(z) = z R(z), and sign(r) z = c r: so it is differentiable at 0, too.
        """
        c = math.sqrt(2 * self.nu) * log_scale.exp()
        z = c * r.abs()
        decay = (-z).exp()
        found = []
        for k, coefficients in enumerate(self._polynomials[: order + 1]):
            odd = k % 2
            value = torch.zeros_like(z)
            for coefficient in reversed(coefficients[odd:]):
                value = value * z + coefficient
            found.append(c**k * value * decay * (c * r if odd else 1))
        return found

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, nu={self.nu:g}"


class GaussianMixtureKernel(_MixtureKernel):
    """Mixture of Gaussian envelopes on cosines: the spectral mixture kernel, in log weights.

    The envelope is `exp(-s r²)`, s the exponential of the parameter `log_scales`.

    Args:
        num_components: Components Q of each dimension.
        freq_scale: Highest frequency at the start, in cycles a unit of the inputs.
        ard_num_dims: Input dimensions, each with a mixture of its own; None: one, and parameters
            without an axis for it.
        device: Device of the parameters.
        dtype: Their dtype.
        **kwargs: `batch_shape` and others of `gpytorch.kernels.Kernel`.

    Shape:
        - x1: `(..., n, d)`
        - x2: `(..., m, d)`
        - output: `(..., n, m)`

    Returns:
        As every gpytorch kernel, a lazy covariance matrix.

    Raises:
        ValueError: An option out of its range, or inputs of another dimension.

    Source:
        S. Fang and others, 2024, section 3; A. G. Wilson and R. P. Adams, "Gaussian process kernels
        for pattern discovery and extrapolation", 2013, equation 12.

    Example:
        >>> kernel = GaussianMixtureKernel(1, freq_scale=0.0)
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> round(kernel(x).to_dense()[0, 1].item(), 4)  # exp(-1)
        0.3679
    """

    @property
    def inverse_lengthscale(self) -> Tensor:
        """1 / l of the envelope exp(-r² / (2 l²)); 2 pi times gpytorch's `mixture_scales`."""
        return (2 * self.log_scales.exp()).sqrt()

    def _envelope(self, r: Tensor, log_scale: Tensor, order: int) -> list[Tensor]:
        """From `rho' = -2 s r rho`: `rho^(k+1) = -2 s (r rho^(k) + k rho^(k-1))`."""
        s = log_scale.exp()
        found = [(-s * r**2).exp()]
        for k in range(order):
            found.append(-2 * s * (r * found[k] + (k * found[k - 1] if k else 0.0)))
        return found


def _matern_polynomials(p: int) -> list[list[float]]:
    """Coefficients of P_k in `d^k rho / dz^k = P_k(z) exp(-z)`, for nu = p + 1/2, k = 0, ..., 4.

    `P_0 = p!/(2p)! sum_i (p+i)! / (i! (p-i)!) (2z)^(p-i)` and `P_(k+1) = P_k' - P_k`.
    """
    unit = math.factorial(p) / math.factorial(2 * p)
    first = [0.0] * (p + 1)
    for i in range(p + 1):
        ways = math.factorial(p + i) / (math.factorial(i) * math.factorial(p - i))
        first[p - i] = unit * ways * 2 ** (p - i)
    found = [first]
    for _ in range(MAX_ORDER):
        old = found[-1]
        slope = [(i + 1) * c for i, c in enumerate(old[1:])] + [0.0]
        found.append([d - c for d, c in zip(slope, old, strict=True)])
    return found
