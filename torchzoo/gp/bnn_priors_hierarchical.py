"""Priors over the weights of a network whose variances are themselves drawn.

For each tensor t of a network's parameters, f its fan-in (1 for a vector, such as a bias),

    1 / s_t^2 ~ Gamma(alpha_t, beta_t),   w ~ N(0, s_t^2 / f),

and alpha and beta are learned. The variance of a tensor of n entries integrates out, with
S = f sum w^2, to

    log p(w) = alpha log beta - (alpha + n/2) log(beta + S/2) + log Gamma(alpha + n/2)
               - log Gamma(alpha) - n/2 log(2 pi / f).

B.-H. Tran, S. Rossi, D. Milios and M. Filippone, "All you need is a good functional prior for
Bayesian deep learning", 2022, section 4.2. Deviations: gamma variables are quantiles of uniform
ones, so that all draws are smooth in what is learned; posteriors use the integrated density, where
the paper alternates with draws of s.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.gp.bnn_priors import STOCHASTIC, Network, PriorNet, inverse_softplus, prior_example
from torchzoo.registry import register


@register(
    paper=13,
    example=lambda: prior_example(init_shape=0.0, init_rate=-1.0),
    exempt=STOCHASTIC,
    compare="a prior over networks: what counts is the posterior, which the experiment measures",
)
class HierarchicalPriorNet(PriorNet):
    """Normal weights, the precision of each tensor gamma distributed.

    Args:
        module: A network, whose own weights are not used, or the widths of one with tanh. Only the
            latter is saved by `save_pretrained`.
        init_shape: Shape alpha of the gamma distributions at the start.
        init_rate: Their rate beta.
        device: Device of the parameters.
        dtype: Their dtype.

    Shape:
        - x: `(..., D)`, or what the network takes
        - output: `(..., O)`

    Returns:
        One function drawn from the prior, at x.

    Raises:
        ValueError: A network without parameters, an option out of its range, or inputs of another
            dimension.

    Source:
        B.-H. Tran and others, "All you need is a good functional prior for Bayesian deep learning",
        2022, section 4.2.

    Example:
        >>> prior = HierarchicalPriorNet([1, 20, 1], init_shape=3.0)
        >>> weights = prior.sample_weights(5)
        >>> weights["0.weight"].shape, prior.log_prior(weights).shape
        (torch.Size([5, 20, 1]), torch.Size([5]))
    """

    def __init__(
        self,
        module: Network,
        *,
        init_shape: float = 1.0,
        init_rate: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        for name, value in {"init_shape": init_shape, "init_rate": init_rate}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: expected above 0, got {value}")
        super().__init__(module, device=device, dtype=dtype)
        self.init_shape, self.init_rate = init_shape, init_rate
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.raw_shape = nn.Parameter(torch.empty(len(self.shapes), **options))
        self.raw_rate = nn.Parameter(torch.empty(len(self.shapes), **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All gamma distributions as at the start."""
        with torch.no_grad():
            for raw, value in ((self.raw_shape, self.init_shape), (self.raw_rate, self.init_rate)):
                raw.copy_(inverse_softplus(torch.full_like(raw, value)))

    @property
    def alpha(self) -> Tensor:
        """Shapes of the gamma distributions `(T,)`, in the order of `shapes`."""
        return F.softplus(self.raw_shape)

    @property
    def beta(self) -> Tensor:
        """Their rates `(T,)`."""
        return F.softplus(self.raw_rate)

    def sample_weights(
        self, n: int, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        like = self.raw_shape
        uniform = torch.rand(
            (n, len(self.shapes)), generator=generator, device=like.device, dtype=torch.float64
        )
        std = (self.beta / gamma_quantile(uniform, self.alpha)).sqrt()
        noise = self._normal(n, like, generator)
        return {
            name: scale.reshape(-1, *[1] * (e.ndim - 1)) / math.sqrt(fan) * e
            for (name, e), scale, fan in zip(
                noise.items(), std.unbind(-1), self.fan_ins, strict=True
            )
        }

    def _log_density(self, index: int, w: Tensor) -> Tensor:
        alpha, beta, fan = self.alpha[index], self.beta[index], self.fan_ins[index]
        half = w.shape[-1] / 2
        rate = beta + fan * w.square().sum(-1) / 2
        scales = torch.lgamma(alpha + half) - torch.lgamma(alpha) + alpha * beta.log()
        return scales - (alpha + half) * rate.log() - half * math.log(2 * math.pi / fan)


def gamma_quantile(u: Tensor, alpha: Tensor) -> Tensor:
    """Quantiles of gamma distributions of rate 1, differentiable by their shapes.

    Args:
        u: Probabilities within [0, 1), float64; they are held below 1 by 1e-9.
        alpha: Shapes, above 0.

    Shape:
        - u, alpha: broadcast to the output

    Returns:
        The quantiles, in the dtype of `alpha`.

    Example:
        >>> u = torch.tensor([0.5], dtype=torch.float64)
        >>> gamma_quantile(u, torch.ones(1))  # log 2
        tensor([0.6931])
    """
    shape = alpha.detach().double()
    u, shape = torch.broadcast_tensors(u.clamp(1e-30, 1 - 1e-9), shape)
    low = torch.full_like(u, -700.0)  # in the logarithm, as small shapes have tiny quantiles
    high = (shape + 10 * shape.sqrt() + 30).log()
    for _ in range(64):
        middle = (low + high) / 2
        below = torch.special.gammainc(shape, middle.exp()) < u
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    x = high.exp()
    step = 1e-4 * shape / (1 + shape.sqrt())  # small against the spread
    change = torch.special.gammainc(shape + step, x) - torch.special.gammainc(shape - step, x)
    log_density = (shape - 1) * high - x - torch.lgamma(shape)
    slope = -change / (2 * step) * (-log_density).exp()  # of the quantile at a given u
    return x.to(alpha.dtype) + slope.to(alpha.dtype) * (alpha - alpha.detach())
