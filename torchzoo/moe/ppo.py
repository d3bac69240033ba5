"""Proximal policy optimisation around a mixture policy: rollouts, advantages, updates.

Schulman et al., "Proximal Policy Optimization Algorithms", 2017, and "High-Dimensional Continuous
Control Using Generalized Advantage Estimation", 2016. With a value function `V`, a critic `Q` and
steps `(s, a, r, s', terminal, over)`,

    delta_t = r_t + gamma (1 - terminal_t) V(s'_t) - V(s_t)
    A_t     = delta_t + gamma lambda (1 - over_t) A_{t+1},     R_t = A_t + V(s_t)
    policy    -mean min(rho A, clip(rho, 1 - c, 1 + c) A),     rho = pi(a | s) / pi_old(a | s)
    value     (V - R)^2        q    (Q(s, a) - R)^2        entropy   E[log pi(a | s)]

`terminal` says that no reward can follow, `over` that the episode ended, by that or by time. The
density is the mixture's, exactly, so the surrogate trains the router too; the frequency loss adds
to that what `Q` says about one action of each primitive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from torchzoo.moe.learner import Critic, Learner
from torchzoo.moe.policy import PMoEPolicy
from torchzoo.moe.policy_losses import pmoe_ppo_loss
from torchzoo.moe.routing import check_count, check_positive
from torchzoo.moe.squashed_mixture import SquashedGaussianMixture

ActorLoss = Callable[..., Mapping[str, Tensor]]


def generalized_advantage(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminal: Tensor,
    over: Tensor,
    *,
    gamma: float = 0.99,
    lam: float = 0.95,
) -> Tensor:
    """Advantages of the steps of a rollout, in which episodes follow each other.

    Args:
        reward: Rewards.
        value: Values of the states.
        next_value: Values of the states that follow, those at the end of an episode too.
        terminal: 1 where no reward can follow.
        over: 1 at the last step of an episode.
        gamma: Discount.
        lam: 0 for one step's error, 1 for the whole return less the value.

    Shape:
        - all tensors and the output: `(..., T)`

    Raises:
        ValueError: Shapes that differ, or a rate outside [0, 1].

    Source:
        Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage
        Estimation", 2016, eq. (16).

    Example:
        >>> ones, none = torch.ones(3), torch.zeros(3)
        >>> generalized_advantage(ones, none, none, none, none, gamma=0.5, lam=1.0)
        tensor([1.7500, 1.5000, 1.0000])
    """
    columns = {"value": value, "next_value": next_value, "terminal": terminal, "over": over}
    for name, column in columns.items():
        if column.shape != reward.shape:
            raise ValueError(
                f"{name}: expected {tuple(reward.shape)}, as reward, got {tuple(column.shape)}"
            )
    _check_rates(gamma=gamma, lam=lam)
    delta = reward + gamma * (1 - terminal) * next_value - value
    advantage, later = torch.empty_like(delta), torch.zeros_like(delta[..., :1].squeeze(-1))
    for t in reversed(range(delta.shape[-1])):
        later = delta[..., t] + gamma * lam * (1 - over[..., t]) * later
        advantage[..., t] = later
    return advantage


def mixture_entropy(pi: SquashedGaussianMixture) -> Tensor:
    """`(...)`, an unbiased estimate of the entropy, whose gradient is unbiased too.

    The primitives are summed over by their weights, and one latent is drawn of each:
    `-sum_i w_i log pi(u_i)`.

    Example:
        >>> pi = PMoEPolicy(3, 2, num_experts=1, squash=False)(torch.zeros(5, 3))
        >>> mixture_entropy(pi).shape
        torch.Size([5])
    """
    samples = rearrange(pi.rsample_latent_per_expert(), "... k a -> k ... a")
    log_pi = rearrange(pi.latent_log_prob(samples), "k ... -> ... k")
    return -(pi.mixture_weights * log_pi).sum(-1)


class Steps(NamedTuple):
    """Steps of a rollout: `s`, `next_s` `(T, obs)`, `a` `(T, A)`, the others `(T,)`."""

    s: Tensor
    a: Tensor
    reward: Tensor
    next_s: Tensor
    terminal: Tensor
    over: Tensor


class Rollout:
    """Steps in the order in which they were taken, until an update consumes them; in float32.

    Args:
        capacity: Steps that are collected for an update.
        obs_dim: Features of a state.
        action_dim: Features of an action.
        device: Where they are kept.

    Attributes:
        added: Steps that were added in all, those that are gone included.

    Raises:
        ValueError: A size below 1, or a step more than fits.

    Example:
        >>> rollout = Rollout(2, 3, 1)
        >>> rollout.add(torch.zeros(3), torch.zeros(1), 1.0, torch.ones(3), False, False)
        >>> len(rollout), rollout.full
        (1, False)
    """

    def __init__(
        self,
        capacity: int,
        obs_dim: int,
        action_dim: int,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        check_count("capacity", capacity)
        widths = ((obs_dim,), (action_dim,), (), (obs_dim,), (), ())
        self.data = Steps(*(torch.zeros(capacity, *width, device=device) for width in widths))
        self.capacity = capacity
        self.added = 0
        self._taken = 0

    def __len__(self) -> int:
        return self.added - self._taken

    @property
    def full(self) -> bool:
        """Whether an update is due."""
        return len(self) == self.capacity

    def add(
        self, s: Tensor, a: Tensor, reward: float, next_s: Tensor, terminal: bool, over: bool
    ) -> None:
        """Keep one step; `terminal` says that no reward can follow, `over` that a reset does."""
        if self.full:
            raise ValueError(f"add: expected an update after {self.capacity} steps, got one more")
        ends = (torch.tensor(float(end)) for end in (terminal, over))
        values = (s, a, torch.tensor(reward), next_s, *ends)
        for column, value in zip(self.data, values, strict=True):
            column[len(self)] = value
        self.added += 1

    def take(self) -> Steps:
        """All steps that are here, which are gone then."""
        steps = Steps(*(column[: len(self)].clone() for column in self.data))
        self._taken = self.added
        return steps

    def fits(self, rows: int, added: int) -> bool:
        """Whether this many rows, of all that were added, fit in."""
        return rows <= min(added, self.capacity)

    def restore(self, rows: Mapping[str, Tensor], added: int) -> None:
        """Hold these rows instead, by column."""
        for name, column in self.data._asdict().items():
            column[: len(rows[name])] = rows[name]
        self.added, self._taken = added, added - len(rows["s"])


class PPO(Learner):
    """Proximal policy optimisation with a value function and a critic of actions.

    Add steps that the policy took to `buffer`, and call `update` whenever that is full. The
    log-density that the ratio starts from is computed then, by the policy that took the steps.
    Saved and loaded, it goes on bit for bit, see `Learner`.

    Args:
        policy: The actor, such as a `PMoEPolicy` with `squash=False`; trained in place.
        actor_loss: Function `(policy, q, s, a, old_log_prob, advantage, returns)` that gives
            losses to be summed, such as `pmoe_ppo_loss` with other options.
        hidden: Widths of the layers of value function and critic.
        horizon: Steps an update.
        epochs: How often an update goes through them.
        batch_size: Steps a gradient step.
        gamma: Discount.
        lam: See `generalized_advantage`.
        value_coef: Weight of the value loss.
        entropy_coef: Weight of the entropy bonus.
        lr: Learning rate of Adam.

    Raises:
        ValueError: A size below 1, a rate outside its range, or an update without a step.

    Source:
        Schulman et al., "Proximal Policy Optimization Algorithms", 2017, eq. (9); Ren et al.,
        "Probabilistic Mixture-of-Experts for Efficient Deep Reinforcement Learning", 2021.
        Advantages are standardised over the steps of an update, as is usual.

    Example:
        >>> policy = PMoEPolicy(3, 1, hidden=(16,), squash=False)
        >>> learner = PPO(policy, hidden=(16,), horizon=2, epochs=1, batch_size=2)
        >>> s = torch.randn(3)
        >>> for over in (False, True):
        ...     learner.buffer.add(s, policy.act(s), 1.0, torch.randn(3), False, over)
        >>> sorted(learner.update())
        ['entropy', 'frequency', 'policy', 'q', 'value']
    """

    buffer: Rollout

    def __init__(
        self,
        policy: PMoEPolicy,
        *,
        actor_loss: ActorLoss = pmoe_ppo_loss,
        hidden: Sequence[int] = (256, 256),
        horizon: int = 2048,
        epochs: int = 10,
        batch_size: int = 64,
        gamma: float = 0.99,
        lam: float = 0.95,
        value_coef: float = 0.5,
        entropy_coef: float = 0.01,
        lr: float = 3e-4,
    ) -> None:
        for name, count in (("horizon", horizon), ("epochs", epochs), ("batch_size", batch_size)):
            check_count(name, count)
        check_positive("lr", lr)
        _check_rates(gamma=gamma, lam=lam)
        sizes, device = (policy.obs_dim, policy.action_dim), next(policy.parameters()).device
        self.policy = policy
        self.actor_loss = actor_loss
        self.value = Critic(policy.obs_dim, 0, hidden, device=device)
        self.q = Critic(*sizes, hidden, device=device)
        self.buffer = Rollout(horizon, *sizes, device=device)
        self.epochs = epochs
        self.batch_size = batch_size
        self.gamma = gamma
        self.lam = lam
        self.value_coef = value_coef
        self.entropy_coef = entropy_coef
        parameters = [w for module in self._modules().values() for w in module.parameters()]
        self.optimizers = {"all": torch.optim.Adam(parameters, lr=lr)}

    def update(self) -> dict[str, float]:
        """Go through the collected steps some times; the mean of each loss, as it is minimised."""
        if not len(self.buffer):
            raise ValueError("update: expected at least one step, got none")
        data = self.targets(self.buffer.take())
        sums: dict[str, float] = {}
        count = 0
        for _ in range(self.epochs):
            order = torch.randperm(len(data[0])).to(data[0].device)
            for rows in order.split(self.batch_size):
                losses = self.losses(*(column[rows] for column in data))
                self.optimizers["all"].zero_grad(set_to_none=True)
                torch.stack([*losses.values()]).sum().backward()
                self.optimizers["all"].step()
                sums = {name: sums.get(name, 0.0) + loss.item() for name, loss in losses.items()}
                count += 1
        return {name: total / count for name, total in sums.items()}

    @torch.no_grad()
    def targets(self, steps: Steps) -> tuple[Tensor, ...]:
        """States, actions, their log-densities, standardised advantages, and returns."""
        value, next_value = self.value(steps.s), self.value(steps.next_s)
        advantage = generalized_advantage(
            steps.reward,
            value,
            next_value,
            steps.terminal,
            steps.over,
            gamma=self.gamma,
            lam=self.lam,
        )
        standard = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
        return steps.s, steps.a, self.policy(steps.s).log_prob(steps.a), standard, advantage + value

    def losses(
        self, s: Tensor, a: Tensor, old_log_prob: Tensor, advantage: Tensor, returns: Tensor
    ) -> dict[str, Tensor]:
        """All losses of a batch, weighted; their sum is minimised."""
        actor = self.actor_loss(self.policy, self.q, s, a, old_log_prob, advantage, returns)
        return dict(actor) | {
            "value": self.value_coef * (self.value(s) - returns).square().mean(),
            "entropy": -self.entropy_coef * mixture_entropy(self.policy(s)).mean(),
        }

    def _modules(self) -> dict[str, nn.Module]:
        return {"policy": self.policy, "value": self.value, "q": self.q}


def _check_rates(**rates: float) -> None:
    for name, rate in rates.items():
        if not 0 <= rate <= 1:
            raise ValueError(f"{name}: expected a number in [0, 1], got {rate!r}")
