"""Functions drawn from a Gaussian process: random Fourier features, corrected by data.

Matheron's rule turns a draw g of the prior into one of the posterior. With values u at m places Z,

    f(x) = g(x) + k(x, Z) (K_ZZ + eps^2 I)^-1 (u - g(Z)),

and g is a sum of random waves, g(x) = sqrt(2 s / L) sum_l w_l cos(theta_l . x + b_l), w ~ N(0, I),
theta drawn from the kernel's spectrum, b uniform over a turn. So f costs L + m a point, where a
joint draw of n values costs n^3.

J. T. Wilson, V. Borovitskiy, A. Terenin, P. Mostowsky and M. P. Deisenroth, "Efficiently sampling
functions from Gaussian process posteriors", 2020, section 3. Deviations: each path has
waves of its own, so that mean and covariance are exact for any L; only higher moments need many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from torchzoo.gp.posterior import GaussianPosterior
from torchzoo.hub import ZooModel
from torchzoo.ops.calling import no_autocast
from torchzoo.registry import Example, register

StationaryKind = Literal["rbf", "matern12", "matern32", "matern52"]
SMOOTHNESS: dict[str, float] = {"rbf": math.inf, "matern12": 0.5, "matern32": 1.5, "matern52": 2.5}


class Waves(NamedTuple):
    """Random Fourier features: `amplitude cos(frequencies x + phases)`.

    Attributes:
        frequencies: `(..., L, d)`, radians a unit of the inputs.
        phases: `(..., L)`
        amplitude: A scalar, `sqrt(2 s / L)` of the kernel's variance s.
    """

    frequencies: Tensor
    phases: Tensor
    amplitude: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """The features `(..., n, L)` of points `(..., n, d)`; their products are the kernel."""
        turns = x @ self.frequencies.mT + self.phases[..., None, :]
        return self.amplitude * turns.cos()


def random_features(
    kernel: Any, num_features: int, dim: int, *, generator: torch.Generator | None = None
) -> Waves:
    """Random Fourier features of a stationary gpytorch kernel.

    Args:
        kernel: RBF or Matern, with or without a `ScaleKernel` around it and a length for each
            dimension. Its hyperparameters keep their graph.
        num_features: Waves L.
        dim: Dimension d of the inputs.
        generator: Draws on the kernel's device.

    Returns:
        The features; the mean of `waves(x) @ waves(y).mT` over draws is the kernel.

    Raises:
        ValueError: Another kernel, a batch of kernels, or sizes below 1.

    Source:
        A. Rahimi and B. Recht, "Random features for large-scale kernel machines", 2007.

    Example:
        >>> from gpytorch.kernels import RBFKernel
        >>> waves = random_features(RBFKernel(), 4000, 2)
        >>> x = torch.tensor([[0.0, 0.0], [0.5, 0.0]])
        >>> bool((waves(x) @ waves(x).mT - RBFKernel()(x).to_dense()).abs().max() < 0.1)
        True
    """
    from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel

    _check_size("num_features", num_features)
    _check_size("dim", dim)
    scale: Any = 1.0
    base = kernel
    while isinstance(base, ScaleKernel):
        scale, base = scale * base.outputscale, base.base_kernel
    if not isinstance(base, RBFKernel | MaternKernel) or len(base.batch_shape):
        raise ValueError(
            f"kernel: expected one RBF or Matern kernel of gpytorch, got {type(base).__name__} "
            f"of batch shape {tuple(getattr(base, 'batch_shape', ()))}"
        )
    nu = base.nu if isinstance(base, MaternKernel) else math.inf
    length = base.lengthscale
    unit, phases = draw_spectrum(nu, (num_features, dim), length, generator)
    amplitude = (2 * torch.as_tensor(scale).to(length) / num_features).sqrt()
    return Waves(unit / length, phases, amplitude)


def draw_spectrum(
    nu: float, shape: Sequence[int], like: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Frequencies from the spectrum of a Matern kernel of unit length, and uniform phases.

    The spectrum is a Student-t density of 2 nu degrees of freedom: a normal vector over the root
    of a gamma variable of mean 1. With nu infinite, the RBF kernel, it is the normal density.

    Args:
        nu: Smoothness of the kernel.
        shape: `(..., L, d)`
        like: Gives dtype and device.
        generator: Draws on that device.

    Returns:
        Frequencies of that shape, and phases `(..., L)`.
    """
    options: dict[str, Any] = {"device": like.device, "dtype": like.dtype, "generator": generator}
    frequencies: Tensor = torch.randn(tuple(shape), **options)
    if math.isfinite(nu):
        # nu is half an odd number, so 2 nu times the gamma variable is a sum of 2 nu squares
        squares = torch.randn((*shape[:-1], round(2 * nu)), **options).square()
        frequencies = frequencies / squares.mean(-1, keepdim=True).sqrt()
    return frequencies, 2 * math.pi * torch.rand(tuple(shape[:-1]), **options)


def padded_cholesky(k: Tensor, jitter: float | Tensor, mask: Tensor | None = None) -> Tensor:
    """Cholesky factor of K + jitter I in float64, with rows of the identity where there is no data.

    Args:
        k: Kernel matrices.
        jitter: Added to the diagonals.
        mask: Which rows and columns are data; None: all.

    Shape:
        - k: `(..., m, m)`
        - mask: `(..., m)`
        - output: `(..., m, m)`

    Example:
        >>> mask = torch.tensor([True, False])
        >>> padded_cholesky(torch.full((2, 2), 4.0), 0.0, mask).tolist()
        [[2.0, 0.0], [0.0, 1.0]]
    """
    eye = torch.eye(k.shape[-1], dtype=torch.float64, device=k.device)
    k = k.double() + jitter * eye
    if mask is not None:
        k = torch.where(mask[..., :, None] & mask[..., None, :], k, eye)
    return torch.linalg.cholesky_ex(k)[0]


class Paths:
    """Functions of a Gaussian process, differentiable; made by `PathwiseSparseGP.sample_paths`."""

    def __init__(self, gp: PathwiseSparseGP, waves: Waves, loadings: Tensor, weights: Tensor):
        self._gp, self._waves = gp, waves
        self._loadings, self._weights = loadings, weights

    def __call__(self, x: Tensor) -> Tensor:
        """Values of all n functions.

        Shape:
            - x: `(..., d)`
            - output: `(n, ...)`
        """
        self._gp._check(x)
        rows = x.reshape(-1, x.shape[-1]).double()
        prior = self._waves(rows) @ self._loadings
        values = prior + self._gp.covariance(rows, self._gp.inducing.double()) @ self._weights
        return values[..., 0].reshape(-1, *x.shape[:-1]).to(x.dtype)


@register(
    paper=67,
    example=lambda: Example(
        {"inducing": [[0.0, 0.2], [1.0, -0.4], [-0.8, 0.9]], "kernel": "matern32"},
        (torch.randn(4, 2, generator=torch.Generator().manual_seed(0)),),
        bad_options={
            "inducing": [1.0, 2.0],
            "kernel": "cubic",
            "lengthscale": 0.0,
            "outputscale": -1.0,
            "jitter": 0.0,
        },
    ),
    compare="sparse processes of gpytorch draw values at given points, not functions",
)
class PathwiseSparseGP(ZooModel):
    """Sparse Gaussian process from which whole functions are drawn, in linear time.

    q(u) = N(L v, L R R^T L^T) at the inducing points, L the Cholesky factor of their kernel matrix;
    v = 0 and R = I are the prior.

    Args:
        inducing: Inducing points; a tensor or lists of numbers. They learn.
        kernel: `"rbf"`, `"matern12"`, `"matern32"` or `"matern52"`.
        lengthscale: Its length in all dimensions, at the start.
        outputscale: Its variance, at the start.
        jitter: Added to the diagonal of the inducing points' matrix, relative to the variance.
        device: Device of the parameters; None: that of the points.
        dtype: Their dtype; None: that of the points. Factorisations are in float64 anyway.

    Shape:
        - inducing: `(m, d)`
        - x: `(..., d)`
        - output: mean and variance `(...)`

    Returns:
        A `GaussianPosterior` of the function, without noise.

    Raises:
        ValueError: An option out of its range, or inputs of another dimension.

    Source:
        J. T. Wilson and others, "Efficiently sampling functions from Gaussian process posteriors",
        2020; M. Titsias, "Variational learning of inducing variables in sparse Gaussian
        processes", 2009, for `condition`.

    Example:
        >>> x = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
        >>> gp = PathwiseSparseGP(x, lengthscale=0.5)
        >>> gp.condition(x, (3 * x[:, 0]).sin(), noise=1e-4)
        >>> paths = gp.sample_paths(5)
        >>> bool((paths(x) - (3 * x[:, 0]).sin()).abs().max() < 0.1)
        True
    """

    def __init__(
        self,
        inducing: Tensor | Sequence[Any],
        *,
        kernel: StationaryKind = "rbf",
        lengthscale: float = 1.0,
        outputscale: float = 1.0,
        jitter: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        points = torch.as_tensor(inducing, device=device, dtype=dtype)
        if points.ndim != 2 or not points.shape[1]:
            raise ValueError(f"inducing: expected points (m, d), got {tuple(points.shape)}")
        if kernel not in SMOOTHNESS:
            raise ValueError(f"kernel: expected one of {list(SMOOTHNESS)}, got {kernel!r}")
        for name, value in (("lengthscale", lengthscale), ("outputscale", outputscale)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a number above 0, got {value}")
        if not 1e-10 <= jitter < 1:
            raise ValueError(f"jitter: expected within [1e-10, 1), got {jitter}")
        super().__init__()
        self.kernel, self.jitter = kernel, jitter
        self._start = (math.log(lengthscale), math.log(outputscale))
        m, d = points.shape
        options: dict[str, Any] = {"device": points.device, "dtype": points.dtype}
        self.inducing = nn.Parameter(points.detach().clone())
        self.log_lengthscale = nn.Parameter(torch.empty(d, **options))
        self.log_outputscale = nn.Parameter(torch.empty((), **options))
        self.white_mean = nn.Parameter(torch.empty(m, **options))
        self.white_root = nn.Parameter(torch.empty(m, m, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The prior with the scales as they were given."""
        nn.init.constant_(self.log_lengthscale, self._start[0])
        nn.init.constant_(self.log_outputscale, self._start[1])
        nn.init.zeros_(self.white_mean)
        with torch.no_grad():
            self.white_root.copy_(torch.eye(len(self.white_root), device=self.white_root.device))

    @property
    def lengthscale(self) -> Tensor:
        """Lengths `(d,)`."""
        return self.log_lengthscale.exp()

    @property
    def outputscale(self) -> Tensor:
        """The prior's variance."""
        return self.log_outputscale.exp()

    def covariance(self, x1: Tensor, x2: Tensor) -> Tensor:
        """The kernel, in the dtype of the points.

        Shape:
            - x1: `(n, d)`
            - x2: `(m, d)`
            - output: `(n, m)`
        """
        length, scale = self.lengthscale.to(x1), self.outputscale.to(x1)
        square = ((x1 / length)[:, None] - x2 / length).square().sum(-1)
        if self.kernel == "rbf":
            return scale * (-square / 2).exp()
        nu = SMOOTHNESS[self.kernel]
        # the root has no slope at 0, and there the kernel needs none
        z = (2 * nu * square.clamp_min(1e-30)).sqrt()
        shape = {0.5: 0 * z, 1.5: z, 2.5: z + z.square() / 3}[nu]
        return scale * (1 + shape) * (-z).exp()

    def forward(self, x: Tensor) -> GaussianPosterior:
        self._check(x)
        with no_autocast(x):
            rows = x.reshape(-1, x.shape[-1]).double()
            white = self._white(rows)
            mean = self.white_mean.double() @ white
            seen = (self.white_root.double().mT @ white).square().sum(0)
            variance = self.outputscale.double() - white.square().sum(0) + seen
            shape = x.shape[:-1]
            return GaussianPosterior(
                mean.reshape(shape).to(x.dtype), variance.reshape(shape).to(x.dtype)
            )

    def sample_paths(
        self, n: int, *, num_basis: int = 256, generator: torch.Generator | None = None
    ) -> Paths:
        """Draw functions.

        Args:
            n: How many.
            num_basis: Waves L of each; mean and covariance of the functions are exact for any.
            generator: Draws on the device of the parameters.

        Returns:
            The functions, with gradients to points and parameters.

        Raises:
            ValueError: A size below 1.
        """
        _check_size("n", n)
        _check_size("num_basis", num_basis)
        places = self.inducing.double()
        m, d = places.shape
        unit, phases = draw_spectrum(SMOOTHNESS[self.kernel], (n, num_basis, d), places, generator)
        options: dict[str, Any] = {"device": places.device, "dtype": places.dtype}
        loadings = torch.randn((n, num_basis, 1), generator=generator, **options)
        noise = torch.randn((n, m, 1), generator=generator, **options)
        amplitude = (2 * self.outputscale.double() / num_basis).sqrt()
        waves = Waves(unit / self.lengthscale.double(), phases, amplitude)
        factor = self._factor()
        white = self.white_mean.double()[:, None] + self.white_root.double() @ noise
        gap = factor @ white - waves(places) @ loadings
        return Paths(self, waves, loadings, torch.cholesky_solve(gap, factor))

    def condition(self, x: Tensor, y: Tensor, noise: float) -> None:
        """Set q(u) to the best for these data; the exact posterior where x are the inducing points.

        Args:
            x: Inputs.
            y: Targets.
            noise: Variance of their noise.

        Shape:
            - x: `(n, d)`
            - y: `(n,)`

        Raises:
            ValueError: Data that don't fit, or a noise that is not above 0.
        """
        self._check(x)
        if x.ndim != 2 or y.shape != x.shape[:1]:
            raise ValueError(f"y: expected (n,) for x (n, d), got {tuple(y.shape)} and {x.shape}")
        if not 0 < noise < math.inf:
            raise ValueError(f"noise: expected a number above 0, got {noise}")
        with torch.no_grad():
            white = self._white(x.double())
            eye = torch.eye(len(white), dtype=white.dtype, device=white.device)
            factor = torch.linalg.cholesky(eye + white @ white.mT / noise)
            right = white @ y.double()[:, None] / noise
            self.white_mean.copy_(torch.cholesky_solve(right, factor)[:, 0])
            self.white_root.copy_(torch.linalg.solve_triangular(factor, eye, upper=False).mT)

    def kl(self) -> Tensor:
        """KL divergence of q(u) from the prior, a scalar."""
        root, mean = self.white_root.double(), self.white_mean.double()
        log_det = torch.linalg.slogdet(root)[1]
        return (root.square().sum() + mean.square().sum() - len(mean)) / 2 - log_det

    def extra_repr(self) -> str:
        m, d = self.inducing.shape
        return f"inducing={m}, dim={d}, kernel={self.kernel}"

    def _factor(self) -> Tensor:
        places = self.inducing.double()
        jitter = self.jitter * self.outputscale.double()
        return padded_cholesky(self.covariance(places, places), jitter)

    def _white(self, x: Tensor) -> Tensor:
        """L^-1 k(Z, x), `(m, n)`."""
        k = self.covariance(self.inducing.double(), x)
        return torch.linalg.solve_triangular(self._factor(), k, upper=False)

    def _check(self, x: Tensor) -> None:
        dim = self.inducing.shape[1]
        if x.ndim == 0 or x.shape[-1] != dim:
            raise ValueError(f"x: expected (..., {dim}), got {tuple(x.shape)}")


def _check_size(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
