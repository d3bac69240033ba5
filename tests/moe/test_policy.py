"""The mixture policy: its density, moments and samples against torch's, and bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import quad
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from tests.moe.policies import F64, draw, fixed, parts, reference, wavy
from torchzoo.moe import (
    PMoEActor,
    PMoEPolicy,
    SquashedGaussianMixture,
    pmoe_frequency_loss,
    pmoe_ppo_loss,
    pmoe_sac_loss,
)

# Density


@pytest.mark.claim(
    123,
    "With one primitive the policy is a squashed diagonal Gaussian, frequency loss 0",
    tolerance=1e-5,
)
def test_one_primitive():
    policy = PMoEPolicy(3, 2, num_experts=1, hidden=(16,))
    s = draw(50, 3, dtype=torch.float32)
    pi = policy(s)
    normal = Independent(Normal(pi.loc[:, 0], pi.log_std[:, 0].exp()), 1)
    plain = TransformedDistribution(normal, TanhTransform())
    a = pi.sample()
    torch.testing.assert_close(pi.log_prob(a), plain.log_prob(a), rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    losses = pmoe_sac_loss(policy, [wavy], s, 0.3)
    assert losses["frequency"] == 0
    torch.manual_seed(0)
    u = pi.loc + pi.log_std.exp() * torch.randn_like(pi.loc)
    a = u.squeeze(-2).tanh()
    exact = (0.3 * plain.log_prob(a) - wavy(s, a)).mean()
    torch.testing.assert_close(losses["policy"], exact, rtol=1e-5, atol=1e-5)


@pytest.mark.claim(
    123,
    "log_prob is that of torch's mixture of Gaussians plus the tanh Jacobian",
    tolerance=1e-5,
)
@pytest.mark.parametrize("squash", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@settings(max_examples=10, deadline=None)
@given(k=st.integers(1, 5), a=st.integers(1, 4), seed=st.integers(0, 99))
def test_log_prob(squash, dtype, k, a, seed):
    values = parts(7, k=k, a=a, seed=seed, dtype=dtype)
    action = SquashedGaussianMixture(*values, squash=squash).rsample_per_expert()[:, 0]
    pi = SquashedGaussianMixture(*values, squash=squash)
    double = [value.double() for value in values]
    exact = reference(*double, squash=squash).log_prob(action.double())
    torch.testing.assert_close(pi.log_prob(action).double(), exact, rtol=1e-5, atol=1e-5)
    own = Independent(Normal(double[1], double[2].exp()), 1)
    if squash:
        own = TransformedDistribution(own, TanhTransform())
    exact = own.log_prob(action[:, None].double())
    actual = pi.component_log_prob(action).double()
    torch.testing.assert_close(actual, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.claim(123, "In one dimension the density integrates to 1", tolerance=1e-4)
@pytest.mark.parametrize("seed", range(3))
def test_density_integrates_to_one(seed):
    pi = SquashedGaussianMixture(*parts(k=3, a=1, seed=seed))

    def density(a):
        return pi.log_prob(torch.tensor([a], dtype=F64)).exp().item()

    total, _ = quad(density, -1, 1, points=pi.loc.flatten().tanh().tolist(), limit=200)
    assert total == pytest.approx(1, abs=1e-4)


def test_moments_are_the_integrals_of_the_density():
    logits, loc, log_std = parts(k=3, a=1)
    for widen in (-2.0, 0.0, 2.0):
        pi = SquashedGaussianMixture(logits, loc, log_std + widen)
        plain = reference(logits, loc, log_std + widen, squash=False)

        def moment(power, plain=plain):
            def integrand(u):
                return (
                    plain.log_prob(torch.tensor([u], dtype=F64)).exp().item()
                    * math.tanh(u) ** power
                )

            return quad(integrand, -25, 25, points=loc.flatten().tolist(), limit=400)[0]

        assert pi.mean.item() == pytest.approx(moment(1), abs=2e-4)
        assert pi.variance.item() == pytest.approx(moment(2) - moment(1) ** 2, abs=2e-4)
    pi = SquashedGaussianMixture(*parts(4), squash=False)
    exact = reference(*parts(4), squash=False)
    torch.testing.assert_close(pi.mean, exact.mean)
    torch.testing.assert_close(pi.variance, exact.variance)


@pytest.mark.claim(
    123, "log_prob and its gradients are finite at latents of 20 and deviations of exp(-20)"
)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("k", [1, 3])
def test_extremes(dtype, k):
    for u0 in (20.0, -20.0):
        for mean in (u0, 0.3):
            for scale in (-20.0, 2.0):
                leaves = [
                    torch.zeros(k, dtype=dtype),
                    torch.full((k, 2), mean, dtype=dtype),
                    torch.full((k, 2), scale, dtype=dtype),
                    torch.full((2,), u0, dtype=dtype),
                ]
                for leaf in leaves:
                    leaf.requires_grad_()
                pi = SquashedGaussianMixture(*leaves[:3])
                value = pi.latent_log_prob(leaves[3])
                z = (u0 - mean) / math.exp(scale)
                slope = math.log(4) - 40 - 2 * math.log1p(math.exp(-40))  # of tanh at 20
                exact = 2 * (-0.5 * z * z - scale - 0.5 * math.log(2 * math.pi) - slope)
                assert value.item() == pytest.approx(exact, rel=1e-5)
                (value + pi.log_prob(leaves[3].tanh())).backward()
                assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_pathwise_gradients_are_finite_at_the_least_deviation():
    leaves = parts(64, dtype=torch.float32)
    leaves = [leaves[0], leaves[1], torch.full_like(leaves[2], -20)]
    for leaf in leaves:
        leaf.requires_grad_()
    losses = pmoe_sac_loss(fixed(*leaves), [wavy], torch.zeros(64, 1), 0.2)
    sum(losses.values()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


# Sampling


@pytest.mark.claim(123, "Fractions of samples near the modes are the weights (chi-square p > 0.01)")
@pytest.mark.parametrize("weights", [(0.3, 0.7), (0.1, 0.25, 0.65)])
def test_mode_fractions(weights):
    loc = torch.linspace(-1, 1, len(weights), dtype=F64)[:, None]
    log_std = torch.full_like(loc, -3.0)
    pi = SquashedGaussianMixture(torch.tensor(weights, dtype=F64).log() + 5, loc, log_std)
    torch.manual_seed(0)
    u = pi.sample((20_000,)).atanh()
    nearest = (u - loc.T).abs().argmin(-1)
    counts = nearest.bincount(minlength=len(weights))
    assert stats.chisquare(counts, 20_000 * torch.tensor(weights)).pvalue > 0.01
    z = ((u - loc[nearest]) / math.exp(-3)).flatten()
    assert stats.kstest(z.numpy(), "norm").pvalue > 0.01


def test_samples_of_a_policy_follow_its_router():
    torch.manual_seed(0)
    policy = PMoEPolicy(3, 2, hidden=(8,), log_std_bounds=(-9.0, -8.0))
    s = draw(1, 3, dtype=torch.float32).expand(20_000, 3)
    pi = policy(s)
    nearest = (policy.act(s)[:, None] - pi.loc.tanh()).norm(dim=-1).argmin(-1)
    expected = 20_000 * pi.mixture_weights[0].detach().double()
    counts = nearest.bincount(minlength=4).double() * (expected.sum() / 20_000)
    assert stats.chisquare(counts, expected).pvalue > 0.01


def test_deterministic_action_is_the_mean_of_the_most_probable_primitive():
    policy = PMoEPolicy(3, 2, hidden=(8,))
    s = draw(40, 3, dtype=torch.float32)
    pi = policy(s)
    best = pi.mixture_weights.argmax(-1)
    assert len(best.unique()) > 1
    expected = torch.stack([pi.loc[row, j] for row, j in enumerate(best.tolist())]).tanh()
    assert torch.equal(policy.act(s, deterministic=True), expected)
    assert not torch.equal(policy.act(s), policy.act(s))
    assert not policy.act(s).requires_grad


def test_per_expert_samples_are_reparametrised():
    values = parts(k=3, a=2, grad=True)
    torch.manual_seed(0)
    a = SquashedGaussianMixture(*values).rsample_per_expert()
    torch.manual_seed(0)
    u = values[1] + values[2].exp() * torch.randn(3, 2, dtype=F64)
    assert torch.equal(a, u.tanh())
    grads = torch.autograd.grad(a.sum(), values[1:])
    slope = 1 - a.square()
    torch.testing.assert_close(grads[0], slope)
    torch.testing.assert_close(grads[1], slope * (u - values[1]))


# Interface


def test_actor_is_the_squashed_policy():
    assert PMoEActor is PMoEPolicy
    a = PMoEActor(3, 2).act(draw(100, 3, dtype=torch.float32) * 50)
    assert a.abs().max() <= 1


def test_distribution_interface():
    values = parts(5, k=3)
    pi = SquashedGaussianMixture(*values)
    assert repr(pi) == (
        "SquashedGaussianMixture(batch_shape=(5,), event_shape=(2,), num_experts=3, squash=True)"
    )
    wide = pi.expand((4, 5))
    a = pi.sample((4,))
    assert a.shape == (4, 5, 2)
    torch.testing.assert_close(wide.log_prob(a), pi.log_prob(a))
    torch.testing.assert_close(wide.mean[2], pi.mean)
    assert pi.log_prob(torch.ones(5, 2, dtype=F64)).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts: expected an integer at least 1, got 0"),
        ({"obs_dim": 0}, "obs_dim: expected"),
        ({"action_dim": 1.5}, "action_dim: expected"),
        ({"hidden": (8, 0)}, "hidden: expected an integer at least 1, got 0"),
        ({"log_std_bounds": (1.0, 1.0)}, r"log_std_bounds: expected low < high, got \(1.0, 1.0\)"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        PMoEPolicy(**{"obs_dim": 3, "action_dim": 2} | options)


def test_bad_inputs():
    policy = PMoEPolicy(3, 2, hidden=(8,))
    s = torch.zeros(5, 3)
    with pytest.raises(ValueError, match=r"s: expected \(..., 3\), got \(5, 4\)"):
        policy(torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"value: expected \(..., 2\), got \(5, 1\)"):
        policy(s).log_prob(torch.zeros(5, 1))
    strict = SquashedGaussianMixture(*parts(5), validate_args=True)
    with pytest.raises(ValueError, match="value argument"):
        strict.log_prob(torch.full((5, 2), 1.01))
    with pytest.raises(ValueError, match=r"q: got \(32, 3\), expected \(32, 4\)"):
        pmoe_frequency_loss(torch.zeros(32, 4), torch.zeros(32, 3))
    with pytest.raises(ValueError, match="reduction: expected one of sum, mean, got 'none'"):
        pmoe_frequency_loss(torch.zeros(2, 4), torch.zeros(2, 4), reduction="none")
    for name, value in (
        ("estimator", "reinforce"),
        ("backprop", "best"),
        ("entropy", "joint"),
        ("tau", 0.0),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected .*, got {value!r}"):
            pmoe_sac_loss(policy, [wavy], s, 0.1, **{name: value})
    with pytest.raises(ValueError, match="critics: expected at least one"):
        pmoe_sac_loss(policy, [], s, 0.1)
    with pytest.raises(ValueError, match=r"critics: expected values of shape \(20,\) or \(20, 1\)"):
        pmoe_sac_loss(policy, [lambda s, a: a], s, 0.1)
    with pytest.raises(ValueError, match=r"loc: expected \(5, 3, 'A'\)"):
        SquashedGaussianMixture(torch.zeros(5, 3), torch.zeros(5, 4, 2), torch.zeros(5, 4, 2))
    with pytest.raises(ValueError, match="log_std: expected"):
        SquashedGaussianMixture(torch.zeros(3), torch.zeros(3, 2), torch.zeros(3, 1))
    a, row = torch.zeros(5, 2), torch.zeros(5)
    with pytest.raises(ValueError, match="clip: expected"):
        pmoe_ppo_loss(policy, wavy, s, a, row, row, row, clip=0.0)
    with pytest.raises(ValueError, match=r"advantage: expected \(5,\), got \(5, 1\)"):
        pmoe_ppo_loss(policy, wavy, s, a, row, row[:, None], row)
    with pytest.raises(ValueError, match=r"a: expected \(5, 'A'\), got \(4, 2\)"):
        pmoe_ppo_loss(policy, wavy, s, a[:4], row, row, row)
