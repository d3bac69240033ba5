"""Mixture of Gaussian primitives over actions, squashed by tanh: density, samples and moments.

With weights `w`, means `mu_i` and standard deviations `sigma_i` of `K` primitives,

    p(u) = sum_i w_i prod_d N(u_d; mu_id, sigma_id^2),   a = tanh(u),
    log pi(a) = log p(u) - sum_d log(1 - tanh(u_d)^2),
    log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u)),

the last line without cancellation for large `u`. `u` is called the latent of `a`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor
from torch.distributions import Distribution, constraints


class SquashedGaussianMixture(Distribution):
    """Distribution of an action: a mixture of `K` diagonal Gaussians, seen through tanh.

    Args:
        logits: Scores of the primitives; their softmax are the weights.
        loc: Means of the primitives, before tanh.
        log_std: Logarithms of their standard deviations.
        squash: Whether actions are `tanh(u)`; if not, they are `u`.
        validate_args: Whether `log_prob` refuses actions outside [-1, 1]; None for torch's
            default. Never done in compiled code.

    Shape:
        - logits: `(..., K)`
        - loc, log_std: `(..., K, A)`
        - batch shape `(...)`, event shape `(A,)`

    Raises:
        ValueError: Shapes that don't fit each other.

    Source:
        Ren et al., "Probabilistic Mixture-of-Experts for Efficient Deep Reinforcement Learning",
        2021, the policy's density; Haarnoja et al., "Soft Actor-Critic Algorithms and
        Applications", 2018, appendix C, the squashing.

    Example:
        >>> loc = torch.tensor([[-1.0], [1.0]])
        >>> policy = SquashedGaussianMixture(torch.zeros(2), loc, torch.full((2, 1), -2.0))
        >>> policy.sample((3,)).shape, policy.rsample_per_expert().shape
        (torch.Size([3, 1]), torch.Size([2, 1]))
        >>> a = torch.tensor([0.7])
        >>> torch.allclose(policy.log_prob(a), policy.log_prob(-a))
        True
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = False

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        log_std: Tensor,
        *,
        squash: bool = True,
        validate_args: bool | None = None,
    ) -> None:
        if loc.ndim < 2 or loc.shape[:-1] != logits.shape:
            raise ValueError(
                f"loc: expected {(*logits.shape, 'A')} as logits is {tuple(logits.shape)}, "
                f"got {tuple(loc.shape)}"
            )
        if log_std.shape != loc.shape:
            raise ValueError(f"log_std: expected {tuple(loc.shape)}, got {tuple(log_std.shape)}")
        self.logits = logits
        self.loc = loc
        self.log_std = log_std
        self.squash = squash
        super().__init__(loc.shape[:-2], loc.shape[-1:], validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Actions that have a density; the ends of the interval stand for what rounds to them."""
        kind = constraints.interval(-1.0, 1.0) if self.squash else constraints.real
        return constraints.independent(kind, 1)

    @property
    def num_experts(self) -> int:
        """Number of primitives `K`."""
        return self.logits.shape[-1]

    @property
    def log_weights(self) -> Tensor:
        """`(..., K)`, logarithms of the weights."""
        return self.logits.log_softmax(-1)

    @property
    def mixture_weights(self) -> Tensor:
        """`(..., K)`, the weights of the primitives."""
        return self.logits.softmax(-1)

    @property
    def mode(self) -> Tensor:
        """`(..., A)`, the action at the mean of the most probable primitive.

        The average of the means is no substitute: it can lie where the density is lowest.
        """
        return self.action(select(self.loc, self.logits.argmax(-1)))

    @property
    def mean(self) -> Tensor:
        """`(..., A)`, the mean action; with tanh by quadrature."""
        return self._moment(1)

    @property
    def variance(self) -> Tensor:
        """`(..., A)`, the variance of each coordinate of the action; with tanh by quadrature."""
        return self._moment(2) - self.mean.square()

    def _moment(self, power: int) -> Tensor:
        """Raw moments by the trapezoidal rule, exact to rounding for Gaussians up to sd 5."""
        x = torch.linspace(-8, 8, 129, device=self.loc.device, dtype=self.loc.dtype)
        u = self.loc[..., None] + self.log_std.exp()[..., None] * x
        inner = self.action(u).pow(power) @ (-0.5 * x.square()).softmax(0)
        return einsum(self.mixture_weights, inner, "... k, ... k a -> ... a")

    def with_fixed_weights(self) -> SquashedGaussianMixture:
        """The same distribution, whose weights carry no gradient."""
        return SquashedGaussianMixture(
            self.logits.detach(), self.loc, self.log_std, squash=self.squash, validate_args=False
        )

    def action(self, u: Tensor) -> Tensor:
        """The action of a latent: its tanh, or itself without squashing."""
        return u.tanh() if self.squash else u

    def rsample_latent_per_expert(self) -> Tensor:
        """`(..., K, A)`, one latent of each primitive, differentiable in means and deviations."""
        return self.loc + self.log_std.exp() * torch.randn_like(self.loc)

    def rsample_per_expert(self) -> Tensor:
        """`(..., K, A)`, one action of each primitive, differentiable in means and deviations."""
        return self.action(self.rsample_latent_per_expert())

    @torch.no_grad()
    def sample_expert(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """`(*sample_shape, ...)`, indices of primitives drawn by their weights."""
        shape = (*sample_shape, *self.logits.shape)
        noise = torch.empty(shape, device=self.logits.device, dtype=self.logits.dtype)
        return (self.logits - noise.exponential_().log()).argmax(-1)

    @torch.no_grad()
    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:  # type: ignore[override]
        """`(*sample_shape, ..., A)`: draw a primitive, then an action of it."""
        expert = self.sample_expert(sample_shape)
        shape = (*sample_shape, *self.loc.shape)
        loc, std = (select(value.expand(shape), expert) for value in (self.loc, self.log_std.exp()))
        return self.action(loc + std * torch.randn_like(loc))

    def log_prob(self, value: Tensor) -> Tensor:
        """`(...)`, the log-density of actions `(..., A)`.

        With tanh an action nearer than one rounding unit to -1 or 1 counts as one that is a unit
        away, so that the value is finite; `latent_log_prob` is exact there.
        """
        return self.latent_log_prob(self._latent(value))

    def component_log_prob(self, value: Tensor) -> Tensor:
        """`(..., K)`, the log-density of actions `(..., A)` under each primitive alone."""
        return self.latent_component_log_prob(self._latent(value))

    def latent_log_prob(self, u: Tensor) -> Tensor:
        """`(...)`, the log-density of the actions whose latents are `(..., A)`."""
        return (self.log_weights + self.latent_component_log_prob(u)).logsumexp(-1)

    def latent_component_log_prob(self, u: Tensor) -> Tensor:
        """`(..., K)`, as `latent_log_prob` for each primitive alone."""
        z = (rearrange(u, "... a -> ... 1 a") - self.loc) * (-self.log_std).exp()
        density = (-0.5 * z.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
        if not self.squash:
            return density
        return density - _log_tanh_slope(u).sum(-1, keepdim=True)

    def _latent(self, value: Tensor) -> Tensor:
        if value.shape[-1:] != self.event_shape:
            raise ValueError(
                f"value: expected (..., {self.event_shape[0]}), got {tuple(value.shape)}"
            )
        if self._validate_args and not torch.compiler.is_compiling():
            self._validate_sample(value)
        if not self.squash:
            return value
        limit = 1 - torch.finfo(value.dtype).eps
        return value.clamp(-limit, limit).atanh()

    def __repr__(self) -> str:
        """Shapes in short."""
        batch, event = tuple(self.batch_shape), tuple(self.event_shape)
        text = f"batch_shape={batch}, event_shape={event}, num_experts={self.num_experts}"
        return f"{type(self).__name__}({text}, squash={self.squash})"

    def expand(self, batch_shape: Any, _instance: Any = None) -> SquashedGaussianMixture:
        """The distribution with its batch expanded to a shape."""
        shape = (*batch_shape, *self.logits.shape[-1:])
        values = (
            self.logits.expand(shape),
            *(value.expand(*shape, *self.event_shape) for value in (self.loc, self.log_std)),
        )
        return SquashedGaussianMixture(
            *values, squash=self.squash, validate_args=self._validate_args
        )


def select(values: Tensor, expert: Tensor) -> Tensor:
    """Take from `(..., K, A)` the rows of the experts `(...)`."""
    return values.take_along_dim(expert[..., None, None], -2).squeeze(-2)


def _log_tanh_slope(u: Tensor) -> Tensor:
    """`log(1 - tanh(u)^2)`."""
    return 2 * (math.log(2) - u - F.softplus(-2 * u))
