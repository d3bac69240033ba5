"""Deep kernel machines on inducing points; see `torchzoo.gp.dkm` and `torchzoo.gp.dkm_layer`.

With f_c the outputs at the inducing points of the last layer and q(f_c) = N(mu_c, S), maximised is

    N E_q[log p(y | f)] - sum_c KL(q(f_c) || N(0, K(G_L)))
        - sum_l nu_l KL(N(0, G_l) || N(0, K(G_(l-1)))),

the expectation over points of a mini-batch, and q whitened as the layers are: mu_c = L m_c,
S = L B B^T L^T. The outputs have mean K_ti K_ii^-1 mu_c and variance
K_tt - K_ti K_ii^-1 (K_ii - S) K_ii^-1 K_it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.gp.dkm_layer import JITTER, DKMLayer, layer_widths, set_identity, whiten, whitened_kl
from torchzoo.gp.gram_kernels import KINDS, GramBlocks, GramKernelKind
from torchzoo.gp.posterior import GaussianPosterior
from torchzoo.hub import ZooModel
from torchzoo.ops.calling import no_autocast
from torchzoo.registry import Example, register


@register(
    paper=7,
    example=lambda: Example(
        {"in_dim": 3, "out_dim": 2, "num_layers": 2, "num_inducing": 4},
        (torch.randn(5, 3, generator=torch.Generator().manual_seed(1)),),
        bad_options={
            "in_dim": 0,
            "out_dim": 0,
            "num_layers": -1,
            "num_inducing": 0,
            "kernel": "cubic",
            "nu": [1.0],
            "noise": 0.0,
            "likelihood": "poisson",
        },
    ),
    compare="layers of Gram matrices, which have no counterpart that maps features",
)
class SparseDKM(ZooModel):
    """Deep kernel machine on inducing points: training takes linear time in the data.

    `elbo` is the objective to maximise over mini-batches; call `init_inducing` first.

    Args:
        in_dim: Input features D; inputs should be standardised.
        out_dim: Outputs or classes C.
        num_layers: Optimised Gram matrices; 0: a sparse Gaussian process.
        num_inducing: Inducing points P.
        kernel: `"relu"`, `"rbf"` or `"linear"`.
        nu: Weight of the layers' KL terms, one or one a layer. Large: the Gaussian process of an
            infinitely wide network. Small: representations are learned.
        noise: Variance of the noise at the start; of the Gaussian likelihood only.
        likelihood: `"gaussian"` or `"softmax"`.
        train_inducing_inputs: Whether the inducing inputs learn.
        jitter: Added to the diagonals of kernels, relative to their means.
        device: Device of the parameters.
        dtype: Their dtype.

    Shape:
        - x: `(..., D)`
        - output: mean and variance `(..., C)`; with the softmax likelihood samples `(S, ..., C)`

    Returns:
        For the Gaussian likelihood a `GaussianPosterior` of the outputs and their noise; for the
        softmax likelihood samples of the logits, 10 in training and 100 in evaluation.

    Raises:
        ValueError: An option out of its range, or inputs of another dimension.

    Source:
        A. X. Yang and others, "A theory of representation learning gives a deep generalisation of
        kernel methods", 2023, section on sparse deep kernel machines.

    Example:
        >>> x = torch.randn(100, 3)
        >>> model = SparseDKM(3, 1, num_layers=2, num_inducing=16)
        >>> model.init_inducing(x, method="subset")
        >>> loss = -model.elbo(x[:20], x[:20].sum(1, keepdim=True), num_data=100)
        >>> loss.backward()
        >>> model(x).mean.shape
        torch.Size([100, 1])
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        num_layers: int = 3,
        num_inducing: int = 128,
        kernel: GramKernelKind = "relu",
        nu: float | Sequence[float] = 5.0,
        noise: float = 0.1,
        likelihood: Literal["gaussian", "softmax"] = "gaussian",
        train_inducing_inputs: bool = True,
        jitter: float = JITTER,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        for name, value in {"in_dim": in_dim, "out_dim": out_dim}.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if num_layers < 0:
            raise ValueError(f"num_layers: expected at least 0, got {num_layers}")
        if num_inducing < 1:
            raise ValueError(f"num_inducing: expected at least 1, got {num_inducing}")
        if kernel not in KINDS:
            raise ValueError(f"kernel: expected one of {KINDS}, got {kernel!r}")
        if not 0 < noise < math.inf:
            raise ValueError(f"noise: expected a number above 0, got {noise}")
        if likelihood not in ("gaussian", "softmax"):
            raise ValueError(f"likelihood: expected 'gaussian' or 'softmax', got {likelihood!r}")
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_dim, self.out_dim, self.kernel = in_dim, out_dim, kernel
        self.likelihood, self.jitter, self._start_noise = likelihood, jitter, noise
        self.layers = nn.ModuleList(
            DKMLayer(num_inducing, kernel=kernel, nu=width, jitter=jitter, **options)
            for width in layer_widths(nu, num_layers)
        )
        self.inducing = nn.Parameter(
            torch.empty(num_inducing, in_dim, **options), requires_grad=train_inducing_inputs
        )
        self.mean = nn.Parameter(torch.empty(num_inducing, out_dim, **options))
        self.factor = nn.Parameter(torch.empty(num_inducing, num_inducing, **options))
        self.log_scale = nn.Parameter(torch.empty((), **options))
        if likelihood == "gaussian":
            self.log_noise = nn.Parameter(torch.empty((), **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All layers and the posterior at their priors; inducing inputs standard normal."""
        for layer in self.layers:
            cast(DKMLayer, layer).reset_parameters()
        nn.init.normal_(self.inducing)
        nn.init.zeros_(self.mean)
        set_identity(self.factor)
        nn.init.zeros_(self.log_scale)
        if self.likelihood == "gaussian":
            nn.init.constant_(self.log_noise, math.log(self._start_noise))

    @torch.no_grad()
    def init_inducing(
        self,
        x: Tensor,
        method: Literal["kmeans", "subset"] = "kmeans",
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """Set the inducing inputs from data.

        Args:
            x: Data.
            method: `"kmeans"`: centres of clusters; `"subset"`: points drawn without replacement.
            generator: Draws the points, or the clusters' seed, on its own device.

        Shape:
            - x: `(N, D)`, N at least P

        Raises:
            ValueError: Another method, or data of another shape.
        """
        count = self.inducing.shape[0]
        if x.ndim != 2 or x.shape[1] != self.in_dim or len(x) < count:
            raise ValueError(
                f"x: expected (N, {self.in_dim}) with N at least the {count} inducing points, got "
                f"{tuple(x.shape)}"
            )
        device = generator.device if generator is not None else None
        if method == "subset":
            order = torch.randperm(len(x), generator=generator, device=device)
            self.inducing.copy_(x[order[:count].to(x.device)])
        elif method == "kmeans":
            from sklearn.cluster import KMeans

            seed = int(torch.randint(2**31 - 1, (), generator=generator, device=device))
            clusters = KMeans(count, n_init=1, random_state=seed).fit(x.double().cpu().numpy())
            self.inducing.copy_(torch.from_numpy(clusters.cluster_centers_))
        else:
            raise ValueError(f"method: expected 'kmeans' or 'subset', got {method!r}")

    @property
    def noise(self) -> Tensor:
        """Variance of the noise."""
        return self.log_noise.exp()

    def forward(self, x: Tensor) -> Any:
        latent = self.latent(x)
        if self.likelihood == "gaussian":
            return latent
        return latent.rsample((10 if self.training else 100,))

    def latent(self, x: Tensor) -> GaussianPosterior:
        """Posterior of the outputs without noise, or of the logits.

        Shape:
            - x: `(..., D)`
            - output: mean and variance `(..., C)`

        Raises:
            ValueError: Inputs of another dimension.
        """
        if x.ndim == 0 or x.shape[-1] != self.in_dim:
            raise ValueError(f"x: expected (..., {self.in_dim}), got {tuple(x.shape)}")
        with no_autocast(x):
            rows = x.reshape(-1, self.in_dim).to(self.inducing.dtype)
            blocks = self.grams(rows)[-1]
            _, white, tt = whiten(*blocks, self.kernel, self.jitter)
            spread = self.factor.tril().mT @ white
            variance = tt - white.square().sum(-2) + spread.square().sum(-2)
            scale = self.log_scale.exp()
            mean = scale.sqrt() * white.mT @ self.mean
            variance = (scale * variance)[:, None].expand_as(mean)
            shape = (*x.shape[:-1], self.out_dim)
            noise = self.noise.expand(shape) if self.likelihood == "gaussian" else None
            return GaussianPosterior(mean.reshape(shape), variance.reshape(shape), noise)

    def grams(self, x: Tensor) -> list[GramBlocks]:
        """Gram matrices of all layers, that of the inputs first.

        Shape:
            - x: `(B, D)`
        """
        scale = self.in_dim
        blocks = GramBlocks(
            self.inducing @ self.inducing.mT / scale,
            x @ self.inducing.mT / scale,
            x.square().sum(-1) / scale,
        )
        found = [blocks]
        for layer in self.layers:
            found.append(layer(*found[-1]))
        return found

    def elbo(
        self, x: Tensor, y: Tensor, num_data: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The objective for a mini-batch, to be maximised.

        Args:
            x: Inputs of the batch.
            y: Targets, or classes as integers.
            num_data: Size of the whole data set.
            generator: Draws the samples of the softmax likelihood.

        Shape:
            - x: `(B, D)`
            - y: `(B, C)`, or `(B,)` for classes
            - output: a scalar

        Raises:
            ValueError: Targets of another shape or type.
        """
        return num_data * self._expected_log_likelihood(x, y, generator) - self.kl()

    def kl(self) -> Tensor:
        """Sum of all KL terms: those of the layers with their weights, and the posterior's."""
        top = self.out_dim * whitened_kl(self.factor.tril()) + self.mean.square().sum() / 2
        layers = [cast(DKMLayer, layer) for layer in self.layers]
        return top + sum((layer.nu * layer.kl() for layer in layers), torch.zeros_like(top))

    def _expected_log_likelihood(
        self, x: Tensor, y: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """The mean over the batch."""
        if self.likelihood == "softmax":
            if y.is_floating_point() or y.shape != x.shape[:-1]:
                raise ValueError(
                    f"y: expected integers of shape {tuple(x.shape[:-1])}, got {y.dtype} of shape "
                    f"{tuple(y.shape)}"
                )
            logits = self.latent(x).rsample((10,), generator=generator)
            losses = F.cross_entropy(logits.flatten(0, 1), y.repeat(10), reduction="mean")
            return -losses
        if not y.is_floating_point() or y.shape != (*x.shape[:-1], self.out_dim):
            expected = (*x.shape[:-1], self.out_dim)
            raise ValueError(
                f"y: expected floats of shape {tuple(expected)}, got {y.dtype} of shape "
                f"{tuple(y.shape)}"
            )
        mean, variance, _ = self.latent(x)
        misfit = ((y - mean).square() + variance) / self.noise
        return -(misfit + self.log_noise + math.log(2 * math.pi)).sum(-1).mean() / 2

    def extra_repr(self) -> str:
        return f"in_dim={self.in_dim}, out_dim={self.out_dim}, likelihood={self.likelihood!r}"
