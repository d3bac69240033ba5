"""The PPO learner: advantages by explicit sums, its losses by hand, checkpoints, that it learns."""

import math
from functools import partial

import pytest
import torch
from scipy.integrate import quad

from torchzoo.errors import WeightsError
from torchzoo.moe import (
    PPO,
    PMoEPolicy,
    Rollout,
    SquashedGaussianMixture,
    generalized_advantage,
    mixture_entropy,
    pmoe_ppo_loss,
)

SMALL = {"hidden": (8,), "horizon": 24, "epochs": 2, "batch_size": 10}


def learner(seed=0, rows=24, *, num_experts=3, squash=False, **options):
    """A small learner whose rollout is filled at random."""
    torch.manual_seed(seed)
    policy = PMoEPolicy(3, 2, num_experts=num_experts, hidden=(8,), squash=squash)
    made = PPO(policy, **SMALL | options)
    fill(made, rows)
    return made


def fill(made, rows):
    for row in range(rows):
        s, over = torch.randn(3), row % 7 == 6
        made.buffer.add(s, made.policy.act(s), row % 5 - 2.0, torch.randn(3), row % 14 == 6, over)


def drawn_steps(*shape):
    reward, value, next_value = torch.randn(3, *shape, dtype=torch.float64)
    over = (torch.rand(shape) < 0.25).double()
    terminal = over * (torch.rand(shape) < 0.5)
    return reward, value, next_value, terminal, over


@pytest.mark.claim(
    123,
    "Generalized advantages are the discounted sums of one-step errors up to the episode's end",
    tolerance=1e-12,
)
@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.8), (1.0, 0.5), (0.7, 0.0), (0.95, 1.0)])
def test_advantage_by_explicit_sums(gamma, lam):
    torch.manual_seed(0)
    steps = drawn_steps(2, 30)
    ours = generalized_advantage(*steps, gamma=gamma, lam=lam)
    for i in range(2):
        reward, value, next_value, terminal, over = (column[i].tolist() for column in steps)
        assert 3 < sum(over) > sum(terminal) > 0
        for t in range(30):
            end = next((u for u in range(t, 30) if over[u]), 29)
            total = sum(
                (gamma * lam) ** (u - t)
                * (reward[u] + gamma * (0 if terminal[u] else next_value[u]) - value[u])
                for u in range(t, end + 1)
            )
            assert ours[i, t].item() == pytest.approx(total, abs=1e-12)


def test_advantage_with_lambda_one_is_the_return():
    """Where the value of a next state is that of the next step, errors telescope."""
    torch.manual_seed(1)
    reward, value, _, terminal, over = drawn_steps(20)
    last = torch.randn(20, dtype=torch.float64)
    next_value = torch.where(over.bool(), last, torch.cat([value[1:], last[-1:]]))
    ours = generalized_advantage(reward, value, next_value, terminal, over, gamma=0.9, lam=1.0)
    total = (1 - terminal[-1]) * last[-1]
    for t in reversed(range(20)):
        if over[t]:
            total = (1 - terminal[t]) * last[t]
        total = reward[t] + 0.9 * total
        torch.testing.assert_close(ours[t], total - value[t], rtol=0, atol=1e-12)


def test_advantage_refusals():
    row, other = torch.zeros(4), torch.zeros(5)
    with pytest.raises(ValueError, match=r"over: expected \(4,\), as reward, got \(5,\)"):
        generalized_advantage(row, row, row, row, other)
    with pytest.raises(ValueError, match=r"lam: expected a number in \[0, 1\], got 1.1"):
        generalized_advantage(row, row, row, row, row, lam=1.1)
    assert generalized_advantage(*[torch.zeros(2, 0)] * 5).shape == (2, 0)


# Entropy


def test_entropy_of_one_primitive():
    """`0.5 log(2 pi e sigma^2)` a feature; the gradient is exact in each sample."""
    loc = torch.randn(20_000, 1, 2, dtype=torch.float64, requires_grad=True)
    log_std = torch.full_like(loc, -0.3).requires_grad_()
    logits = torch.zeros(20_000, 1, dtype=torch.float64)
    torch.manual_seed(0)
    estimate = mixture_entropy(SquashedGaussianMixture(logits, loc, log_std, squash=False))
    exact = math.log(2 * math.pi * math.e) - 0.6
    assert abs(estimate.mean().item() - exact) < 4 * estimate.std().item() / 20_000**0.5
    by_std, by_loc = torch.autograd.grad(estimate.sum(), (log_std, loc))
    torch.testing.assert_close(by_std, torch.ones_like(by_std))
    torch.testing.assert_close(by_loc, torch.zeros_like(by_loc))


def exact_entropy(logits, loc, log_std, squash):
    """By quadrature over the latent, one-dimensional."""
    pi = SquashedGaussianMixture(
        *(torch.tensor(v).double() for v in (logits, loc, log_std)), squash=squash
    )
    flat = SquashedGaussianMixture(pi.logits, pi.loc, pi.log_std, squash=False)

    def integrand(u):
        u = torch.tensor([u], dtype=torch.float64)
        return (-flat.latent_log_prob(u).exp() * pi.latent_log_prob(u)).item()

    return quad(integrand, -8, 8, limit=200)[0]


@pytest.mark.claim(
    123,
    "The entropy estimate of a mixture and its gradient in the weights are unbiased",
    tolerance=None,
)
@pytest.mark.parametrize("squash", [False, True])
def test_entropy_of_overlapping_primitives(squash):
    torch.manual_seed(0)
    count, logits = 100_000, [0.8, -0.4]
    values = (logits, [[-0.5], [0.7]], [[-0.6], [0.1]])
    tensors = [torch.tensor(v).double().expand(count, *torch.tensor(v).shape) for v in values]
    tensors[0] = tensors[0].clone().requires_grad_()
    estimate = mixture_entropy(SquashedGaussianMixture(*tensors, squash=squash))
    exact = exact_entropy(*values, squash)
    assert abs(estimate.mean().item() - exact) < 4 * estimate.std().item() / count**0.5
    (grad,) = torch.autograd.grad(estimate.sum(), tensors[0])
    sides = [exact_entropy([0.8 + h, -0.4], *values[1:], squash) for h in (1e-3, -1e-3)]
    slope = (sides[0] - sides[1]) / 2e-3
    error = grad[:, 0].std().item() / count**0.5
    assert abs(slope) > 20 * error
    assert abs(grad[:, 0].mean().item() - slope) < 4 * error


# Losses and updates


def test_losses_by_hand():
    made = learner(value_coef=0.7, entropy_coef=0.2)
    steps = made.buffer.take()
    s, a, old, advantage, returns = made.targets(steps)
    with torch.no_grad():
        torch.testing.assert_close(old, made.policy(s).log_prob(a))
        plain = generalized_advantage(
            steps.reward, made.value(s), made.value(steps.next_s), steps.terminal, steps.over
        )
        torch.testing.assert_close(returns, plain + made.value(s))
        torch.testing.assert_close(advantage * plain.std(correction=0) + plain.mean(), plain)
    old = old + 0.5 * torch.randn(24)  # ratios on both sides of the bounds
    torch.manual_seed(2)
    losses = made.losses(s, a, old, advantage, returns)
    gains = []
    for i in range(24):
        ratio = math.exp(made.policy(s[i]).log_prob(a[i]).item() - old[i].item())
        gain = advantage[i].item()
        gains.append(min(ratio * gain, max(min(ratio, 1.2), 0.8) * gain))
    assert losses["policy"].item() == pytest.approx(-sum(gains) / 24, rel=1e-4)
    value = 0.7 * (made.value(s) - returns).square().mean()
    torch.testing.assert_close(losses["value"], value)
    torch.testing.assert_close(losses["q"], (made.q(s, a) - returns).square().mean())
    torch.manual_seed(2)
    actor = pmoe_ppo_loss(made.policy, made.q, s, a, old, advantage, returns)
    assert losses["frequency"] == actor["frequency"] > 0
    torch.testing.assert_close(losses["entropy"], -0.2 * mixture_entropy(made.policy(s)).mean())


@pytest.mark.claim(
    123,
    "Where the policy has not moved yet, the clipped surrogate's gradient is the policy gradient "
    "of the mixture's exact density, of the router too",
    tolerance=1e-6,
)
@pytest.mark.parametrize("squash", [False, True])
def test_gradient_at_ratio_one_is_the_policy_gradient(squash):
    made = learner(squash=squash)
    s, a, old, advantage, returns = made.targets(made.buffer.take())
    weights = [*made.policy.parameters()]
    ours = torch.autograd.grad(made.losses(s, a, old, advantage, returns)["policy"], weights)
    exact = torch.autograd.grad(-(advantage * made.policy(s).log_prob(a)).mean(), weights)
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)
    named = dict(zip([name for name, _ in made.policy.named_parameters()], exact, strict=True))
    assert named["router.weight"].abs().max() > 1e-3


def test_update_is_a_step_on_the_sum_of_all_losses():
    made, twin = (learner(epochs=1, batch_size=24) for _ in range(2))
    parameters = [w for module in twin._modules().values() for w in module.parameters()]
    made.optimizers["all"] = torch.optim.SGD(
        [w for module in made._modules().values() for w in module.parameters()], lr=0.1
    )
    torch.manual_seed(3)
    reported = made.update()
    torch.manual_seed(3)
    data = twin.targets(twin.buffer.take())
    order = torch.randperm(24)
    losses = twin.losses(*(column[order] for column in data))
    sum(losses.values()).backward()
    torch.optim.SGD(parameters, lr=0.1).step()
    for module, exact in zip(made._modules().values(), twin._modules().values(), strict=True):
        torch.testing.assert_close(dict(module.named_parameters()), dict(exact.named_parameters()))
    assert reported == pytest.approx({name: loss.item() for name, loss in losses.items()})
    assert all(w.grad is not None and w.grad.any() for w in parameters)


def test_each_epoch_sees_each_step_once_and_starts_from_the_same_density():
    batches = []

    def recorded(policy, q, s, a, old, *rest):
        batches.append((s, old))
        return pmoe_ppo_loss(policy, q, s, a, old, *rest)

    made = learner(actor_loss=recorded, lr=0.05)
    s = made.buffer.data.s.clone()
    with torch.no_grad():
        old = made.policy(s).log_prob(made.buffer.data.a)
    means = made.update()
    assert [len(batch) for batch, _ in batches] == [10, 10, 4] * 2
    orders = []
    for epoch in (batches[:3], batches[3:]):
        seen, density = (torch.cat(column) for column in zip(*epoch, strict=True))
        order = (seen[:, None] == s).all(-1).int().argmax(1)
        assert order.sort()[0].tolist() == list(range(24))
        torch.testing.assert_close(density, old[order])
        orders.append(order.tolist())
    assert orders[0] != orders[1]
    assert len(made.buffer) == 0
    assert made.buffer.added == 24
    assert means.keys() == {"policy", "frequency", "q", "value", "entropy"}
    with pytest.raises(ValueError, match="update: expected at least one step"):
        made.update()


def test_rollout_refuses_more_than_fits():
    rollout = Rollout(2, 1, 1)
    for row in range(2):
        assert not rollout.full
        rollout.add(torch.full((1,), row), torch.zeros(1), row, torch.ones(1), row == 1, True)
    with pytest.raises(ValueError, match="add: expected an update after 2 steps"):
        rollout.add(torch.zeros(1), torch.zeros(1), 0.0, torch.zeros(1), False, False)
    steps = rollout.take()
    assert [column.flatten().tolist() for column in steps] == [
        [0, 1],
        [0, 0],
        [0, 1],
        [1, 1],
        [0, 1],
        [1, 1],
    ]
    rollout.add(torch.full((1,), 9), torch.zeros(1), 9.0, torch.zeros(1), False, False)
    assert (len(rollout), rollout.added, rollout.take().reward.tolist()) == (1, 3, [9.0])


# Checkpoints


def snapshot(made):
    return {name: value.clone() for name, value in made._tensors().items()}


@pytest.mark.parametrize("more", [0, 11])
def test_resumed_learner_goes_on_bit_for_bit(tmp_path, more):
    made = learner()
    made.update()
    fill(made, more)
    made.save(tmp_path / "c", {"episode": 7})

    def go_on(some):
        for _ in range(2):
            fill(some, 24 - len(some.buffer))
            some.update()
        fill(some, 3)
        return snapshot(some)

    expected = go_on(made)
    other = learner(seed=1, rows=5)
    assert other.load(tmp_path / "c") == {"episode": 7}
    assert (len(other.buffer), other.buffer.added) == (more, 24 + more)
    resumed = go_on(other)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


def test_refused_checkpoints_change_nothing(tmp_path):
    learner().save(tmp_path / "good")
    for options, message in (
        ({"hidden": (9,)}, r"value.trunk.0.weight: got \(8, 3\), expected \(9, 3\)"),
        ({"horizon": 20, "rows": 20}, "replay: got 24 rows of 24 that were added"),
    ):
        other = learner(seed=1, **options)
        before = snapshot(other)
        with pytest.raises(WeightsError, match=message):
            other.load(tmp_path / "good")
        after = snapshot(other)
        assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(("num_experts", "freq_coef"), [(1, 0.0), (3, 1.0)])
def test_learns_a_bandit(num_experts, freq_coef):
    """Every step is terminal, and the best action is a known function of the state."""
    torch.manual_seed(0)
    made = PPO(
        PMoEPolicy(1, 1, num_experts=num_experts, hidden=(32,), squash=False),
        actor_loss=partial(pmoe_ppo_loss, freq_coef=freq_coef),
        hidden=(32,),
        horizon=128,
        epochs=5,
        batch_size=64,
        lr=5e-3,
    )
    for _ in range(30):
        while not made.buffer.full:
            s = 2 * torch.rand(1) - 1
            a = made.policy.act(s)
            made.buffer.add(s, a, -5 * (a - 0.6 * s).square().item(), s, True, True)
        made.update()
    s = torch.linspace(-0.9, 0.9, 20)[:, None]
    assert (made.policy.act(s, deterministic=True) - 0.6 * s).abs().mean() < 0.15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, "horizon: expected"),
        ({"epochs": 0}, "epochs: expected"),
        ({"batch_size": 0}, "batch_size: expected"),
        ({"gamma": 1.5}, r"gamma: expected a number in \[0, 1\], got 1.5"),
        ({"lam": -0.1}, "lam: expected"),
        ({"lr": 0.0}, "lr: expected"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        PPO(PMoEPolicy(3, 2), **options)
