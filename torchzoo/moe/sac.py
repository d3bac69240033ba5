"""Soft actor-critic around a mixture policy: critics, replay, updates and exact checkpoints.

Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", 2018. With two critics `Q_c`,
slowly following copies `Q'_c`, and a transition `(s, a, r, s', terminal)`,

    y = r + gamma (1 - terminal) (min_c Q'_c(s', a') - alpha log pi(a' | s')),   a' ~ pi(. | s')
    critics  sum_c (Q_c(s, a) - y)^2        actor and alpha  any loss like `pmoe_sac_loss`
    Q'_c <- (1 - tau) Q'_c + tau Q_c

Here `a'` is drawn from the whole mixture and `log pi` is the mixture's density. The learner knows
no environment: it is given transitions and asked for actions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchzoo.moe.learner import Critic, Learner
from torchzoo.moe.policy import PMoEPolicy
from torchzoo.moe.policy_losses import pmoe_sac_loss
from torchzoo.moe.routing import check_count, check_positive
from torchzoo.moe.squashed_mixture import select

ActorLoss = Callable[..., Mapping[str, Tensor]]


class Transitions(NamedTuple):
    """A batch of transitions: `s`, `next_s` `(B, obs)`, `a` `(B, A)`, the others `(B,)`."""

    s: Tensor
    a: Tensor
    reward: Tensor
    next_s: Tensor
    terminal: Tensor


class ReplayBuffer:
    """The last transitions, in float32, overwritten in a ring.

    Args:
        capacity: Most transitions that are kept.
        obs_dim: Features of a state.
        action_dim: Features of an action.
        device: Where they are kept.

    Raises:
        ValueError: A size below 1, or a sample from an empty buffer.

    Example:
        >>> buffer = ReplayBuffer(100, 3, 1)
        >>> buffer.add(torch.zeros(3), torch.zeros(1), 1.0, torch.ones(3), False)
        >>> len(buffer), buffer.sample(4).reward
        (1, tensor([1., 1., 1., 1.]))
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
        widths = ((obs_dim,), (action_dim,), (), (obs_dim,), ())
        self.data = Transitions(*(torch.zeros(capacity, *width, device=device) for width in widths))
        self.capacity = capacity
        self.added = 0

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, s: Tensor, a: Tensor, reward: float, next_s: Tensor, terminal: bool) -> None:
        """Keep one transition; `terminal` says that no reward can follow, not that time is up."""
        row = self.added % self.capacity
        values = (s, a, torch.tensor(reward), next_s, torch.tensor(float(terminal)))
        for column, value in zip(self.data, values, strict=True):
            column[row] = value
        self.added += 1

    def sample(self, batch_size: int) -> Transitions:
        """Draw transitions with replacement, by torch's global generator."""
        if not len(self):
            raise ValueError("sample: expected at least one transition, got none")
        rows = torch.randint(len(self), (batch_size,)).to(self.data.s.device)
        return Transitions(*(column[rows] for column in self.data))

    def fits(self, rows: int, added: int) -> bool:
        """Whether this many rows are what such a buffer keeps of all that were added."""
        return rows == min(added, self.capacity)

    def restore(self, rows: Mapping[str, Tensor], added: int) -> None:
        """Hold these rows instead, by column."""
        for name, column in self.data._asdict().items():
            column[: len(rows[name])] = rows[name]
        self.added = added


class SAC(Learner):
    """Soft actor-critic with two critics and a learned temperature.

    On the CPU a learner that was saved and loaded goes on bit for bit as if it had never stopped:
    weights, optimisers, replay and the state of torch's generator are in the checkpoint.

    Args:
        policy: The actor, such as a `PMoEPolicy` with tanh; its parameters are trained in place.
        actor_loss: Function `(policy, critics, s, alpha)` that gives losses to be summed, such as
            `pmoe_sac_loss` with other options.
        hidden: Widths of the critics' layers.
        capacity: Transitions that are kept.
        batch_size: Transitions an update.
        gamma: Discount.
        tau: Share by which the target critics move an update.
        lr: Learning rate of actor, critics and temperature.

    Raises:
        ValueError: A size below 1, or a rate outside its range.

    Example:
        >>> learner = SAC(PMoEPolicy(3, 1, hidden=(16,)), hidden=(16,), batch_size=8)
        >>> s = torch.randn(3)
        >>> learner.buffer.add(s, learner.policy.act(s), 1.0, torch.randn(3), False)
        >>> sorted(learner.update())
        ['alpha', 'critic', 'frequency', 'policy']
    """

    buffer: ReplayBuffer

    def __init__(
        self,
        policy: PMoEPolicy,
        *,
        actor_loss: ActorLoss = pmoe_sac_loss,
        hidden: Sequence[int] = (256, 256),
        capacity: int = 100_000,
        batch_size: int = 256,
        gamma: float = 0.99,
        tau: float = 5e-3,
        lr: float = 3e-4,
    ) -> None:
        check_count("batch_size", batch_size)
        check_positive("lr", lr)
        for name, rate in (("gamma", gamma), ("tau", tau)):
            if not 0 <= rate <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {rate!r}")
        sizes, device = (policy.obs_dim, policy.action_dim), next(policy.parameters()).device
        self.policy = policy
        self.actor_loss = actor_loss
        self.critics = nn.ModuleList(Critic(*sizes, hidden, device=device) for _ in range(2))
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = torch.zeros((), device=device, requires_grad=True)
        self.buffer = ReplayBuffer(capacity, *sizes, device=device)
        self.batch_size = batch_size
        self.gamma = gamma
        self.tau = tau
        self.actor_parameters = [*policy.parameters(), self.log_alpha]
        self.optimizers = {
            "actor": torch.optim.Adam(self.actor_parameters, lr=lr),
            "critic": torch.optim.Adam(self.critics.parameters(), lr=lr),
        }

    def update(self) -> dict[str, float]:
        """Take one step of the critics, of actor and temperature, and of the targets."""
        batch = self.buffer.sample(self.batch_size)
        critic_loss = self._critic_loss(batch)
        self._step("critic", critic_loss, list(self.critics.parameters()))
        losses = self.actor_loss(self.policy, list(self.critics), batch.s, self.log_alpha.exp())
        self._step(
            "actor", sum(losses.values(), torch.zeros_like(critic_loss)), self.actor_parameters
        )
        with torch.no_grad():
            pairs = zip(self.targets.parameters(), self.critics.parameters(), strict=True)
            for target, source in pairs:
                target.lerp_(source, self.tau)
        return {"critic": critic_loss.item()} | {k: v.item() for k, v in losses.items()}

    def _critic_loss(self, batch: Transitions) -> Tensor:
        with torch.no_grad():
            pi = self.policy(batch.next_s)
            u = select(pi.rsample_latent_per_expert(), pi.sample_expert())
            values = [target(batch.next_s, pi.action(u)) for target in self.targets]
            soft = torch.stack(values).amin(0) - self.log_alpha.exp() * pi.latent_log_prob(u)
            y = batch.reward + self.gamma * (1 - batch.terminal) * soft
        errors = [critic(batch.s, batch.a) - y for critic in self.critics]
        return torch.stack(errors).square().mean(-1).sum()

    def _step(self, name: str, loss: Tensor, parameters: list[Any]) -> None:
        """One step; gradients reach these parameters only, whatever else the loss depends on."""
        self.optimizers[name].zero_grad(set_to_none=True)
        loss.backward(inputs=parameters)
        self.optimizers[name].step()

    def _modules(self) -> dict[str, nn.Module]:
        return {"policy": self.policy, "critics": self.critics, "targets": self.targets}

    def _more(self) -> dict[str, Tensor]:
        return {"log_alpha": self.log_alpha.detach()}
