"""Priors over the weights of a network that are normalising flows.

A planar flow moves x along u, by how far it lies along w,

    y = x + u' tanh(w.x + b),      u' = u + (softplus(w.u) - 1 - w.u) w / w.w,
    log |dy / dx| = log(1 + (w.u') (1 - tanh^2(w.x + b))),

and w.u' > -1 makes it invertible: a = w.x is the one root of `a + (w.u') tanh(a + b) = w.y`.

B.-H. Tran, S. Rossi, D. Milios and M. Filippone, "All you need is a good functional prior for
Bayesian deep learning", 2022, section 4.3; D. Rezende and S. Mohamed, "Variational inference with
normalizing flows", 2015, section 4.1 and appendix A. Deviations: flows start as the identity, and
are inverted, so that the density of any weights is known.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from torchzoo.gp.bnn_priors import STOCHASTIC, Network, PriorNet, inverse_softplus, prior_example
from torchzoo.hub import ZooModel
from torchzoo.registry import Example, register


class Moved(NamedTuple):
    """Where a flow takes points.

    Attributes:
        value: The points, `(..., n)`.
        log_det: Logarithm of how much it stretches volumes there, `(...)`.
    """

    value: Tensor
    log_det: Tensor


@register(
    paper=13,
    example=lambda: Example(
        {"dim": 3},
        (torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),),
        bad_options={"dim": 0, "num_flows": -1},
    ),
    compare="a part of FlowPriorNet; torch has no flows",
)
class PlanarFlow(ZooModel):
    """A chain of planar flows.

    Args:
        dim: Dimension n.
        num_flows: Flows in the chain.
        device: Device of the parameters.
        dtype: Their dtype.

    Shape:
        - x: `(..., n)`
        - output: value `(..., n)` and log_det `(...)`

    Returns:
        Where the points go, and the logarithm of the stretch of volume there.

    Raises:
        ValueError: An option out of its range, or points of another dimension.

    Source:
        D. Rezende and S. Mohamed, "Variational inference with normalizing flows", 2015, equations
        10 to 12 and appendix A.1.

    Example:
        >>> flow = PlanarFlow(2).double()
        >>> x = torch.randn(5, 2).double()
        >>> torch.allclose(flow.inverse(flow(x).value).value, x)
        True
    """

    def __init__(
        self,
        dim: int,
        *,
        num_flows: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if dim < 1:
            raise ValueError(f"dim: expected at least 1, got {dim}")
        if num_flows < 0:
            raise ValueError(f"num_flows: expected at least 0, got {num_flows}")
        super().__init__()
        self.dim, self.num_flows = dim, num_flows
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.u = nn.Parameter(torch.empty(num_flows, dim, **options))
        self.w = nn.Parameter(torch.empty(num_flows, dim, **options))
        self.b = nn.Parameter(torch.empty(num_flows, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random directions w of norm about 1, along which nothing moves yet."""
        with torch.no_grad():
            self.w.normal_(0, 1 / math.sqrt(self.dim))
            self.b.zero_()
            unmoved = math.log(math.e - 1)  # the w.u of which u' is 0
            self.u.copy_(unmoved * self.w / self.w.square().sum(-1, keepdim=True))

    def forward(self, x: Tensor) -> Moved:
        log_det = x.new_zeros(self._check(x).shape[:-1])
        for u, w, b, slope in zip(*self._rows(), strict=True):
            bend = torch.tanh((x * w).sum(-1) + b)
            x = x + u * bend[..., None]
            log_det = log_det + torch.log1p(slope * (1 - bend.square()))
        return Moved(x, log_det)

    def inverse(self, y: Tensor) -> Moved:
        """Where points come from, with the logarithm of the stretch of the way back.

        Args:
            y: Points.

        Shape:
            - y: `(..., n)`
            - output: value `(..., n)` and log_det `(...)`

        Raises:
            ValueError: Points of another dimension.
        """
        log_det = y.new_zeros(self._check(y).shape[:-1])
        for u, w, b, slope in reversed(list(zip(*self._rows(), strict=True))):
            bend = torch.tanh(_root((y * w).sum(-1), slope, b) + b)
            y = y - u * bend[..., None]
            log_det = log_det - torch.log1p(slope * (1 - bend.square()))
        return Moved(y, log_det)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_flows={self.num_flows}"

    def _check(self, x: Tensor) -> Tensor:
        if x.ndim == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"x: expected (..., {self.dim}), got {tuple(x.shape)}")
        return x

    def _rows(self) -> tuple[tuple[Tensor, ...], ...]:
        """For each flow u', w, b and w.u'."""
        along = (self.w * self.u).sum(-1)
        size = self.w.square().sum(-1).clamp_min(1e-12)
        slope = nn.functional.softplus(along) - 1
        u = self.u + ((slope - along) / size)[:, None] * self.w
        return u.unbind(), self.w.unbind(), self.b.unbind(), slope.unbind()


def _root(s: Tensor, slope: Tensor, b: Tensor) -> Tensor:
    """The a of `a + slope tanh(a + b) = s`, differentiable by all three."""
    with torch.no_grad():
        low, high = s - slope.abs(), s + slope.abs()
        for _ in range(40):
            middle = (low + high) / 2
            below = middle + slope * torch.tanh(middle + b) < s
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        start = (low + high) / 2
        steep = 1 + slope * (1 - torch.tanh(start + b).square())
    # One step of Newton's method polishes the root, and carries its gradient.
    return start - (start + slope * torch.tanh(start + b) - s) / steep


@register(
    paper=13,
    example=lambda: prior_example(num_flows=-1),
    exempt=STOCHASTIC,
    compare="a prior over networks: what counts is the posterior, which the experiment measures",
)
class FlowPriorNet(PriorNet):
    """Weights whose prior is a chain of planar flows for each tensor.

    The base of each flow is a normal distribution with learned means and standard deviations, at
    first those of a `GaussianPriorNet`.

    Args:
        module: A network, whose own weights are not used, or the widths of one with tanh. Only the
            latter is saved by `save_pretrained`.
        num_flows: Flows in a chain.
        init_std: Standard deviation at the start, times the root of the fan-in.
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
        2022, section 4.3.

    Example:
        >>> prior = FlowPriorNet([1, 10, 1])
        >>> weights = prior.sample_weights(5)
        >>> weights["0.weight"].shape, prior.log_prior(weights).shape
        (torch.Size([5, 10, 1]), torch.Size([5]))
    """

    def __init__(
        self,
        module: Network,
        *,
        num_flows: int = 4,
        init_std: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if num_flows < 0:
            raise ValueError(f"num_flows: expected at least 0, got {num_flows}")
        if not 0 < init_std < math.inf:
            raise ValueError(f"init_std: expected above 0, got {init_std}")
        super().__init__(module, device=device, dtype=dtype)
        self.num_flows, self.init_std = num_flows, init_std
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        self.loc = nn.ParameterList(torch.empty(size, **options) for size in sizes)
        self.raw_std = nn.ParameterList(torch.empty(size, **options) for size in sizes)
        self.flows = nn.ModuleList(
            PlanarFlow(size, num_flows=num_flows, **options) for size in sizes
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal distributions around 0, and flows that move nothing."""
        with torch.no_grad():
            for loc, raw, fan in zip(self.loc, self.raw_std, self.fan_ins, strict=True):
                loc.zero_()
                raw.copy_(inverse_softplus(torch.full_like(raw, self.init_std / math.sqrt(fan))))
        for flow in self.flows:
            cast(PlanarFlow, flow).reset_parameters()

    def sample_weights(
        self, n: int, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        noise = self._normal(n, self.loc[0], generator)
        drawn = {}
        for index, (name, e) in enumerate(noise.items()):
            std = nn.functional.softplus(self.raw_std[index])
            drawn[name] = self.flows[index](self.loc[index] + std * e.flatten(1)).value
        return {name: w.reshape(n, *self.shapes[name]) for name, w in drawn.items()}

    def _log_density(self, index: int, w: Tensor) -> Tensor:
        start, log_det = cast(PlanarFlow, self.flows[index]).inverse(w)
        std = nn.functional.softplus(self.raw_std[index])
        base = torch.distributions.Normal(self.loc[index], std, validate_args=False)
        return base.log_prob(start).sum(-1) + log_det
