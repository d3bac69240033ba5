"""Priors over weights against closed forms, numerical integrals and scipy."""

import math

import pytest
import torch
from scipy import integrate, stats
from torch import nn
from torch.func import functional_call

from torchzoo.gp import FlowPriorNet, GaussianPriorNet, HierarchicalPriorNet, PlanarFlow
from torchzoo.gp.bnn_priors_hierarchical import gamma_quantile
from torchzoo.infinite.dual_activations import arc_cosine

KINDS = [GaussianPriorNet, HierarchicalPriorNet, FlowPriorNet]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


@pytest.mark.claim(
    13, "A wide ReLU network draws functions of the covariance of the arc-cosine kernel",
    tolerance=0.05,
)  # fmt: skip
def test_wide_networks():
    net = GaussianPriorNet(nn.Sequential(nn.Linear(2, 1000), nn.ReLU(), nn.Linear(1000, 1)))
    s = torch.tensor([1.5, 0.7, 2.0, 0.5])  # weights and biases of both layers
    net.std = s
    x = normal(3, 2).float()
    with torch.no_grad():
        f = net.sample_functions(x, 6000, generator=seeded())[..., 0]
    k = s[1] ** 2 + s[0] ** 2 * x @ x.mT / 2
    d = k.diagonal()
    k = s[3] ** 2 + s[2] ** 2 * arc_cosine(d[:, None], d, k)
    scale = k.diagonal().sqrt()
    error = (f.mT @ f / len(f) - k) / torch.outer(scale, scale)
    assert error.abs().max() < 0.05


@pytest.mark.claim(
    13, "Gradients of drawn functions equal finite differences with the same random numbers",
    tolerance=None,
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_draws(kind):
    net = kind([1, 3, 1], dtype=torch.float64)
    x = normal(4, 1)
    names, values = zip(*net.named_parameters(), strict=True)

    def draw(*values):
        with torch.no_grad():
            for name, value in zip(names, values, strict=True):
                net.get_parameter(name).copy_(value)
        drawn = net.sample_functions(x, 2, generator=seeded(5))
        return drawn.tanh().sum()

    slopes = torch.autograd.grad(draw(*[v.detach().clone() for v in values]), list(values))
    base = [v.detach().clone() for v in values]
    direction = [normal(*v.shape, seed=i) for i, v in enumerate(base)]
    ends = [draw(*[b + h * d for b, d in zip(base, direction, strict=True)]) for h in (1e-5, -1e-5)]
    expected = sum((s * d).sum() for s, d in zip(slopes, direction, strict=True))
    assert ((ends[0] - ends[1]) / 2e-5).item() == pytest.approx(expected.item(), rel=1e-5)


def test_gamma_quantiles():
    u = torch.tensor([1e-6, 0.01, 0.3, 0.9, 0.9999], dtype=torch.float64)
    for shape in (0.05, 0.7, 1.0, 6.0, 300.0):
        alpha = torch.full((5,), shape, dtype=torch.float64, requires_grad=True)
        found = gamma_quantile(u, alpha)
        expected = torch.from_numpy(stats.gamma.ppf(u.numpy(), shape))
        torch.testing.assert_close(found.detach(), expected, rtol=1e-9, atol=0)
        (slope,) = torch.autograd.grad(found.sum(), alpha)
        h = 1e-4 * shape / (1 + shape**0.5)
        change = stats.gamma.ppf(u.numpy(), shape + h) - stats.gamma.ppf(u.numpy(), shape - h)
        torch.testing.assert_close(slope, torch.from_numpy(change / (2 * h)), rtol=1e-5, atol=1e-12)


def test_gaussian_density():
    net = GaussianPriorNet([2, 3, 1], dtype=torch.float64)
    net.std = torch.tensor([1.5, 0.7, 2.0, 0.5])
    weights = net.sample_weights(6, generator=seeded())
    scales = [1.5 / math.sqrt(2), 0.7, 2.0 / math.sqrt(3), 0.5]
    expected = sum(
        torch.from_numpy(stats.norm.logpdf(w.detach().numpy(), scale=s)).flatten(1).sum(1)
        for w, s in zip(weights.values(), scales, strict=True)
    )
    torch.testing.assert_close(net.log_prior(weights), expected)
    plain = GaussianPriorNet([2, 3, 1], init_std=3.0, scaled=False)
    assert [s.item() for s in plain.scales().values()] == pytest.approx([3.0] * 4)


def test_hierarchical_density_is_the_integral():
    net = HierarchicalPriorNet(nn.Linear(3, 1), init_shape=1.7, init_rate=0.6, dtype=torch.float64)
    weights = {"weight": normal(1, 3), "bias": normal(1, seed=1)}

    def joint(precision, w, fan):
        std = (precision * fan) ** -0.5
        density = stats.norm.pdf(w.flatten().numpy(), scale=std).prod()
        return density * stats.gamma.pdf(precision, 1.7, scale=1 / 0.6)

    expected = sum(
        math.log(integrate.quad(joint, 0, math.inf, args=(w, fan), epsabs=1e-13)[0])
        for w, fan in zip(weights.values(), (3, 1), strict=True)
    )
    assert net.log_prior(weights).item() == pytest.approx(expected, rel=1e-7)
    drawn = net.sample_weights(4000, generator=seeded())["weight"].detach()
    student = stats.t(2 * 1.7, scale=math.sqrt(0.6 / 1.7 / 3))
    assert stats.kstest(drawn[:, 0, 0].numpy(), student.cdf).pvalue > 1e-3
    assert stats.spearmanr(*drawn[:, 0, :2].abs().mT.numpy()).statistic > 0.1  # one precision


def bent(dim, seed=0):
    """A flow that is far from the identity, close to the edge of what can be inverted."""
    flow = PlanarFlow(dim, dtype=torch.float64)
    with torch.no_grad():
        flow.u.copy_(normal(4, dim, seed=seed))
        flow.w.copy_(2 * normal(4, dim, seed=seed + 1))
        flow.u[1].copy_(-3 * flow.w[1])
        flow.b.copy_(normal(4, seed=seed + 2))
    return flow


def test_planar_flow():
    flow, x = bent(3), 2 * normal(20, 3, seed=7)
    moved = flow(x)
    slopes = torch.stack(
        [torch.autograd.functional.jacobian(lambda p: flow(p).value, p) for p in x]
    )
    torch.testing.assert_close(moved.log_det, slopes.logdet())
    back = flow.inverse(moved.value)
    torch.testing.assert_close(back.value, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(back.log_det, -moved.log_det, rtol=0, atol=1e-9)
    y = moved.value.detach()[:3].requires_grad_()
    assert torch.autograd.gradcheck(lambda y, *_: tuple(flow.inverse(y)), (y, *flow.parameters()))
    u, w = flow.u[0], flow.w[0]
    step = PlanarFlow(3, num_flows=1, dtype=torch.float64)
    step.load_state_dict({"u": u[None], "w": w[None], "b": flow.b[:1]})
    along = (w @ u).item()
    corrected = u + (math.log(1 + math.exp(along)) - 1 - along) * w / (w @ w)
    torch.testing.assert_close(
        step(x).value, x + corrected * torch.tanh(x @ w + flow.b[0])[:, None]
    )
    same = PlanarFlow(3, dtype=torch.float64)
    torch.testing.assert_close(same(x).value, x)


def test_flow_density_integrates_to_one():
    net = FlowPriorNet(nn.Linear(1, 1, bias=False), init_std=0.8, dtype=torch.float64)
    net.flows[0].load_state_dict(bent(1).state_dict())
    w = torch.linspace(-30, 30, 20001, dtype=torch.float64)
    density = net.log_prior({"weight": w[:, None, None]}).exp().detach()
    assert torch.trapezoid(density, w).item() == pytest.approx(1, abs=1e-4)
    drawn = net.sample_weights(4000, generator=seeded())["weight"].detach().flatten()
    below = torch.cumulative_trapezoid(density, w)
    cdf = lambda at: below[((at + 30) / 0.003).astype(int)].numpy()  # noqa: E731
    assert stats.kstest(drawn.numpy(), cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
        nn.Sequential(nn.Unflatten(-1, (1, 3)), nn.Conv1d(1, 2, 2), nn.Flatten(-2)),
    ],
)
def test_functions_of_any_network(network):
    net = GaussianPriorNet(network)
    assert list(net.state_dict()) == ["raw_std"]
    assert all(p.numel() for p in network.parameters())  # left as it was
    x = normal(2, 5, 3).float()
    weights = {name: w.detach() for name, w in net.sample_weights(2).items()}
    each = [{name: w[i] for name, w in weights.items()} for i in range(2)]
    x = x[:, :, :3]
    one = torch.stack([functional_call(network, w, (x[0],)) for w in each])
    torch.testing.assert_close(net.functions(weights, x[0]), one)
    own = torch.stack([functional_call(network, w, (p,)) for w, p in zip(each, x, strict=True)])
    torch.testing.assert_close(net.functions(weights, x, paired=True), own)
    torch.testing.assert_close(net.functions(each[0], x[0]), one[0])


def test_tied_weights_stay_tied():
    network = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    network[2].weight = network[0].weight
    net = GaussianPriorNet(network)
    weights = net.sample_weights(1, generator=seeded())
    assert len(weights) == 3
    w, b, c = (weights[name][0] for name in ("0.weight", "0.bias", "2.bias"))
    x = normal(4, 2).float()
    torch.testing.assert_close(net.functions(weights, x)[0], (x @ w.T + b).tanh() @ w.T + c)


def test_wrong_weights():
    net = GaussianPriorNet([2, 3, 1])
    weights = net.sample_weights(2)
    with pytest.raises(ValueError, match=r"weights: .*got"):
        net.log_prior({**weights, "more": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"weights: .*0.bias.*got"):
        net.log_prior({**weights, "0.bias": torch.zeros(2, 4)})
    with pytest.raises(ValueError, match=r"weights: .*leading.*got"):
        net.functions({**weights, "0.bias": torch.zeros(3, 3)}, torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"module: .*got"):
        GaussianPriorNet(nn.Tanh())
