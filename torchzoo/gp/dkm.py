"""Deep kernel machines: layers are optimised Gram matrices, and there are no features.

In a deep Gaussian process whose widths are N nu_l and whose data are copied N times, the Gram
matrices of the layers do not follow the prior as N grows, but maximise

    L = log p(Y | G_L) - sum_l nu_l KL(N(0, G_l) || N(0, K(G_(l-1)))),        G_0 = X X^T / D,
    KL(N(0, G) || N(0, K)) = (tr(K^-1 G) - N + log det K - log det G) / 2.

With nu to infinity G_l = K(G_(l-1)), the Gaussian process of an infinitely wide network; small nu
learns representations. For how Gram matrices are parametrised and extended to test points see
`torchzoo.gp.dkm_layer`; `torchzoo.gp.sparse_dkm` scales to large data.

A. X. Yang, M. Robeyns, E. Milsom, B. Anson, N. Schoots and L. Aitchison, "A theory of
representation learning gives a deep generalisation of kernel methods", 2023. Deviations: whitening;
sparse machines learn a noise variance and the scale of the last kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from torchzoo.common.solvers import minimize_lbfgs
from torchzoo.gp.dkm_layer import DKMLayer, layer_widths, shifted
from torchzoo.gp.gram_kernels import KINDS, GramBlocks, GramKernelKind, gram_kernel
from torchzoo.gp.posterior import GaussianPosterior
from torchzoo.hub import ZooModel
from torchzoo.ops.calling import no_autocast
from torchzoo.registry import Example, register


@register(
    paper=7,
    example=lambda: Example(
        {
            "depth": 2,
            "inputs": [[0.5, 1.0], [-1.0, 0.3], [0.2, -0.8], [1.4, 0.6]],
            "targets": [[0.3], [-0.5], [1.0], [0.1]],
        },
        (torch.randn(5, 2, generator=torch.Generator().manual_seed(0)),),
        bad_options={
            "depth": -1,
            "kernel": "cubic",
            "nu": -1.0,
            "noise": -0.1,
            "likelihood": "softmax",
            "jitter": 1.0,
            "targets": [[1.0]],
        },
    ),
    compare="layers of Gram matrices, which have no counterpart that maps features",
)
class DeepKernelMachine(ZooModel):
    """Deep kernel machine on all data points: time is cubic in their number.

    Args:
        depth: Optimised Gram matrices L; 0: a Gaussian process.
        kernel: `"relu"`, `"rbf"` or `"linear"`; see `torchzoo.gp.gram_kernel`.
        nu: Weight of the layers' KL terms, one or one a layer. Large: the Gaussian process of an
            infinitely wide network. Small: representations are learned.
        noise: Variance of the noise.
        likelihood: `"gaussian"`; for classes there is `SparseDKM`.
        inputs: Data, as a tensor or lists of numbers; None: `fit` brings it.
        targets: Their targets.
        jitter: Added to the diagonals of kernels, relative to their means.
        device: Device of data and parameters; None: that of the inputs.
        dtype: Their dtype; None: that of the inputs. float64 is advised.

    Shape:
        - x: `(..., D)`
        - inputs: `(N, D)`
        - targets: `(N, C)`
        - output: mean and variance `(..., C)`

    Returns:
        A `GaussianPosterior` of the outputs, their noise beside.

    Raises:
        RuntimeError: There is no data yet.
        ValueError: An option out of its range, or inputs of another dimension.

    Source:
        A. X. Yang and others, "A theory of representation learning gives a deep generalisation of
        kernel methods", 2023.

    Example:
        >>> x = torch.linspace(-2, 2, 20, dtype=torch.float64)[:, None]
        >>> x = torch.cat([x, torch.ones_like(x)], 1)
        >>> machine = DeepKernelMachine(1, noise=0.01)
        >>> losses = machine.fit(x, (3 * x[:, :1]).sin(), steps=50)
        >>> bool(losses[-1] < losses[0]), machine.grams[0].shape
        (True, torch.Size([20, 20]))
        >>> machine(x).mean.shape
        torch.Size([20, 1])
    """

    inputs: Tensor
    targets: Tensor

    def __init__(
        self,
        depth: int,
        *,
        kernel: GramKernelKind = "relu",
        nu: float | Sequence[float] = 1.0,
        noise: float = 0.1,
        likelihood: Literal["gaussian"] = "gaussian",
        inputs: Tensor | Sequence[Any] | None = None,
        targets: Tensor | Sequence[Any] | None = None,
        jitter: float = 1e-8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if depth < 0:
            raise ValueError(f"depth: expected at least 0, got {depth}")
        if kernel not in KINDS:
            raise ValueError(f"kernel: expected one of {KINDS}, got {kernel!r}")
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise: expected a number of at least 0, got {noise}")
        if likelihood != "gaussian":
            raise ValueError(f"likelihood: expected 'gaussian', got {likelihood!r}")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter: expected within [0, 1), got {jitter}")
        widths = layer_widths(nu, depth)
        super().__init__()
        self.depth, self.kernel, self.widths = depth, kernel, widths
        self.noise, self.jitter = noise, jitter
        self.layers = nn.ModuleList()
        if inputs is not None and targets is not None:
            options: dict[str, Any] = {"device": device, "dtype": dtype}
            self._set_data(torch.as_tensor(inputs, **options), torch.as_tensor(targets, **options))
        elif inputs is not None or targets is not None:
            raise ValueError("inputs: expected to come with targets, got one without the other")

    def reset_parameters(self) -> None:
        """All Gram matrices at their priors."""
        for layer in self.layers:
            cast(DKMLayer, layer).reset_parameters()

    @property
    def grams(self) -> list[Tensor]:
        """The optimised Gram matrices, `(N, N)` each."""
        return [blocks.ii for blocks in self._blocks(self.inputs[:0])[1:]]

    def forward(self, x: Tensor) -> GaussianPosterior:
        self._check_data()
        if x.ndim == 0 or x.shape[-1] != self.inputs.shape[1]:
            raise ValueError(f"x: expected (..., {self.inputs.shape[1]}), got {tuple(x.shape)}")
        with no_autocast(x):
            rows = x.reshape(-1, x.shape[-1]).to(self.inputs.dtype)
            k = gram_kernel(*self._blocks(rows)[-1], self.kernel)
            factor = self._noisy_factor(k.ii)
            white = torch.linalg.solve_triangular(factor, k.ti.mT, upper=False)
            mean = white.mT @ torch.linalg.solve_triangular(factor, self.targets, upper=False)
            variance = (k.tt - white.square().sum(0))[:, None].expand_as(mean)
            shape = (*x.shape[:-1], self.targets.shape[1])
            noise = torch.full(shape, self.noise, dtype=mean.dtype, device=mean.device)
            return GaussianPosterior(mean.reshape(shape), variance.reshape(shape), noise)

    def predict(self, x: Tensor) -> GaussianPosterior:
        """The same without gradients."""
        with torch.no_grad():
            return self(x)

    def objective(self, targets: Tensor | None = None) -> Tensor:
        """L, to be maximised.

        Args:
            targets: None: those of the data.

        Shape:
            - targets: `(N, C)`
            - output: a scalar

        Raises:
            RuntimeError: There is no data yet.
        """
        self._check_data()
        y = self.targets if targets is None else targets
        blocks = self._blocks(self.inputs[:0])[-1]
        factor = self._noisy_factor(gram_kernel(*blocks, self.kernel).ii)
        misfit = torch.linalg.solve_triangular(factor, y, upper=False).square().sum()
        log_det = 2 * factor.diagonal().log().sum() + len(y) * math.log(2 * math.pi)
        fit = -(misfit + y.shape[1] * log_det) / 2
        layers = [cast(DKMLayer, layer) for layer in self.layers]
        return fit - sum((layer.nu * layer.kl() for layer in layers), torch.zeros_like(fit))

    def fit(
        self,
        inputs: Tensor,
        targets: Tensor,
        steps: int = 1000,
        *,
        method: Literal["adam", "lbfgs"] = "adam",
        lr: float = 1e-2,
    ) -> Tensor:
        """Take data, and optimise the Gram matrices from their priors.

        Args:
            inputs: Data; should be standardised.
            targets: Their targets.
            steps: Steps, or most iterations of L-BFGS.
            method: `"adam"`, its rate falling to 0 as a cosine, or `"lbfgs"`.
            lr: Rate of Adam at the start.

        Shape:
            - inputs: `(N, D)`
            - targets: `(N, C)`

        Returns:
            The loss, which is minus the objective, before each step of Adam; or the last alone.

        Raises:
            ValueError: Data of other shapes, not finite, or with a singular kernel matrix.
        """
        if method not in ("adam", "lbfgs"):
            raise ValueError(f"method: expected 'adam' or 'lbfgs', got {method!r}")
        self._set_data(inputs, targets)
        self._check_rank()
        if not self.depth:
            return -self.objective().detach()[None]
        if method == "lbfgs":
            found = minimize_lbfgs(lambda: -self.objective(), self.parameters(), max_iter=steps)
            return found.value[None]
        optimizer = torch.optim.Adam(self.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        losses = []
        for _ in range(steps):
            loss = -self.objective()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    def extra_repr(self) -> str:
        return f"depth={self.depth}, kernel={self.kernel!r}, noise={self.noise:g}"

    def _set_data(self, inputs: Tensor, targets: Tensor) -> None:
        if inputs.ndim != 2 or not inputs.numel():
            raise ValueError(f"inputs: expected (N, D), got {tuple(inputs.shape)}")
        if targets.ndim != 2 or len(targets) != len(inputs):
            raise ValueError(f"targets: expected ({len(inputs)}, C), got {tuple(targets.shape)}")
        options: dict[str, Any] = {"device": inputs.device, "dtype": inputs.dtype}
        self.register_buffer("inputs", inputs.detach().clone())
        self.register_buffer("targets", targets.detach().to(**options).clone())
        self.layers = nn.ModuleList(
            DKMLayer(len(inputs), kernel=self.kernel, nu=nu, jitter=self.jitter, **options)
            for nu in self.widths
        )

    def _check_data(self) -> None:
        if "inputs" not in self._buffers:
            raise RuntimeError(f"this {type(self).__name__} has no data yet; call fit first")

    def _check_rank(self) -> None:
        for name, value in {"inputs": self.inputs, "targets": self.targets}.items():
            if not value.isfinite().all():
                raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
        k = shifted(gram_kernel(*self._blocks(self.inputs[:0])[0], self.kernel).ii, self.jitter)
        if torch.linalg.cholesky_ex(k)[1] > 0:
            rank = int(torch.linalg.matrix_rank(k, hermitian=True))
            raise ValueError(
                f"inputs: expected a {self.kernel} kernel matrix of full rank {len(k)}, got rank "
                f"{rank}; a jitter above {self.jitter:g} may help"
            )

    def _blocks(self, x: Tensor) -> list[GramBlocks]:
        """Gram matrices of the inputs and all layers, with test points x."""
        self._check_data()
        scale = self.inputs.shape[1]
        found = [
            GramBlocks(
                self.inputs @ self.inputs.mT / scale,
                x @ self.inputs.mT / scale,
                x.square().sum(-1) / scale,
            )
        ]
        for layer in self.layers:
            found.append(layer(*found[-1]))
        return found

    def _noisy_factor(self, k: Tensor) -> Tensor:
        k = shifted(k, self.jitter)
        return torch.linalg.cholesky_ex(k + self.noise * torch.eye(len(k)).to(k))[0]
