"""Losses of a mixture policy: how primitives and router learn, for SAC and for PPO.

Ren et al., "Probabilistic Mixture-of-Experts for Efficient Deep Reinforcement Learning", 2021. One
action `a_i` is drawn from each primitive, and with `j = argmax_i min_c Q_c(s, a_i)`,

    frequency   (onehot(j) - w)^T (onehot(j) - w),   least at w_i = P(primitive i is best)
    policy      alpha log pi(a_j | s) - min_c Q_c(s, a_j)          (backprop "max")
                mean_i [alpha log pi(a_i | s) - min_c Q_c(s, a_i)]  (backprop "all")

In the policy term `w` counts as a constant. Samples picked by their value, or averaged over
primitives, are no draws from `pi`, so the expectation of `d log pi / dw` under them is not 0 as it
is under `pi`: with that term the router would run away from whatever primitive is chosen.

The estimators that the frequency loss replaces are here too, as baselines: a straight-through
Gumbel-softmax choice of the primitive, and the score function. As tau falls, the former tends to
the trapezoidal rule for `Q(a_i) - Q(a_k)` between primitives, which is exact for quadratic Q only.

Deviations: the entropy is that of the mixture unless `entropy="primitive"`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor

from torchzoo.moe.squashed_mixture import SquashedGaussianMixture, select

Policy = Callable[[Tensor], SquashedGaussianMixture]
Critic = Callable[[Tensor, Tensor], Tensor]


def pmoe_frequency_loss(weights: Tensor, q: Tensor, *, reduction: str = "sum") -> Tensor:
    """Squared distance of the router's weights from the one-hot of the best primitive.

    Args:
        weights: Weights of the primitives.
        q: Values of one action of each; carries no gradient.
        reduction: "sum" or "mean" over the primitives; the batch is always averaged.

    Shape:
        - weights, q: `(..., K)`

    Returns:
        Scalar; 0 for an empty batch.

    Raises:
        ValueError: Shapes that differ, or an unknown reduction.

    Source:
        Ren et al., "Probabilistic Mixture-of-Experts for Efficient Deep Reinforcement Learning",
        2021, the frequency approximate gradient.

    Example:
        >>> pmoe_frequency_loss(torch.tensor([[0.25, 0.75]]), torch.tensor([[1.0, 0.0]])).item()
        1.125
    """
    if q.shape != weights.shape:
        raise ValueError(f"q: got {tuple(q.shape)}, expected {tuple(weights.shape)}")
    _check_choice("reduction", reduction, ("sum", "mean"))
    best = F.one_hot(q.detach().argmax(-1), q.shape[-1]).to(weights.dtype)
    distance = (best - weights).square().sum(-1)
    return _mean(distance if reduction == "sum" else distance / q.shape[-1])


def pmoe_sac_loss(
    policy: Policy,
    critics: Sequence[Critic],
    s: Tensor,
    alpha: float | Tensor,
    *,
    backprop: str = "max",
    entropy: str = "mixture",
    freq_coef: float = 1.0,
    estimator: str = "frequency",
    tau: float = 1.0,
    target_entropy: float | None = None,
) -> dict[str, Tensor]:
    """Losses of a mixture actor in soft actor-critic; their sum is what is minimised.

    Gradients reach the parameters of the critics too; leave those out of the actor's update.

    Args:
        policy: Gives the distribution of the action for states, such as a `PMoEPolicy`.
        critics: Functions `(s, a) -> value`, of which the least value counts. They are called
            with all batch dimensions and the primitives flattened into one.
        s: States.
        alpha: Temperature of the entropy; a number, or a tensor that is to be learned.
        backprop: "max", the best primitive's action takes the gradient, or "all", each one's.
        entropy: "mixture", the log-density of the policy, or "primitive", that of the primitive
            which drew the action.
        freq_coef: Weight of the frequency loss.
        estimator: How the router learns: "frequency", "gumbel" or "score". With the latter two
            there is no frequency loss, the primitive is drawn by its weight, and `backprop` has
            no effect.
        tau: Temperature of "gumbel".
        target_entropy: Entropy that a learned `alpha` aims at; None for `-A`.

    Shape:
        - s: `(..., obs_dim)`
        - critics: `(N, obs_dim)`, `(N, A)` to `(N,)` or `(N, 1)`

    Returns:
        Scalars `policy`, `frequency` and `alpha`; the last is 0 where `alpha` is a number.

    Raises:
        ValueError: An unknown option, no critic, or values of another shape.

    Source:
        Ren et al., "Probabilistic Mixture-of-Experts for Efficient Deep Reinforcement Learning",
        2021; Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", 2018, eq. (18) for
        `alpha`.

    Example:
        >>> from torchzoo.moe import PMoEPolicy
        >>> critic = lambda s, a: -(a - 0.5).square().sum(-1)
        >>> losses = pmoe_sac_loss(PMoEPolicy(3, 2), [critic], torch.randn(8, 3), 0.1)
        >>> sum(losses.values()).backward()
    """
    _check_choice("backprop", backprop, ("max", "all"))
    _check_choice("entropy", entropy, ("mixture", "primitive"))
    _check_choice("estimator", estimator, ("frequency", "gumbel", "score"))
    if not tau > 0:
        raise ValueError(f"tau: expected a number above 0, got {tau!r}")
    if not critics:
        raise ValueError("critics: expected at least one, got none")
    pi = policy(s)
    fixed = pi.with_fixed_weights()
    u = pi.rsample_latent_per_expert()
    q = _values(critics, s, pi.action(u))
    log_pi = _log_density(fixed, u, entropy)
    temperature = alpha.detach() if isinstance(alpha, Tensor) else alpha
    objective = temperature * log_pi - q
    expert = pi.sample_expert()

    frequency = q.new_zeros(())
    if estimator == "gumbel":
        loss = _gumbel_objective(pi, critics, s, u, log_pi, temperature, entropy, tau)
    elif estimator == "score":
        drawn, log_weight = _take(objective, expert), _take(pi.log_weights, expert)
        loss = drawn + (drawn - objective.mean(-1)).detach() * log_weight
    else:
        frequency = freq_coef * pmoe_frequency_loss(pi.mixture_weights, q)
        loss = objective.mean(-1) if backprop == "all" else _take(objective, q.argmax(-1))

    alpha_loss = q.new_zeros(())
    if isinstance(alpha, Tensor):
        target = -float(pi.event_shape[0]) if target_entropy is None else target_entropy
        alpha_loss = -_mean(alpha.log() * (_take(log_pi, expert) + target).detach())
    return {"policy": _mean(loss), "frequency": frequency, "alpha": alpha_loss}


def pmoe_ppo_loss(
    policy: Policy,
    q_net: Critic,
    s: Tensor,
    a: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    returns: Tensor,
    *,
    clip: float = 0.2,
    freq_coef: float = 1.0,
) -> dict[str, Tensor]:
    """Losses of a mixture policy in PPO; their sum, with a value loss, is what is minimised.

    The surrogate differentiates the exact density of the mixture, weights included. The values
    that the frequency loss compares come from a network that learns the returns.

    Args:
        policy: Gives the distribution of the action for states, such as a `PMoEPolicy`.
        q_net: Function `(s, a) -> value`, trained by the loss `q` only.
        s: States.
        a: Actions that were taken.
        old_log_prob: Their log-density when they were taken.
        advantage: Their advantages.
        returns: Targets of `q_net`, such as advantage plus value.
        clip: The ratio's gain ends at `1 - clip` and `1 + clip`.
        freq_coef: Weight of the frequency loss; 0 for the plain mixture policy.

    Shape:
        - s: `(..., obs_dim)`
        - a: `(..., A)`
        - old_log_prob, advantage, returns: `(...)`

    Returns:
        Scalars `policy`, `frequency` and `q`.

    Raises:
        ValueError: `clip` is not above 0, or shapes that don't fit.

    Source:
        Ren et al., "Probabilistic Mixture-of-Experts for Efficient Deep Reinforcement Learning",
        2021; Schulman et al., "Proximal Policy Optimization Algorithms", 2017, eq. (7).

    Example:
        >>> from torchzoo.moe import PMoEPolicy
        >>> policy, q_net = PMoEPolicy(3, 2, squash=False), torch.nn.Bilinear(3, 2, 1)
        >>> s, a = torch.randn(8, 3), torch.randn(8, 2)
        >>> old, zero = policy(s).log_prob(a).detach(), torch.zeros(8)
        >>> pmoe_ppo_loss(policy, q_net, s, a, old, zero, zero)["policy"].item()
        -0.0
    """
    if not clip > 0:
        raise ValueError(f"clip: expected a number above 0, got {clip!r}")
    batch = s.shape[:-1]
    columns = {"old_log_prob": old_log_prob, "advantage": advantage, "returns": returns}
    for name, value in columns.items():
        if value.shape != batch:
            raise ValueError(f"{name}: expected {tuple(batch)}, got {tuple(value.shape)}")
    if a.shape[:-1] != batch:
        raise ValueError(f"a: expected {(*batch, 'A')}, got {tuple(a.shape)}")
    pi = policy(s)
    ratio = (pi.log_prob(a) - old_log_prob).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    q = _values([q_net], s, a[..., None, :]).squeeze(-1)
    with torch.no_grad():
        values = _values([q_net], s, pi.rsample_per_expert())
    return {
        "policy": -_mean(gain),
        "frequency": freq_coef * pmoe_frequency_loss(pi.mixture_weights, values),
        "q": _mean((q - returns).square()),
    }


def _gumbel_objective(
    pi: SquashedGaussianMixture,
    critics: Sequence[Critic],
    s: Tensor,
    u: Tensor,
    log_pi: Tensor,
    temperature: float | Tensor,
    entropy: str,
    tau: float,
) -> Tensor:
    """`(...)`: the objective of a drawn primitive, the choice differentiated as a soft one."""
    choice = F.gumbel_softmax(pi.logits, tau, hard=True)

    def mix(values: Tensor) -> Tensor:
        return einsum(choice, values, "... k, ... k a -> ... a")

    q = _values(critics, s, mix(pi.action(u))[..., None, :]).squeeze(-1)
    if entropy == "mixture":
        density = pi.with_fixed_weights().latent_log_prob(mix(u))
    else:
        density = mix(log_pi[..., None]).squeeze(-1)
    return temperature * density - q


def _log_density(pi: SquashedGaussianMixture, u: Tensor, entropy: str) -> Tensor:
    """`(..., K)`: log-densities of one latent of each primitive."""
    samples = rearrange(u, "... k a -> k ... a")
    if entropy == "mixture":
        return rearrange(pi.latent_log_prob(samples), "k ... -> ... k")
    return pi.latent_component_log_prob(samples).diagonal(dim1=0, dim2=-1)


def _values(critics: Sequence[Critic], s: Tensor, a: Tensor) -> Tensor:
    """`(..., K)`: the critics' least values in states `(..., obs)` of actions `(..., K, A)`."""
    rows = repeat(s, "... o -> ... k o", k=a.shape[-2]).reshape(-1, s.shape[-1])
    shape, flat = a.shape[:-1], a.reshape(-1, a.shape[-1])
    values = [critic(rows, flat) for critic in critics]
    for value in values:
        if value.shape not in ((len(flat),), (len(flat), 1)):
            raise ValueError(
                f"critics: expected values of shape {(len(flat),)} or {(len(flat), 1)}, "
                f"got {tuple(value.shape)}"
            )
    return torch.stack([value.reshape(shape) for value in values]).amin(0)


def _take(values: Tensor, expert: Tensor) -> Tensor:
    """Take from `(..., K)` the entries of the experts `(...)`."""
    return select(values[..., None], expert).squeeze(-1)


def _mean(values: Tensor) -> Tensor:
    """The mean, 0 where there is nothing."""
    return values.sum() / max(values.numel(), 1)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
