"""Matérn and squared-exponential kernels from the eigenvectors of a graph's connection Laplacian.

With eigenvalues lam_l and eigenvectors as ambient vectors Phi_i `(d, K)` at node i, the kernel of
two nodes is a matrix,

    k(i, j) = Phi_i S Phi_j^T,      S_l = sigma_f N s_l / sum s,      N = n d,
    s_l = (2 nu / kappa^2 + lam_l)^(-nu - shift)   or   exp(-kappa^2 lam_l / 2).

R. L. Peach and others, "Implicit Gaussian process representation of vector fields over arbitrary
latent manifolds", 2024, section 4; V. Borovitskiy and others, "Matérn Gaussian processes on
Riemannian manifolds", 2020. The Matérn exponent is the authors' code's; the theory adds m/2, which
`shift` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from torchzoo.hub import ZooModel
from torchzoo.registry import Example, register

Family = Literal["matern", "se"]
_LEAST = 1e-2  # of nu and kappa


@register(
    paper=65,
    example=lambda: Example(
        {
            "evals": [0.0, 1.0, 3.0],
            "evecs": [
                [[0.5, 0.5, 0.1], [0.1, -0.2, 0.5]],
                [[0.5, -0.5, 0.3], [0.4, 0.1, 0.2]],
                [[0.5, 0.1, -0.5], [-0.3, 0.2, 0.1]],
            ],
        },
        (torch.tensor([0, 2]), torch.tensor([1, 0, 2])),
        batch_dims=0,
        bad_options={
            "evals": [0.0, 1.0],
            "evecs": [0.5, 0.5, 0.5],
            "nu": 0.0,
            "kappa": -1.0,
            "outputscale": 0.0,
            "family": "cubic",
            "shift": -1.0,
        },
    ),
    compare="the kernel of RVGP, on nodes of a graph",
)
class GraphConnectionKernel(ZooModel):
    """Kernel of vectors at the nodes of a graph, from eigenpairs of its connection Laplacian.

    Args:
        evals: Eigenvalues, at least 0; a tensor, or numbers in lists, which a saved model needs.
        evecs: Eigenvectors as ambient vectors at each node, of unit length over all nodes, so that
            the mean prior variance of a component is the output scale. Without the axis of d:
            for numbers at the nodes, from the graph Laplacian.
        nu: Smoothness of the Matérn family, at the start.
        kappa: Length scale at the start, in units of the inverse root of an eigenvalue.
        outputscale: sigma_f at the start.
        family: `"matern"` or `"se"`, the squared exponential.
        shift: Added to the exponent nu; half the dimension of the manifold in theory.
        device: Device of buffers and parameters; None: that of the eigenvectors.
        dtype: Their dtype; None: that of the eigenvectors.

    Shape:
        - evals: `(K,)`
        - evecs: `(n, d, K)` or `(n, K)`
        - idx1: `(n1,)`
        - idx2: `(n2,)`
        - output: `(n1 d, n2 d)`

    Returns:
        The covariance of the components of the vectors at the nodes, node by node.

    Raises:
        ValueError: An option out of its range, or shapes that don't fit.

    Source:
        R. L. Peach and others, "Implicit Gaussian process representation of vector fields over
        arbitrary latent manifolds", 2024, section 4.

    Example:
        >>> kernel = GraphConnectionKernel(torch.zeros(1), torch.ones(4, 1) / 2, outputscale=3.0)
        >>> kernel.matrix(torch.tensor([0, 1])).detach().round(decimals=4)
        tensor([[3., 3.],
                [3., 3.]])
    """

    evals: Tensor
    evecs: Tensor

    def __init__(
        self,
        evals: Tensor | Sequence[float],
        evecs: Tensor | Sequence[Any],
        *,
        nu: float = 1.5,
        kappa: float = 5.0,
        outputscale: float = 1.0,
        family: Family = "matern",
        shift: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        for name, value, least in (
            ("nu", nu, _LEAST),
            ("kappa", kappa, _LEAST),
            ("outputscale", outputscale, 0.0),
        ):
            if not least < value < math.inf:
                raise ValueError(f"{name}: expected a number above {least:g}, got {value}")
        if family not in get_args(Family):
            raise ValueError(f"family: expected one of {get_args(Family)}, got {family!r}")
        if not 0 <= shift < math.inf:
            raise ValueError(f"shift: expected a number of at least 0, got {shift}")
        vectors = torch.as_tensor(evecs, dtype=dtype, device=device)
        if vectors.ndim not in (2, 3) or not vectors.is_floating_point() or not vectors.numel():
            raise ValueError(
                f"evecs: expected numbers (n, d, K) or (n, K), got {tuple(vectors.shape)}"
            )
        values = torch.as_tensor(evals, dtype=vectors.dtype, device=vectors.device)
        if values.shape != vectors.shape[-1:]:
            raise ValueError(
                f"evals: expected one for each of {vectors.shape[-1]} eigenvectors, "
                f"got {tuple(values.shape)}"
            )
        super().__init__()
        self.family, self.shift = family, shift
        self._start = (nu, kappa, outputscale)
        self.register_buffer("evals", values.detach().clone())
        vectors = vectors if vectors.ndim == 3 else vectors[:, None]
        self.register_buffer("evecs", vectors.detach().clone())
        like: dict[str, Any] = {"device": vectors.device, "dtype": vectors.dtype}
        self.raw_nu = nn.Parameter(torch.empty((), **like))
        self.raw_kappa = nn.Parameter(torch.empty((), **like))
        self.raw_outputscale = nn.Parameter(torch.empty((), **like))
        if family == "se":
            self.raw_nu.requires_grad_(False)  # it has none
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Smoothness, length and scale as they were given."""
        nu, kappa, outputscale = self._start
        with torch.no_grad():
            self.raw_nu.fill_(_inverse_softplus(nu - _LEAST))
            self.raw_kappa.fill_(_inverse_softplus(kappa - _LEAST))
            self.raw_outputscale.fill_(_inverse_softplus(outputscale))

    @property
    def nu(self) -> Tensor:
        """Smoothness, above 0.01."""
        return _LEAST + nn.functional.softplus(self.raw_nu)

    @property
    def kappa(self) -> Tensor:
        """Length scale, above 0.01."""
        return _LEAST + nn.functional.softplus(self.raw_kappa)

    @property
    def outputscale(self) -> Tensor:
        """sigma_f, the mean prior variance of a component."""
        return nn.functional.softplus(self.raw_outputscale)

    @property
    def spectrum(self) -> Tensor:
        """S, the prior variances of the eigenvectors' coefficients, `(K,)`."""
        evals = self.evals.clamp_min(0)
        if self.family == "matern":
            log = -(self.nu + self.shift) * (2 * self.nu / self.kappa.square() + evals).log()
        else:
            log = -self.kappa.square() * evals / 2
        n, d, _ = self.evecs.shape
        return self.outputscale * (n * d) * log.softmax(0)

    def forward(self, idx1: Tensor, idx2: Tensor) -> Tensor:
        for name, idx in (("idx1", idx1), ("idx2", idx2)):
            if idx.ndim != 1 or idx.is_floating_point():
                raise ValueError(f"{name}: expected indices (n,), got {tuple(idx.shape)}")
        left = (self.evecs[idx1] * self.spectrum).flatten(0, 1)
        return left @ self.evecs[idx2].flatten(0, 1).mT

    def matrix(self, idx1: Tensor, idx2: Tensor | None = None) -> Tensor:
        """The same; with one set of nodes, their own covariance."""
        return self(idx1, idx1 if idx2 is None else idx2)

    def extra_repr(self) -> str:
        n, d, count = self.evecs.shape
        return f"n={n}, d={d}, eigenpairs={count}, family={self.family!r}, shift={self.shift:g}"


def _inverse_softplus(value: float) -> float:
    """Of a number above 0."""
    return value + math.log(-math.expm1(-value))
