"""Likelihoods of observed series, and decoders of latents into what they take.

For a linear decoder the output is Gaussian where the latents are, and two expectations are known:

    E[log Poisson(y; exp o)] = y m - exp(m + v / 2) - log y!,
    E[log N(x; o, s2)] = log N(x; m, s2) - v / (2 s2),  o ~ N(m, v).

So a likelihood here may take the variance v of the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.gp.posterior import GaussianPosterior
from torchzoo.hub import ZooModel
from torchzoo.registry import Example, register


def _example(kwargs: dict[str, object], **bad: object) -> Example:
    """Outputs and targets between 0 and 1."""
    draw = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
    return Example(kwargs, (draw[0], draw[1]), bad_options=bad)


def _check_pair(output: Tensor, target: Tensor) -> None:
    if not output.ndim or output.shape != target.shape:
        raise ValueError(
            f"output, target: expected one shape (..., D), got {tuple(output.shape)} and "
            f"{tuple(target.shape)}"
        )


@register(
    paper=94, example=lambda: _example({}), compare="a part of MMGPVAE, whose experiment has rivals"
)
class PoissonLikelihood(ZooModel):
    """Counts of which the output is the log rate.

    Shape:
        - output, target, variance: `(..., D)`
        - output: `(...)`, summed over D

    Returns:
        Log probabilities; given variances, their expectations under Gaussian outputs.

    Raises:
        ValueError: Output and target of different shapes.

    Source:
        J. H. Macke, L. Buesing, J. P. Cunningham, B. M. Yu, K. V. Shenoy and M. Sahani, "Empirical
        models of spiking in neural populations", 2011.

    Example:
        >>> PoissonLikelihood()(torch.zeros(1), torch.ones(1))  # a rate of 1, one count
        tensor(-1.)
    """

    closed_form = True

    def __init__(self) -> None:
        super().__init__()

    def forward(self, output: Tensor, target: Tensor, variance: Tensor | None = None) -> Tensor:
        _check_pair(output, target)
        rate = self.mean(output, variance)
        return (target * output - rate - torch.lgamma(target + 1)).sum(-1)

    def mean(self, output: Tensor, variance: Tensor | None = None) -> Tensor:
        """Expected counts."""
        return (output if variance is None else output + variance / 2).exp()

    def valid(self, target: Tensor) -> Tensor:
        """Which targets are counts."""
        return (target >= 0) & (target == target.floor())


@register(
    paper=94,
    example=lambda: _example({}, variance=0.0),
    compare="a part of MMGPVAE, whose experiment has rivals",
)
class GaussianLikelihood(ZooModel):
    """Real values around the output, with a learned variance.

    Args:
        variance: Initial variance of the noise.
        device: Device of the parameter.
        dtype: Its dtype.

    Shape:
        - output, target, variance: `(..., D)`
        - output: `(...)`, summed over D

    Returns:
        Log densities; given variances, their expectations under Gaussian outputs.

    Raises:
        ValueError: A variance not above 0, or output and target of different shapes.

    Source:
        D. P. Kingma and M. Welling, "Auto-encoding variational Bayes", 2014, appendix C.2.

    Example:
        >>> round(GaussianLikelihood()(torch.zeros(1), torch.zeros(1)).item(), 4)
        -0.9189
    """

    closed_form = True

    def __init__(
        self,
        variance: float = 1.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if not variance > 0:
            raise ValueError(f"variance: expected above 0, got {variance}")
        super().__init__()
        self._variance = variance
        self.log_variance = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial variance."""
        nn.init.constant_(self.log_variance, math.log(self._variance))

    def forward(self, output: Tensor, target: Tensor, variance: Tensor | None = None) -> Tensor:
        _check_pair(output, target)
        square = (target - output).square()
        square = square if variance is None else square + variance
        each = square / self.log_variance.exp() + self.log_variance + math.log(2 * math.pi)
        return -each.sum(-1) / 2

    def mean(self, output: Tensor, variance: Tensor | None = None) -> Tensor:
        """Expected values."""
        return output

    def valid(self, target: Tensor) -> Tensor:
        """Which targets are finite."""
        return target.isfinite()


@register(
    paper=94, example=lambda: _example({}), compare="a part of MMGPVAE, whose experiment has rivals"
)
class BernoulliLikelihood(ZooModel):
    """Values from 0 to 1 of which the output is the logit.

    Shape:
        - output, target: `(..., D)`
        - output: `(...)`, summed over D

    Returns:
        Log probabilities; between 0 and 1 their interpolation.

    Raises:
        ValueError: Output and target of different shapes.

    Source:
        D. P. Kingma and M. Welling, "Auto-encoding variational Bayes", 2014, appendix C.1.

    Example:
        >>> round(BernoulliLikelihood()(torch.zeros(1), torch.ones(1)).exp().item(), 4)
        0.5
    """

    closed_form = False

    def __init__(self) -> None:
        super().__init__()

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        _check_pair(output, target)
        return (target * output - F.softplus(output)).sum(-1)

    def mean(self, output: Tensor) -> Tensor:
        """Probabilities of 1."""
        return output.sigmoid()

    def valid(self, target: Tensor) -> Tensor:
        """Which targets are from 0 to 1."""
        return (target >= 0) & (target <= 1)


@register(
    paper=94,
    example=lambda: Example(
        {"num_latents": 2, "num_neurons": 4},
        (torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0)),),
        batch_dims=2,
        bad_options={"num_latents": 0, "num_neurons": 0},
    ),
    compare="a part of MMGPVAE, whose experiment has rivals",
)
class PoissonLoadingDecoder(ZooModel):
    """Log rates that are linear in the latents: W z + d.

    Args:
        num_latents: Latents P.
        num_neurons: Neurons N.
        device: Device of the parameters.
        dtype: Their dtype.

    Shape:
        - latents: `(..., P)`
        - output: `(..., N)`

    Returns:
        Log rates.

    Raises:
        ValueError: No latent, no neuron, or latents of another number.

    Source:
        R. Gondur, U. B. Sikandar, E. Schaffer, M. C. Aoi and S. L. Keeley, "Multi-modal Gaussian
        process variational autoencoders for neural and behavioral data", 2024, section 3.

    Example:
        >>> decoder = PoissonLoadingDecoder(1, 2)
        >>> decoder.init_rates(torch.tensor([[1.0, 2.0], [1.0, 4.0]]))
        >>> [round(rate, 4) for rate in decoder(torch.zeros(1)).exp().tolist()]
        [1.0, 3.0]
    """

    def __init__(
        self,
        num_latents: int,
        num_neurons: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        for name, count in {"num_latents": num_latents, "num_neurons": num_neurons}.items():
            if count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}")
        super().__init__()
        self.in_features, self.out_features = num_latents, num_neurons
        self.loading = nn.Linear(num_latents, num_neurons, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Loadings as of `nn.Linear`, rates of 1."""
        self.loading.reset_parameters()
        nn.init.zeros_(self.loading.bias)

    @torch.no_grad()
    def init_rates(self, counts: Tensor) -> None:
        """Start from the neurons' mean rates; a neuron without counts gets half a count in all.

        Shape:
            - counts: `(..., N)`
        """
        rows = counts.flatten(0, -2)
        self.loading.bias.copy_(rows.mean(0).clamp_min(0.5 / len(rows)).log())

    def forward(self, latents: Tensor) -> Tensor:
        self._check("latents", latents)
        return self.loading(latents)

    def moments(self, mean: Tensor, variance: Tensor) -> GaussianPosterior:
        """Means and variances of the log rates of independent Gaussian latents.

        Shape:
            - mean, variance: `(..., P)`
            - output: `(..., N)`
        """
        self._check("mean", mean)
        return GaussianPosterior(
            self.loading(mean), F.linear(variance, self.loading.weight.square())
        )

    def _check(self, name: str, latents: Tensor) -> None:
        if not latents.ndim or latents.shape[-1] != self.in_features:
            raise ValueError(
                f"{name}: expected (..., {self.in_features}), got {tuple(latents.shape)}"
            )


@register(
    paper=94,
    example=lambda: Example(
        {"sizes": [3, 4, 2]},
        (torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0)),),
        batch_dims=2,
        bad_options={"sizes": [3]},
    ),
    compare="a part of MMGPVAE, whose experiment has rivals",
)
class StepMLP(ZooModel):
    """Linear layers with ELU between them, for each step of a series by itself.

    Args:
        sizes: Widths, from that of the input to that of the output.
        device: Device of the parameters.
        dtype: Their dtype.

    Shape:
        - x: `(..., sizes[0])`
        - output: `(..., sizes[-1])`

    Returns:
        The last layer's output.

    Raises:
        ValueError: Fewer than two widths, one below 1, or an input of another width.

    Source:
        R. Gondur, U. B. Sikandar, E. Schaffer, M. C. Aoi and S. L. Keeley, "Multi-modal Gaussian
        process variational autoencoders for neural and behavioral data", 2024.

    Example:
        >>> StepMLP([5, 8, 2])(torch.zeros(4, 60, 5)).shape
        torch.Size([4, 60, 2])
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes: expected two or more widths of at least 1, got {sizes}")
        super().__init__()
        self.in_features, self.out_features = sizes[0], sizes[-1]
        self.layers = nn.ModuleList(
            nn.Linear(a, b, device=device, dtype=dtype) for a, b in pairwise(sizes)
        )

    def reset_parameters(self) -> None:
        """As of `nn.Linear`."""
        for layer in self.layers:
            layer.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        if not x.ndim or x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected (..., {self.in_features}), got {tuple(x.shape)}")
        for layer in self.layers[:-1]:
            x = F.elu(layer(x))
        return self.layers[-1](x)
