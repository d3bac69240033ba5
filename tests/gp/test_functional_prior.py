"""Matching priors to Gaussian processes against exact distances and an exactly solvable network."""

import math

import gpytorch
import pytest
import torch
from torch import nn

from torchzoo.gp import (
    FlowPriorNet,
    FunctionalPriorTuner,
    GaussianPriorNet,
    HierarchicalPriorNet,
    LipschitzCritic,
    fit_critic,
    gp_prior,
    measurement_sets,
    rbf_prior,
    wasserstein_1,
)
from torchzoo.testing import assert_within_se


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def linear_tuner(s_w, s_b, *, start=1.0, num_samples=256, **options):
    """Tune one linear layer, whose functions are a Gaussian process with a linear kernel."""
    net = GaussianPriorNet(nn.Linear(1, 1), init_std=start)
    kernel = lambda x, y: s_b**2 + s_w**2 * x @ y.mT  # noqa: E731
    tuner = FunctionalPriorTuner(
        net,
        gp_prior(kernel, generator=seeded(1)),
        measurement_sets(torch.tensor([[-2.0], [2.0]]), share=0.0, generator=seeded(2)),
        num_samples=num_samples,
        num_measure=6,
        generator=seeded(3),
        **options,
    )
    tuner.critic_options["hidden"] = 24
    return net, tuner


@pytest.mark.claim(
    13, "One linear layer tuned to a linear kernel finds its standard deviations", tolerance=0.1
)
def test_linear_layer_is_recovered():
    net, tuner = linear_tuner(
        1.5, 1.2, start=0.7, num_samples=1500, outer_lr=0.05, inner_steps=15, inner_lr=0.1,
        lipschitz="lp",
    )  # fmt: skip
    tuner.critic_options["hidden"] = 16
    tuner.fit(30)
    tuner.optimizer.param_groups[0]["lr"] = 0.0125
    found = []
    for _ in range(20):
        tuner.step()
        found.append(net.std.detach().clone())
    std = torch.stack(found).mean(0)
    assert abs(std[0].item() / 1.5 - 1) < 0.1
    assert abs(std[1].item() / 1.2 - 1) < 0.1


@pytest.mark.claim(
    13, "Steps lower the distance, from priors too wide and from priors too narrow", tolerance=None
)
@pytest.mark.parametrize(("start", "sign"), [(3.0, -1), (0.3, 1)])
def test_steps_move_to_the_target(start, sign):
    net, tuner = linear_tuner(1.0, 1.0, start=start, outer_lr=0.1, inner_steps=12, inner_lr=0.1)
    before = net.std.detach().clone()
    distances = tuner.fit(5)
    assert distances[2:].mean() < 0.8 * distances[0]
    assert (sign * (net.std - before) > 0.05).all()


@pytest.mark.claim(
    13, "The distance of centred normal distributions is |a - b| E|z|", tolerance=0.1
)
@pytest.mark.parametrize(("a", "b"), [(1.0, 2.0), (2.0, 1.0)])
def test_distance_in_closed_form(a, b):
    z = normal(1500, 1)  # for both, so that noise cancels, but not paired
    found = wasserstein_1(
        a * z, b * z.roll(1, 0), steps=200, lr=0.08, lipschitz="lp", hidden=32, generator=seeded()
    )
    assert found.item() == pytest.approx(math.sqrt(2 / math.pi), rel=0.1)


@pytest.mark.claim(13, "Functions of one process are at distance 0 from each other", tolerance=None)
def test_no_distance_from_itself():
    x = torch.linspace(-1, 1, 8)[:, None]
    sampler = rbf_prior(0.5, generator=seeded())
    distances = [
        wasserstein_1(sampler(x, 200), sampler(x, 200), steps=15, hidden=16, generator=seeded(i))
        for i in range(8)
    ]
    assert_within_se(torch.stack(distances), 0.0)
    apart = wasserstein_1(sampler(x, 200), 3 + sampler(x, 200), steps=60, lr=0.1, hidden=16)
    assert apart > 4


@pytest.mark.claim(
    13, "The critic sees values alone: their order makes no difference to the estimate",
    tolerance=None,
)  # fmt: skip
def test_order_of_measurements():
    x = torch.linspace(-1, 1, 6)[:, None]
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    one, two = rbf_prior(0.5, generator=seeded()), rbf_prior(0.5, 4.0, generator=seeded(1))
    pairs = []
    for seed in range(5):
        draws = [sampler(x, 300) for sampler in (one, two)]
        pairs.append(
            [
                wasserstein_1(*[d[:, p] for d in draws], steps=20, lr=0.1, hidden=16,
                              lipschitz="lp", generator=seeded(10 * seed + k))
                for k, p in enumerate((torch.arange(6), order))
            ]
        )  # fmt: skip
    found = torch.tensor(pairs)
    assert found.mean() > 0.3
    assert_within_se(found[:, 0] - found[:, 1], 0.0)


@pytest.mark.claim(
    13, "Each step has a critic of its own, and neither side gets the other's gradients",
    tolerance=None,
)  # fmt: skip
def test_critics_are_new_and_gradients_apart(monkeypatch):
    net, tuner = linear_tuner(1.0, 1.0, inner_steps=3)
    starts = []
    reset = LipschitzCritic.reset_parameters

    def spy(self, generator=None):
        reset(self, generator)
        if generator is not None:
            starts.append((self, self.first.weight.detach().clone()))

    monkeypatch.setattr(LipschitzCritic, "reset_parameters", spy)
    tuner.fit(2)
    (first, a), (second, b) = starts
    assert first is not second
    assert not torch.equal(a, b)
    assert not torch.equal(first.first.weight, a)
    assert not any(p.requires_grad for p in second.parameters())
    assert net.raw_std.grad is None
    fake = net.sample_functions(torch.ones(6, 1), 4)[..., 0]
    fit_critic(normal(4, 6), fake, steps=2, hidden=8)
    assert net.raw_std.grad is None


def test_start_of_critics():
    critic = LipschitzCritic(100, hidden=200)
    critic.reset_parameters(seeded())
    assert critic.first.weight.std().item() == pytest.approx(math.sqrt(2 / 300), rel=0.05)
    assert critic.second.bias.std().item() == pytest.approx(1, rel=0.2)
    f = normal(3, 100)
    hidden = (critic.first(f).exp() + 1).log()
    expected = critic.last((critic.second(hidden).exp() + 1).log())[:, 0]
    torch.testing.assert_close(critic(f), expected)


@pytest.mark.parametrize("kind", [HierarchicalPriorNet, FlowPriorNet])
def test_other_priors_and_several_outputs(kind):
    net = kind([1, 4, 2])
    before = [p.detach().clone() for p in net.parameters()]
    tuner = FunctionalPriorTuner(
        net, gpytorch.kernels.RBFKernel(), measurement_sets(normal(9, 1)), num_samples=8,
        num_measure=5, inner_steps=2, generator=seeded(),
    )  # fmt: skip
    assert tuner.fit(2).isfinite().all()
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_gaussian_process_draws():
    x = normal(4, 2).double()
    kernel = gpytorch.kernels.RBFKernel(ard_num_dims=2)
    kernel.lengthscale = torch.tensor([0.7, 1.5])
    expected = 2.0 * kernel(x).to_dense().detach() + 0.3 * torch.eye(4)
    samplers = [
        rbf_prior(torch.tensor([0.7, 1.5]), 2.0, noise=0.3, generator=seeded()),
        gp_prior(lambda a, b: 2 * kernel(a, b).to_dense(), noise=0.3, generator=seeded()),
    ]
    for sampler in samplers:
        f = sampler(x, 20000)
        assert_within_se(f[:, :, None] * f[:, None], expected)
    f = rbf_prior(0.5, 2.0, spread=0.5, generator=seeded())(x[:1], 100000)
    assert_within_se(f.square(), 2 * math.exp(0.5**2 / 2))
    far = torch.tensor([[0.0], [1.0]]).double()
    f = rbf_prior(1.0, 1.0, spread=0.5, generator=seeded())(far, 100000)
    z = torch.linspace(-8, 8, 4001).double()
    weight = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    mean = torch.trapezoid(
        (-(-z).exp() / 2).exp() * weight, z
    )  # of exp(-l^-2 / 2), log l ~ N(0, .25)
    assert_within_se(f.prod(1), mean * math.exp(0.5**2 / 2))


def test_measurement_sets():
    x = torch.tensor([[0.0, 10.0], [1.0, 30.0], [0.5, 20.0]])
    sets = measurement_sets(x, share=0.5, generator=seeded())
    found = sets(4)
    assert found.shape == (4, 2)
    assert all((x == row).all(1).any() for row in found[:2])
    assert ((found >= x.amin(0)) & (found <= x.amax(0))).all()
    assert not torch.equal(found, sets(4))
    many = measurement_sets(x, generator=seeded())(1000)
    assert ((many[:, None] == x).all(-1).any(1)).sum() == 3
    assert_within_se(many[3:], torch.tensor([0.5, 20.0]))


def test_what_samplers_give_is_checked():
    net, tuner = linear_tuner(1.0, 1.0, inner_steps=1)
    x = torch.ones(6, 1)
    tuner.gp_sampler = lambda x, n: torch.full((n, len(x)), math.nan)
    with pytest.raises(ValueError, match=r"gp_sampler: .*finite"):
        tuner.step()
    tuner.gp_sampler = lambda x, n: torch.zeros(n, len(x) + 1)
    with pytest.raises(ValueError, match=r"gp_sampler: .*\(256, 6\), got \(256, 7\)"):
        tuner.step()
    tuner.measurement_sampler = lambda count: x[:5]
    with pytest.raises(ValueError, match=r"measurement_sampler: .*6.*got \(5, 1\)"):
        tuner.step()
    with pytest.raises(ValueError, match=r"lipschitz: .*got"):
        FunctionalPriorTuner(net, rbf_prior(1.0), measurement_sets(x), lipschitz="clip")
