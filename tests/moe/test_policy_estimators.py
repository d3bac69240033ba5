"""Other estimators of a mixture policy's gradient, score and Gumbel, and permutations under all."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import quad

from tests.moe.policies import F64, bowl, draw, fixed, parts, reference, wavy
from torchzoo.moe import SquashedGaussianMixture, pmoe_sac_loss, policy_losses
from torchzoo.testing import assert_within_se


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
