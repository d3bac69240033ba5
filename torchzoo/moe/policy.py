"""Stochastic policy for continuous control that keeps several good actions apart.

J. Ren, Y. Li, Z. Ding, W. Pan and H. Dong, "Probabilistic Mixture-of-Experts for Efficient Deep
Reinforcement Learning", 2021. With features `h` of the state `s` from a shared trunk,

    pi(a | s) = sum_i w_i(s) N(u; mu_i(s), diag sigma_i(s)^2) / |da/du|,   a = tanh(u),
    w = softmax(router(h)),   mu = W_mu h,   log sigma = W_sigma h, clamped.

The losses that train it, among them the frequency loss, which moves `w` towards the probability
that a primitive's action is the best one, are functions in `policy_losses`.

Deviations: none in the policy. `deterministic` action: the mean of the most probable primitive.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn

from torchzoo.hub import ZooModel
from torchzoo.moe.routing import check_count
from torchzoo.moe.squashed_mixture import SquashedGaussianMixture
from torchzoo.registry import Comparison, Example, register


@register(
    paper=123,
    example=lambda: Example(
        kwargs={"obs_dim": 5, "action_dim": 2, "num_experts": 3, "hidden": (8, 8)},
        inputs=(torch.randn(6, 5),),
        bad_options={
            "obs_dim": 0,
            "action_dim": 0,
            "num_experts": 0,
            "hidden": (8, 0),
            "log_std_bounds": (2.0, -20.0),
        },
    ),
    compare=lambda: Comparison(
        {"obs_dim": 64, "action_dim": 8}, (torch.randn(1024, 64),), ("PMoEPolicy(num_experts=1)",)
    ),
)
class PMoEPolicy(ZooModel):
    """Policy whose action is drawn from one of `K` Gaussian primitives, chosen by a router.

    An actor for SAC (`pmoe_sac_loss`) with tanh, and for PPO (`pmoe_ppo_loss`) without. With one
    primitive it is the usual Gaussian policy. Distributions come in float32 at least.

    Args:
        obs_dim: Features of a state.
        action_dim: Features of an action, `A`.
        num_experts: Number of primitives `K`.
        hidden: Widths of the trunk's layers, each followed by ReLU.
        squash: Whether actions go through tanh into (-1, 1).
        log_std_bounds: Least and greatest logarithm of a standard deviation, by clamping.
        detach_trunk: Whether the router's gradient stops at the trunk's features.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - s: `(..., obs_dim)`
        - output: distribution with batch shape `(...)`, event shape `(A,)`.

    Returns:
        A `SquashedGaussianMixture`.

    Raises:
        ValueError: A size below 1, bounds that are no increasing pair, or a state whose last
            dimension is not `obs_dim`.

    Source:
        Ren et al., "Probabilistic Mixture-of-Experts for Efficient Deep Reinforcement Learning",
        2021, the policy as a mixture.

    Example:
        >>> policy = PMoEPolicy(3, 2)
        >>> s = torch.randn(10, 3)
        >>> policy.act(s).shape, policy(s).mixture_weights.shape
        (torch.Size([10, 2]), torch.Size([10, 4]))
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        *,
        num_experts: int = 4,
        hidden: Sequence[int] = (256, 256),
        squash: bool = True,
        log_std_bounds: tuple[float, float] = (-20.0, 2.0),
        detach_trunk: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = {"obs_dim": obs_dim, "action_dim": action_dim, "num_experts": num_experts}
        for name, size in sizes.items():
            check_count(name, size)
        for width in hidden:
            check_count("hidden", width)
        low, high = log_std_bounds
        if not low < high:
            raise ValueError(f"log_std_bounds: expected low < high, got {tuple(log_std_bounds)}")
        super().__init__()
        self.obs_dim = obs_dim
        self.action_dim = action_dim
        self.num_experts = num_experts
        self.squash = squash
        self.log_std_bounds = (low, high)
        self.detach_trunk = detach_trunk
        widths = (obs_dim, *hidden)
        outputs = num_experts * action_dim
        self.trunk = nn.Sequential(
            *(
                layer
                for pair in pairwise(widths)
                for layer in (nn.Linear(*pair, device=device, dtype=dtype), nn.ReLU())
            )
        )
        self.router = nn.Linear(widths[-1], num_experts, device=device, dtype=dtype)
        self.loc = nn.Linear(widths[-1], outputs, device=device, dtype=dtype)
        self.log_std = nn.Linear(widths[-1], outputs, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all weights again, each layer as `nn.Linear` does."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    def forward(self, s: Tensor) -> SquashedGaussianMixture:
        """Distribution of the action in states `(..., obs_dim)`."""
        if s.ndim < 1 or s.shape[-1] != self.obs_dim:
            raise ValueError(f"s: expected (..., {self.obs_dim}), got {tuple(s.shape)}")
        h = self.trunk(s)
        logits = self.router(h.detach() if self.detach_trunk else h)
        loc, log_std = (
            rearrange(head(h), "... (k a) -> ... k a", k=self.num_experts)
            for head in (self.loc, self.log_std)
        )
        dtype = torch.promote_types(loc.dtype, torch.float32)
        return SquashedGaussianMixture(
            logits.to(dtype),
            loc.to(dtype),
            log_std.to(dtype).clamp(*self.log_std_bounds),
            squash=self.squash,
        )

    @torch.no_grad()
    def act(self, s: Tensor, deterministic: bool = False) -> Tensor:
        """Actions `(..., A)` for states `(..., obs_dim)`, without a gradient.

        Args:
            s: States.
            deterministic: The mean of the most probable primitive, instead of a sample.
        """
        policy = self(s)
        return policy.mode if deterministic else policy.sample()

    def extra_repr(self) -> str:
        """Sizes and options in short."""
        return (
            f"{self.obs_dim}, {self.action_dim}, num_experts={self.num_experts}, "
            f"squash={self.squash}, log_std_bounds={self.log_std_bounds}"
        )


PMoEActor = PMoEPolicy
"""The policy under the name that it has as an actor; squashed by default."""
