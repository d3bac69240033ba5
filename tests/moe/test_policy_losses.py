"""The frequency, SAC and PPO losses of a mixture policy against computations by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from tests.moe.policies import F64, bowl, draw, fixed, parts, reference, wavy
from torchzoo.moe import (
    PMoEPolicy,
    SquashedGaussianMixture,
    pmoe_frequency_loss,
    pmoe_ppo_loss,
    pmoe_sac_loss,
)

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
