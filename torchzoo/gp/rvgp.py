"""RVGP: Gaussian process of tangent vector fields on a manifold seen as a point cloud.

The prior of a field is a sum of eigenvectors of the connection Laplacian with independent
coefficients, f_i = Phi_i w, w ~ N(0, S) (see `torchzoo.gp.rvgp_kernel`), seen with noise sigma^2 in
each ambient component. With Psi = Phi S^(1/2) and B = Psi_o^T Psi_o + sigma^2 I, of observed nodes,

    mean_i = Psi_i B^-1 Psi_o^T y,      cov_i = sigma^2 Psi_i B^-1 Psi_i^T,

exact, in time `n d K^2` and not `(n d)^3`. Predictions lie in the tangent spaces, as Phi_i does.

R. L. Peach and others, "Implicit Gaussian process representation of vector fields over arbitrary
latent manifolds", 2024. Deviations: eigenvectors have unit length, so that the output scale is a
variance; the cut never parts equal eigenvalues; points outside the graph can be predicted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchzoo.common.solvers import Solution, minimize_lbfgs
from torchzoo.gp.manifold_laplacian import ConnectionLaplacian
from torchzoo.gp.rvgp_kernel import Family, GraphConnectionKernel
from torchzoo.hub import ZooModel
from torchzoo.ops.calling import no_autocast
from torchzoo.registry import Example, register


class VectorPosterior(NamedTuple):
    """Gaussian vectors, by mean and covariance of the components.

    Attributes:
        mean: `(..., d)`
        covariance: `(..., d, d)`, of rank m at most; without noise.

    Example:
        >>> VectorPosterior(torch.zeros(4, 3), torch.eye(3).expand(4, 3, 3)).variance.shape
        torch.Size([4, 3])
    """

    mean: Tensor
    covariance: Tensor

    @property
    def variance(self) -> Tensor:
        """Variances of the components, `(..., d)`."""
        return self.covariance.diagonal(dim1=-2, dim2=-1)


@register(
    paper=65,
    example=lambda: Example(
        {
            "points": [
                [0.0, 0.0, 0.1],
                [1.0, 0.1, 0.0],
                [0.9, 1.2, 0.3],
                [0.1, 0.8, 0.0],
                [-0.7, 0.5, -0.2],
                [0.4, -0.9, 0.2],
                [-0.8, -0.6, 0.4],
            ],
            "num_eigenpairs": 5,
            "dim": 2,
            "k": 4,
        },
        (torch.tensor([0, 3, 6]),),
        bad_options={
            "points": [[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]],
            "num_eigenpairs": 0,
            "dim": 4,
            "k": 7,
            "nu": -1.0,
            "noise": 0.0,
            "family": "cubic",
        },
    ),
    compare="gpytorch has no process of tangent vectors; the experiment has scalar ones beside it",
)
class RVGP(ZooModel):
    """Gaussian process of vectors tangent to an unknown manifold, at the nodes of its graph.

    Args:
        points: Points of the manifold, preferably of even density (see `furthest_points`); a
            tensor, or numbers in lists, which a saved model needs. Or a `ConnectionLaplacian`,
            which has its own graph and frames.
        num_eigenpairs: Eigenpairs K; more where that would part equal eigenvalues.
        dim: Dimension m of the manifold; None: estimated.
        k: Neighbours of each point in the graph.
        nu: Smoothness at the start; see `GraphConnectionKernel` for this and what follows.
        kappa: Length scale at the start.
        outputscale: Mean prior variance of a component at the start.
        family: `"matern"` or `"se"`.
        shift: Added to the exponent nu.
        noise: Variance of the noise of a component, at the start.
        device: Device of buffers and parameters; None: that of the points.
        dtype: Their dtype; None: that of the points. Factorisations are in float64 anyway.

    Shape:
        - points: `(n, d)`
        - idx: `(...)`, integers below n
        - output: mean `(..., d)` and covariance `(..., d, d)`

    Returns:
        A `VectorPosterior` at the nodes; the prior, where `fit` has not brought data.

    Raises:
        ValueError: An option out of its range, points that are equal or form no connected graph,
            or inputs of a wrong kind.

    Source:
        R. L. Peach and others, "Implicit Gaussian process representation of vector fields over
        arbitrary latent manifolds", 2024.

    Example:
        >>> angles = torch.arange(40, dtype=torch.float64) * torch.pi / 20
        >>> points = torch.stack([angles.cos(), angles.sin()], 1)
        >>> around = torch.stack([-angles.sin(), angles.cos()], 1)
        >>> gp = RVGP(points, num_eigenpairs=9, k=4)
        >>> known = torch.arange(0, 40, 4)
        >>> found = gp.fit(known, around[known])
        >>> bool((gp(torch.arange(40)).mean - around).abs().max() < 0.05)
        True
    """

    vectors: Tensor
    observed: Tensor

    def __init__(
        self,
        points: Tensor | Sequence[Any] | ConnectionLaplacian,
        *,
        num_eigenpairs: int = 50,
        dim: int | None = None,
        k: int = 10,
        nu: float = 1.5,
        kappa: float = 5.0,
        outputscale: float = 1.0,
        family: Family = "matern",
        shift: float = 0.0,
        noise: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if not 0 < noise < math.inf:
            raise ValueError(f"noise: expected a number above 0, got {noise}")
        super().__init__()
        if isinstance(points, ConnectionLaplacian):
            laplacian, like = points, points.points
        else:
            like = points if isinstance(points, Tensor) else torch.empty(0)
            with torch.device("cpu"):  # the geometry is computed, also for a model on meta
                known = (
                    like
                    if isinstance(points, Tensor)
                    else torch.tensor(points, dtype=torch.float64)
                )
                laplacian = ConnectionLaplacian(known, k=k, dim=dim)
        most = laplacian.frames.shape[0] * laplacian.dim
        if not 1 <= num_eigenpairs <= most:
            raise ValueError(f"num_eigenpairs: expected 1 to {most}, got {num_eigenpairs}")
        with torch.device("cpu"):
            evals, local = laplacian.eigs(num_eigenpairs)
            evecs = laplacian.lift(local)
        options: dict[str, Any] = {"device": device or like.device, "dtype": dtype or like.dtype}
        self.laplacian = laplacian
        self.kernel = GraphConnectionKernel(
            evals,
            evecs,
            nu=nu,
            kappa=kappa,
            outputscale=outputscale,
            family=family,
            shift=shift,
            **options,
        )
        n, d, _ = evecs.shape
        self._start = noise
        self.register_buffer("vectors", torch.zeros(n, d, **options))
        self.register_buffer("observed", torch.zeros(n, dtype=torch.bool, device=options["device"]))
        self.log_noise = nn.Parameter(torch.empty((), **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kernel and noise as they were given."""
        self.kernel.reset_parameters()
        nn.init.constant_(self.log_noise, math.log(self._start))

    @property
    def noise(self) -> Tensor:
        """Variance of the noise of a component."""
        return self.log_noise.exp()

    def forward(self, idx: Tensor) -> VectorPosterior:
        if idx.is_floating_point() or idx.dtype == torch.bool:
            raise ValueError(f"idx: expected integers, got {idx.dtype}")
        return self.predict(self.kernel.evecs[idx])

    def predict(self, encoding: Tensor) -> VectorPosterior:
        """Predict where the eigenvectors have these values, as those that `extend` gives.

        Shape:
            - encoding: `(..., d, K)`
            - outputs: `(..., d)` and `(..., d, d)`

        Raises:
            ValueError: An encoding of another shape.
        """
        if encoding.shape[-2:] != self.kernel.evecs.shape[-2:]:
            expected = tuple(self.kernel.evecs.shape[-2:])
            raise ValueError(f"encoding: expected (..., {expected}), got {tuple(encoding.shape)}")
        with no_autocast(encoding):
            root, factor, weights = self._solve()
            psi = encoding.double() * root
            spread = torch.linalg.solve_triangular(factor.mT, psi, upper=True, left=False)
            covariance = self.noise.double() * spread @ spread.mT
            kind = self.kernel.evecs.dtype
            return VectorPosterior((psi @ weights).to(kind), covariance.to(kind))

    def fit(self, idx_train: Tensor, vectors: Tensor, *, max_iter: int = 1000) -> Solution:
        """Take vectors at some nodes, and maximise the marginal likelihood by L-BFGS.

        Args:
            idx_train: The nodes, each once.
            vectors: What is seen there.
            max_iter: Most iterations; 0: only take the data.

        Shape:
            - idx_train: `(N,)`
            - vectors: `(N, d)`

        Returns:
            The `Solution`, its value the negative log marginal likelihood per component seen.

        Raises:
            ValueError: Data of other shapes, not finite, none, or a node twice or out of range.
        """
        n, d = self.vectors.shape
        if idx_train.ndim != 1 or idx_train.dtype != torch.long or not len(idx_train):
            what = f"{idx_train.dtype} of shape {tuple(idx_train.shape)}"
            raise ValueError(f"idx_train: expected indices (N,), got {what}")
        if not (idx_train.min() >= 0 and idx_train.max() < n):
            raise ValueError(f"idx_train: expected 0 to {n - 1}, got nodes out of it")
        if len(idx_train.unique()) < len(idx_train):
            raise ValueError("idx_train: expected each node once, got some twice")
        if vectors.shape != (len(idx_train), d):
            raise ValueError(
                f"vectors: expected ({len(idx_train)}, {d}), got {tuple(vectors.shape)}"
            )
        if not vectors.isfinite().all():
            raise ValueError("vectors: expected finite numbers, got NaN or infinity")
        self.observed.zero_()[idx_train] = True
        self.vectors.zero_()[idx_train] = vectors.detach().to(self.vectors)
        seen = vectors.numel()
        if not max_iter:
            value = -self.log_marginal_likelihood().detach() / seen
            return Solution(value, False, 0, math.inf)
        return minimize_lbfgs(
            lambda: -self.log_marginal_likelihood() / seen,
            self.parameters(),
            max_iter=max_iter,
            tol=1e-6,
        )

    def log_marginal_likelihood(self) -> Tensor:
        """Log density of the vectors seen, by kernel and noise; a scalar, in float64."""
        root, factor, weights = self._solve()
        noise = self.noise.double()
        # not as a difference of squares, which loses all digits where the noise is small
        miss = self._targets() - self._encoding() * root @ weights
        misfit = miss.square().sum() / noise + weights.square().sum()
        seen = self.observed.sum() * self.vectors.shape[1]
        log_det = 2 * factor.diagonal().log().sum() + (seen - len(root)) * noise.log()
        return -(misfit + log_det + seen * math.log(2 * math.pi)) / 2

    def extend(self, new_points: Tensor) -> Tensor:
        """The eigenvectors at points outside the graph, for `predict`.

        Shape:
            - new_points: `(N, d)`
            - output: `(N, d, K)`

        Raises:
            ValueError: Points of another dimension, or eigenvalues too large to extend; see
                `ConnectionLaplacian.extend`.
        """
        return self.laplacian.extend(self.kernel.evals, self.kernel.evecs, new_points)

    def smooth(self, vectors: Tensor, time: float = 1.0, *, keep_norm: bool = False) -> Tensor:
        """Let vectors at all nodes diffuse; see `ConnectionLaplacian.smooth`.

        Shape:
            - vectors: `(n, d)`
            - output: `(n, d)`
        """
        return self.laplacian.smooth(vectors, time, keep_norm=keep_norm)

    def extra_repr(self) -> str:
        k = self.laplacian.k
        return f"dim={self.laplacian.dim}, k={k}, observed={int(self.observed.sum())}"

    def _encoding(self) -> Tensor:
        """Phi of the observed nodes, 0 at the others: sizes depend on no values."""
        return self.kernel.evecs.double() * self.observed[:, None, None]

    def _targets(self) -> Tensor:
        return self.vectors.double() * self.observed[:, None]

    def _solve(self) -> tuple[Tensor, Tensor, Tensor]:
        """S^(1/2), the Cholesky factor of B, and the mean of the whitened coefficients."""
        root = self.kernel.spectrum.double().sqrt()
        psi = (self._encoding() * root).flatten(0, 1)
        eye = torch.eye(len(root), dtype=psi.dtype, device=psi.device)
        factor = torch.linalg.cholesky_ex(psi.mT @ psi + self.noise.double() * eye)[0]
        right = psi.mT @ self._targets().flatten()[:, None]
        return root, factor, torch.cholesky_solve(right, factor)[:, 0]
