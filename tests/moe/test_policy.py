"""The mixture policy: its density against torch's distributions, its losses against exact ones."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import quad
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    Normal,
    TanhTransform,
    TransformedDistribution,
)

from torchzoo.moe import (
    PMoEActor,
    PMoEPolicy,
    SquashedGaussianMixture,
    pmoe_frequency_loss,
    pmoe_ppo_loss,
    pmoe_sac_loss,
    policy_losses,
)
from torchzoo.testing import assert_within_se

F64 = torch.float64


def draw(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def parts(*batch, k=3, a=2, seed=0, dtype=F64, grad=False):
    """Logits, means and log-deviations of a mixture whose primitives overlap."""
    values = (
        draw(*batch, k, seed=seed),
        0.7 * draw(*batch, k, a, seed=seed + 1),
        0.3 * draw(*batch, k, a, seed=seed + 2) - 0.7,
    )
    return tuple(value.to(dtype).requires_grad_(grad) for value in values)


def reference(logits, loc, log_std, squash=True):
    """The same distribution, made of torch's."""
    mixture = MixtureSameFamily(
        Categorical(logits=logits), Independent(Normal(loc, log_std.exp()), 1)
    )
    return TransformedDistribution(mixture, TanhTransform()) if squash else mixture


def bowl(s, a):
    """A value with its top at 0.3, not symmetric in the coordinates."""
    return -((a - 0.3).square() * torch.arange(1, a.shape[-1] + 1, dtype=a.dtype)).sum(-1)


def wavy(s, a):
    """A value that no primitive matches exactly."""
    return (3 * a + s.sum(-1, keepdim=True)).sin().sum(-1) + 0.5 * a.square().sum(-1)


def fixed(*values, **options):
    """A policy of fixed parts, whatever the state."""
    return lambda s: SquashedGaussianMixture(*values, **options)


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


# Frequency loss


@pytest.mark.claim(
    123, "The frequency loss has gradient 2 (w - v) in the weights and none in Q", tolerance=1e-12
)
def test_frequency_gradient():
    w = draw(5, 4).softmax(-1).requires_grad_()
    q = draw(5, 4, seed=1).requires_grad_()
    loss = pmoe_frequency_loss(w, q)
    v = F.one_hot(q.argmax(-1), 4)
    assert loss.item() == pytest.approx((w - v).square().sum().item() / 5, rel=1e-12)
    loss.backward()
    torch.testing.assert_close(w.grad, 2 * (w.detach() - v) / 5, rtol=0, atol=1e-12)
    assert q.grad is None
    assert pmoe_frequency_loss(w, q, reduction="mean").item() == pytest.approx(loss.item() / 4)
    assert pmoe_frequency_loss(w[:0], q[:0]) == 0


@pytest.mark.claim(
    123,
    "Under gradient descent the weights reach the frequency with which each primitive is best",
    tolerance=0.02,
)
def test_router_reaches_the_argmax_frequencies():
    logits, loc, log_std = parts(k=4, a=2)
    logits = torch.zeros(4, dtype=F64, requires_grad=True)
    batch = torch.zeros(512, 1, dtype=F64)
    optimizer = torch.optim.SGD([logits], lr=0.5)

    def policy(s):
        rows = len(s)
        return SquashedGaussianMixture(
            logits.expand(rows, 4), loc.expand(rows, 4, 2), log_std.expand(rows, 4, 2) + 0.5
        )

    torch.manual_seed(0)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.5 if step < 200 else 0.05
        optimizer.zero_grad()
        sum(pmoe_sac_loss(policy, [bowl], batch, 0.1).values()).backward()
        optimizer.step()
    a = policy(torch.zeros(100_000, 1)).rsample_per_expert()
    frequency = bowl(None, a).argmax(-1).bincount(minlength=4) / 100_000
    assert 0.05 < frequency.min() < frequency.max() < 0.8
    assert (logits.softmax(-1) - frequency).abs().max() < 0.02


# SAC


def by_hand(values, critics, s, alpha, backprop, entropy, seed=0):
    """The SAC losses, a primitive at a time, with torch's distributions in float64."""
    logits, loc, log_std = values
    torch.manual_seed(seed)
    u = loc + log_std.exp() * torch.randn_like(loc)
    k = logits.shape[-1]
    a = u.tanh()
    q = torch.stack([torch.stack([c(s, a[:, i]) for c in critics]).amin(0) for i in range(k)], -1)
    pi = reference(logits.detach(), loc, log_std)
    own = [
        TransformedDistribution(
            Independent(Normal(loc[:, i], log_std[:, i].exp()), 1), TanhTransform()
        )
        for i in range(k)
    ]
    density = [(pi if entropy == "mixture" else own[i]).log_prob(a[:, i]) for i in range(k)]
    objective = alpha * torch.stack(density, -1) - q
    if backprop == "all":
        loss = objective.mean()
    else:
        loss = torch.stack([row[j] for row, j in zip(objective, q.argmax(-1), strict=True)]).mean()
    v = F.one_hot(q.argmax(-1), k)
    return loss, (logits.softmax(-1) - v).square().sum(-1).mean()


@pytest.mark.claim(
    123,
    "SAC losses and gradients equal a computation primitive by primitive, least critic, "
    "router constant in log pi",
    tolerance=1e-9,
)
@pytest.mark.parametrize("backprop", ["max", "all"])
@pytest.mark.parametrize("entropy", ["mixture", "primitive"])
def test_sac_loss_by_hand(backprop, entropy):
    values = parts(6, k=3, grad=True)
    s = draw(6, 1, seed=9)
    critics = [wavy, lambda s, a: 0.8 * bowl(s, a)]
    exact = by_hand(values, critics, s, 0.4, backprop, entropy)
    column = [wavy, lambda s, a: 0.8 * bowl(s, a)[:, None]]
    torch.manual_seed(0)
    losses = pmoe_sac_loss(
        fixed(*values), column, s, 0.4, backprop=backprop, entropy=entropy, freq_coef=0.7
    )
    assert losses["alpha"] == 0
    for actual, value in ((losses["policy"], exact[0]), (losses["frequency"], 0.7 * exact[1])):
        torch.testing.assert_close(actual, value, rtol=1e-9, atol=1e-9)
    actual = torch.autograd.grad(sum(losses.values()), values)
    wanted = torch.autograd.grad(exact[0] + 0.7 * exact[1], values)
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


def primitive_gradients(alpha, **options):
    """Gradients of the policy term for one state, and the best primitive."""
    values = parts(1, k=3, grad=True)
    torch.manual_seed(0)
    losses = pmoe_sac_loss(fixed(*values), [wavy], torch.zeros(1, 1, dtype=F64), alpha, **options)
    torch.manual_seed(0)
    best = wavy(torch.zeros(1, 1), SquashedGaussianMixture(*values).rsample_per_expert()).argmax()
    grads = torch.autograd.grad(losses["policy"], values[1:])
    return [[grad[0, i].abs().max().item() for grad in grads] for i in range(3)], int(best)


@pytest.mark.claim(
    123,
    "'max' trains the best primitive by Q and others only through the mixture's density; "
    "'all' trains each",
    tolerance=0.0,
)
def test_which_primitives_learn():
    for alpha, entropy, reach in (
        (0.0, "mixture", False),
        (0.5, "primitive", False),
        (0.5, "mixture", True),
    ):
        sizes, best = primitive_gradients(alpha, entropy=entropy)
        for i, (mean, deviation) in enumerate(sizes):
            assert (mean > 1e-6 and deviation > 1e-6) == (reach or i == best)
            assert reach or i == best or (mean, deviation) == (0, 0)
    for entropy in ("mixture", "primitive"):
        sizes, _ = primitive_gradients(0.5, backprop="all", entropy=entropy)
        assert all(size > 1e-6 for pair in sizes for size in pair)


@pytest.mark.claim(
    123,
    "The policy term gives the router exactly no gradient, the frequency loss gives it one",
    tolerance=0.0,
)
@pytest.mark.parametrize("backprop", ["max", "all"])
@pytest.mark.parametrize("entropy", ["mixture", "primitive"])
def test_router_learns_from_the_frequency_loss_only(backprop, entropy):
    policy = PMoEPolicy(3, 2, hidden=(8,), dtype=F64)
    s = draw(20, 3)
    losses = pmoe_sac_loss(policy, [wavy], s, 0.5, backprop=backprop, entropy=entropy)
    losses["policy"].backward(retain_graph=True)
    assert policy.router.weight.grad is None or not policy.router.weight.grad.any()
    assert policy.trunk[0].weight.grad.any()
    assert policy.loc.weight.grad.any()
    policy.zero_grad()
    losses["frequency"].backward()
    assert policy.router.weight.grad.any()
    assert policy.trunk[0].weight.grad.any()
    assert policy.loc.weight.grad is None or not policy.loc.weight.grad.any()
    assert policy.log_std.weight.grad is None or not policy.log_std.weight.grad.any()


def test_detached_trunk_gets_nothing_from_the_router():
    policy = PMoEPolicy(3, 2, hidden=(8,), detach_trunk=True)
    pmoe_sac_loss(policy, [wavy], draw(20, 3, dtype=torch.float32), 0.5)["frequency"].backward()
    assert policy.router.weight.grad.any()
    assert policy.trunk[0].weight.grad is None


@pytest.mark.claim(
    123,
    "Mixture and primitive entropies differ by -log w_j where primitives are well separated",
    tolerance=1e-6,
)
def test_entropies_of_separated_primitives():
    logits = draw(30, 3)
    loc = torch.tensor([[-2.0], [0.0], [2.0]], dtype=F64).expand(30, 3, 1)
    log_std = torch.full_like(loc, -4.0)
    s = draw(30, 1, seed=5)
    found = {}
    for entropy in ("mixture", "primitive"):
        torch.manual_seed(0)
        losses = pmoe_sac_loss(fixed(logits, loc, log_std), [wavy], s, 1.0, entropy=entropy)
        found[entropy] = -losses["policy"]  # the entropy and what is the same in both
    best = wavy(s[:, None], loc.tanh()).argmax(-1)
    exact = -logits.log_softmax(-1).gather(-1, best[:, None]).mean()
    torch.testing.assert_close(found["mixture"] - found["primitive"], exact, rtol=0, atol=1e-6)


@pytest.mark.claim(
    123,
    "The temperature's loss is -log(alpha) (log pi(a) + target) for a from the policy, "
    "alpha constant elsewhere",
    tolerance=1e-9,
)
def test_temperature_loss():
    values = parts(8, k=3)
    s, log_alpha = draw(8, 1), torch.tensor(-0.5, dtype=F64, requires_grad=True)
    for target in (None, 0.3):
        torch.manual_seed(0)
        losses = pmoe_sac_loss(fixed(*values), [wavy], s, log_alpha.exp(), target_entropy=target)
        torch.manual_seed(0)
        pi = SquashedGaussianMixture(*values)
        u, expert = pi.rsample_latent_per_expert(), pi.sample_expert()
        a = torch.stack([u[i, j] for i, j in enumerate(expert.tolist())]).tanh()
        gap = reference(*values).log_prob(a) + (-2 if target is None else target)
        exact = -(-0.5 * gap).mean()
        torch.testing.assert_close(losses["alpha"], exact, rtol=1e-9, atol=1e-9)
        grad = torch.autograd.grad(sum(losses.values()), log_alpha)[0]
        torch.testing.assert_close(grad, -gap.mean(), rtol=1e-9, atol=1e-9)
        torch.manual_seed(0)
        number = pmoe_sac_loss(fixed(*values), [wavy], s, math.exp(-0.5), target_entropy=target)
        torch.testing.assert_close(losses["policy"], number["policy"])


# The other estimators


def rows(values, n):
    """Parameters repeated for `n` states, so that each state's gradient is one sample."""
    return [value.detach().expand(n, *value.shape).clone().requires_grad_() for value in values]


def sampled_gradients(values, critic, alpha, n=40_000, **options):
    """`(n, ...)` samples of the gradient of the policy term, for each parameter."""
    leaves = rows(values, n)
    squash = options.pop("squash", True)
    torch.manual_seed(0)
    s = torch.zeros(n, 1, dtype=F64)
    losses = pmoe_sac_loss(fixed(*leaves, squash=squash), [critic], s, alpha, **options)
    assert losses["frequency"] == 0
    return torch.autograd.grad(losses["policy"] * n, leaves)


@pytest.mark.claim(
    123, "The score estimator's gradient is that of sum_i w_i E[Q(a_i)], within 3 standard errors"
)
def test_score_estimator_on_values():
    values = parts(k=3, a=2, grad=True)
    logits, loc, log_std = values
    weight = torch.tensor([1.0, 2.0], dtype=F64)
    # E -(a - 0.3)^2 = -(mu - 0.3)^2 - sigma^2 without squashing
    expected = -(weight * ((loc - 0.3).square() + (2 * log_std).exp())).sum(-1)
    exact = torch.autograd.grad(-(logits.softmax(-1) * expected).sum(), values)
    found = sampled_gradients(values, bowl, 0.0, squash=False, estimator="score")
    for samples, value in zip(found, exact, strict=True):
        assert_within_se(samples, value, 3)


@pytest.mark.claim(
    123,
    "With the entropy too, the score estimator's gradient is that of E[alpha log pi(a) - Q(a)]",
)
def test_score_estimator_on_the_whole_objective():
    """The router counts as a constant inside log pi, and still the estimator has no bias."""
    values = parts(k=3, a=1, grad=True)
    u = torch.linspace(-12, 12, 8001, dtype=F64)[:, None]
    pi = SquashedGaussianMixture(*values)
    log_pi = pi.latent_log_prob(u)
    density = reference(*values, squash=False).log_prob(u).exp()
    objective = 0.7 * log_pi - wavy(torch.zeros(1), u.tanh())
    exact = torch.autograd.grad(torch.trapezoid(density * objective, u[:, 0]), values)
    found = sampled_gradients(values, wavy, 0.7, estimator="score")
    for samples, value in zip(found, exact, strict=True):
        assert_within_se(samples, value, 4)


def test_score_loss_by_hand():
    """Its baseline is the mean over primitives, which leaves the expectation as it is."""
    values = parts(6, k=3, grad=True)
    s = draw(6, 1)
    torch.manual_seed(0)
    loss = pmoe_sac_loss(fixed(*values), [wavy], s, 0.4, estimator="score")["policy"]
    torch.manual_seed(0)
    pi = SquashedGaussianMixture(*values)
    u, expert = pi.rsample_latent_per_expert(), pi.sample_expert().tolist()
    frozen = reference(values[0].detach(), *values[1:])
    each = [0.4 * frozen.log_prob(x.tanh()) - wavy(s, x.tanh()) for x in u.unbind(1)]
    terms = []
    for row, j in enumerate(expert):
        own = [column[row] for column in each]
        advantage = (own[j] - sum(own) / 3).detach()
        terms.append(own[j] + advantage * values[0][row].log_softmax(-1)[j])
    exact = torch.stack(terms).mean()
    torch.testing.assert_close(loss, exact, rtol=1e-9, atol=1e-9)
    grads = (torch.autograd.grad(value, values) for value in (loss, exact))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def gumbel_expectation(logit, c, slope, tau):
    """Expected gradient in the first logit of two primitives at points c, by quadrature.

    The difference of the noisy logits is logistic around `logit`; its sign decides where the
    slope of Q is taken, and the soft choice `sigmoid(x / tau)` is differentiated.
    """

    def bump(x):
        return math.exp(-abs(x)) / (1 + math.exp(-abs(x))) ** 2

    def integrand(x):
        return bump(x - logit) * slope(c[0] if x > 0 else c[1]) * bump(x / tau) / tau

    total, _ = quad(integrand, -40, 40, points=[0, logit], limit=400)
    return -total * (c[0] - c[1])


@pytest.mark.claim(
    123,
    "The Gumbel estimator is biased at tau = 1, by the bias of its integral, and less so as "
    "tau falls",
)
def test_gumbel_estimator():
    logit, c = 0.8, (0.9, -0.4)
    values = (
        torch.tensor([logit, 0.0], dtype=F64),
        torch.tensor([[c[0]], [c[1]]], dtype=F64),
        torch.full((2, 1), -20.0, dtype=F64),
    )
    p = 1 / (1 + math.exp(-logit))
    unbiased = -p * (1 - p) * (-((c[0] - 0.3) ** 2) + (c[1] - 0.3) ** 2)
    biases = []
    for tau in (1.0, 0.5, 0.2, 0.05):
        found = sampled_gradients(
            values, bowl, 0.0, n=100_000, squash=False, estimator="gumbel", tau=tau
        )
        samples = found[0][:, 0]
        exact = gumbel_expectation(logit, c, lambda a: -2 * (a - 0.3), tau)
        assert_within_se(samples, exact, 4)
        biases.append(abs(exact - unbiased))
        if tau == 1:
            error = samples.std().item() / len(samples) ** 0.5
            assert abs(samples.mean().item() - unbiased) > 10 * error
    assert all(small < large for large, small in pairwise(biases))
    assert biases[-1] < 0.15 * biases[0]


def test_gumbel_loss_by_hand():
    """The value is that of the drawn primitive; the router counts as a constant in log pi."""
    values = parts(6, k=3, grad=True)
    s = draw(6, 1)
    for entropy in ("mixture", "primitive"):
        torch.manual_seed(0)
        loss = pmoe_sac_loss(
            fixed(*values), [wavy], s, 0.4, estimator="gumbel", entropy=entropy, tau=0.3
        )["policy"]
        torch.manual_seed(0)
        pi = SquashedGaussianMixture(*values)
        u = pi.rsample_latent_per_expert()
        pi.sample_expert()
        choice = F.gumbel_softmax(values[0], 0.3, hard=True)
        expert = choice.argmax(-1).tolist()
        drawn = torch.stack([u[i, j] for i, j in enumerate(expert)])
        own = pi.latent_component_log_prob(drawn)
        own = torch.stack([own[i, j] for i, j in enumerate(expert)])
        density = pi.latent_log_prob(drawn) if entropy == "mixture" else own
        torch.testing.assert_close(loss, (0.4 * density - wavy(s, drawn.tanh())).mean())
        soft_a, soft_u = ((choice[..., None] * x).sum(1) for x in (u.tanh(), u))
        if entropy == "mixture":
            frozen = SquashedGaussianMixture(values[0].detach(), *values[1:])
            density = frozen.latent_log_prob(soft_u)
        else:
            each = [pi.latent_component_log_prob(u[:, i])[:, i] for i in range(3)]
            density = (choice * torch.stack(each, -1)).sum(-1)
        exact = (0.4 * density - wavy(s, soft_a)).mean()
        grads = (torch.autograd.grad(value, values, retain_graph=True) for value in (loss, exact))
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


# Permutation


@pytest.mark.claim(
    123, "Permuting the primitives permutes what is theirs and changes nothing else", tolerance=1e-9
)
@pytest.mark.parametrize("backprop", ["max", "all"])
@pytest.mark.parametrize("entropy", ["mixture", "primitive"])
@pytest.mark.parametrize("estimator", ["frequency", "gumbel", "score"])
def test_permutation(backprop, entropy, estimator, monkeypatch):
    order = torch.tensor([2, 0, 3, 1])
    values = parts(9, k=4, grad=True)
    swapped = [value.detach()[:, order].requires_grad_() for value in values]
    noise, gumbel, expert = draw(9, 4, 2, seed=7), draw(9, 4, seed=8), torch.arange(9) % 4
    s = draw(9, 1, seed=6)

    def run(leaves, index):
        inverse = index.argsort()
        noisy = noise[:, index]
        monkeypatch.setattr(
            SquashedGaussianMixture,
            "rsample_latent_per_expert",
            lambda self: self.loc + self.log_std.exp() * noisy,
        )
        monkeypatch.setattr(SquashedGaussianMixture, "sample_expert", lambda self: inverse[expert])

        def choose(logits, tau, hard):
            soft = ((logits + gumbel[:, index]) / tau).softmax(-1)
            return F.one_hot(soft.argmax(-1), 4) + soft - soft.detach()

        monkeypatch.setattr(policy_losses.F, "gumbel_softmax", choose)
        alpha = torch.tensor(0.4, dtype=F64)
        losses = pmoe_sac_loss(
            fixed(*leaves),
            [wavy],
            s,
            alpha,
            backprop=backprop,
            entropy=entropy,
            estimator=estimator,
        )
        grads = torch.autograd.grad(sum(losses.values()), leaves)
        pi = SquashedGaussianMixture(*leaves)
        a = draw(9, 2, seed=5).tanh()
        same = [*losses.values(), pi.log_prob(a), pi.mode, pi.mean, pi.variance]
        return same, [*grads, pi.component_log_prob(a), pi.mixture_weights]

    same, own = run(values, torch.arange(4))
    same_swapped, own_swapped = run(swapped, order)
    torch.testing.assert_close(same_swapped, same, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(own_swapped, [x[:, order] for x in own], rtol=1e-9, atol=1e-9)


# PPO


class Value(torch.nn.Module):
    """A value network for PPO."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(5, 1, dtype=F64)

    def forward(self, s, a):
        return self.linear(torch.cat([s, a], -1)).sin()


def ppo_inputs(squash=False):
    torch.manual_seed(0)
    policy = PMoEPolicy(3, 2, num_experts=3, hidden=(8,), squash=squash, dtype=F64)
    s = draw(40, 3)
    a = policy.act(s)
    old = policy(s).log_prob(a).detach() + 0.3 * draw(40, seed=1)
    return policy, Value(), s, a, old, draw(40, seed=2), draw(40, seed=3)


@pytest.mark.claim(
    123,
    "The PPO surrogate is clipped on the exact mixture ratio, weights differentiated",
    tolerance=1e-9,
)
@pytest.mark.parametrize("squash", [True, False])
def test_ppo_surrogate(squash):
    policy, q_net, s, a, old, advantage, returns = ppo_inputs(squash)
    losses = pmoe_ppo_loss(policy, q_net, s, a, old, advantage, returns)
    pi = policy(s)
    ratio = (reference(pi.logits, pi.loc, pi.log_std, squash).log_prob(a) - old).exp()
    gains = []
    for r, adv in zip(ratio, advantage, strict=True):
        stopped = (r > 1.2 and adv > 0) or (r < 0.8 and adv < 0)
        gains.append(r.detach().clamp(0.8, 1.2) * adv if stopped else r * adv)
    exact = -torch.stack(gains).mean()
    assert ((ratio - 1).abs() > 0.2).sum() > 5
    torch.testing.assert_close(losses["policy"], exact, rtol=1e-9, atol=1e-9)
    wanted = torch.autograd.grad(exact, list(policy.parameters()))
    actual = torch.autograd.grad(losses["policy"], list(policy.parameters()))
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)
    names = [name for name, _ in policy.named_parameters()]
    assert actual[names.index("router.weight")].any()


@pytest.mark.claim(
    123,
    "In PPO the value network learns from its regression alone, the router from its argmax",
    tolerance=1e-9,
)
def test_ppo_frequency_and_value_losses():
    policy, q_net, s, a, old, advantage, returns = ppo_inputs()
    torch.manual_seed(1)
    losses = pmoe_ppo_loss(policy, q_net, s, a, old, advantage, returns, freq_coef=0.5)
    torch.manual_seed(1)
    pi = policy(s)
    q = torch.stack([q_net(s, x)[:, 0] for x in pi.rsample_per_expert().unbind(1)], -1)
    exact = 0.5 * (pi.mixture_weights - F.one_hot(q.argmax(-1), 3)).square().sum(-1).mean()
    torch.testing.assert_close(losses["frequency"], exact, rtol=1e-9, atol=1e-9)
    regression = F.mse_loss(q_net(s, a)[:, 0], returns)
    torch.testing.assert_close(losses["q"], regression, rtol=1e-9, atol=1e-9)
    weight = q_net.linear.weight
    whole = torch.autograd.grad(sum(losses.values()), weight, retain_graph=True)[0]
    torch.testing.assert_close(whole, torch.autograd.grad(regression, weight)[0])
    grad = torch.autograd.grad(losses["frequency"], list(policy.parameters()), allow_unused=True)
    learns = {n for (n, _), g in zip(policy.named_parameters(), grad, strict=True) if g is not None}
    assert learns == {"trunk.0.weight", "trunk.0.bias", "router.weight", "router.bias"}
    plain = pmoe_ppo_loss(policy, q_net, s, a, old, advantage, returns, freq_coef=0)
    assert plain["frequency"] == 0
    torch.testing.assert_close(plain["policy"], losses["policy"])


# Interface


def test_actor_is_the_squashed_policy():
    assert PMoEActor is PMoEPolicy
    a = PMoEActor(3, 2).act(draw(100, 3, dtype=torch.float32) * 50)
    assert a.abs().max() <= 1


def test_losses_with_many_or_no_batch_dimensions():
    policy = PMoEPolicy(3, 2, hidden=(8,), dtype=F64)
    s = draw(4, 5, 3)
    for estimator in ("frequency", "gumbel", "score"):
        torch.manual_seed(0)
        split = pmoe_sac_loss(policy, [wavy], s, 0.5, estimator=estimator)
        torch.manual_seed(0)
        flat = pmoe_sac_loss(policy, [wavy], s.flatten(0, 1), 0.5, estimator=estimator)
        for name, value in flat.items():
            torch.testing.assert_close(split[name], value)
        assert pmoe_sac_loss(policy, [wavy], s[0, 0], 0.5, estimator=estimator)["policy"].ndim == 0
        empty = pmoe_sac_loss(policy, [wavy], s[:0], 0.5, estimator=estimator)
        assert sum(empty.values()) == 0


def test_sac_loss_compiles_to_one_graph():
    policy = PMoEPolicy(3, 2, hidden=(8,))
    s = draw(6, 3, dtype=torch.float32)

    def losses(s, alpha):
        return list(pmoe_sac_loss(policy, [wavy], s, alpha).values())

    torch._dynamo.reset()
    torch.manual_seed(0)
    expected = losses(s, torch.tensor(0.3))
    torch.manual_seed(0)
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(s, torch.tensor(0.3)), expected)


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
