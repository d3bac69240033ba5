"""What all surrogates share: scaling, joint posteriors, functions, states, botorch."""

import math
import sys

import pytest
import torch

from torchzoo.gp import (
    DKLSurrogate,
    EnsembleSurrogate,
    FunctionSamples,
    GPSurrogate,
    HMCSurrogate,
    InfiniteWidthSurrogate,
    JointGaussian,
    LaplaceSurrogate,
    SGHMCSurrogate,
    Surrogate,
    sample_qei,
)
from torchzoo.testing import assert_within_se


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


MAKERS = {
    "hmc": lambda **k: HMCSurrogate(
        hidden=(5,), num_samples=6, burn_in=4, num_leapfrog=3, pretrain_steps=20, num_chains=2, **k
    ),
    "sghmc": lambda **k: SGHMCSurrogate(hidden=(5,), num_steps=40, burn_in=20, **k),
    "ensemble": lambda **k: EnsembleSurrogate(hidden=(5,), num_nets=4, num_steps=20, **k),
    "laplace": lambda **k: LaplaceSurrogate(hidden=(5,), max_iter=50, **k),
    "laplace, last": lambda **k: LaplaceSurrogate(
        hidden=(5,), structure="last_layer", max_iter=50, **k
    ),
    "laplace, kron": lambda **k: LaplaceSurrogate(hidden=(5,), structure="kron", max_iter=50, **k),
    "dkl": lambda **k: DKLSurrogate(hidden=(5, 3), pretrain_steps=20, num_steps=5, **k),
    "ibnn": InfiniteWidthSurrogate,
    "gp": GPSurrogate,
}
NAMES = list(MAKERS)


def data(*batch, n=8, d=2, m=1, seed=0):
    x = torch.rand(*batch, n, d, dtype=torch.float64, generator=seeded(seed))
    y = (4 * x.sum(-1, keepdim=True) + torch.arange(m)).sin()
    return x, y


def made(name, **options):
    return MAKERS[name](generator=seeded(7), **options)


def same(a, b, **tolerance):
    torch.testing.assert_close(a.mean, b.mean, **tolerance)
    torch.testing.assert_close(a.covariance, b.covariance, **tolerance)
    torch.testing.assert_close(a.observed_variance, b.observed_variance, **tolerance)


@pytest.mark.claim(4, "Seeds give identical fits; saved and loaded predictions are identical")
@pytest.mark.parametrize("name", NAMES)
def test_seeds_and_states(name):
    x, y = data()
    new = torch.rand(3, 2, dtype=torch.float64, generator=seeded(1))
    first, second = made(name).fit(x, y), made(name).fit(x, y)
    assert isinstance(first, Surrogate)
    same(first.posterior(new), second.posterior(new), rtol=0, atol=0)
    third = MAKERS[name](generator=seeded(99))
    third.load_state_dict(first.state_dict())
    same(third.posterior(new), first.posterior(new), rtol=1e-12, atol=1e-12)
    more = torch.cat([x, new]), torch.cat([y, new[:, :1]])
    same(third.fit(*more).posterior(new), first.fit(*more).posterior(new), rtol=0, atol=0)
    draw = first.sample_function(2)(new)
    assert (third.sample_function(2)(new) == draw).all()
    assert first.to("cpu") is first


@pytest.mark.claim(
    4, "Outputs are standardised and put back exactly, inputs scaled by their bounds", 1e-6
)
@pytest.mark.parametrize("name", NAMES)
def test_units(name):
    x, y = data()
    new = torch.rand(3, 2, dtype=torch.float64, generator=seeded(1))
    plain = made(name).fit(x, y).posterior(new)
    low, high = torch.tensor([[-3.0, 10.0], [5.0, 11.0]], dtype=torch.float64)
    moved = made(name, bounds=torch.stack([low, high]))
    found = moved.fit(low + (high - low) * x, 64 * y - 300).posterior(low + (high - low) * new)
    torch.testing.assert_close((found.mean + 300) / 64, plain.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.variance / 64**2, plain.variance, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        found.observed_variance / 64**2, plain.observed_variance, rtol=1e-6, atol=1e-6
    )


def test_constant_outputs():
    x, _ = data()
    found = made("gp").fit(x, torch.full((8, 1), 3.0, dtype=torch.float64)).posterior(x)
    torch.testing.assert_close(found.mean, torch.full_like(found.mean, 3.0))
    one = made("ensemble").fit(x[:1], x[:1, :1])
    assert one.posterior(x).mean.isfinite().all()


@pytest.mark.claim(
    4,
    "Samples are joint: their covariance is `covariance`, and one index serves all points",
    tolerance=4.0,
)
@pytest.mark.parametrize("name", ["hmc", "laplace", "gp"])
def test_joint_samples(name):
    x, y = data(m=2)
    new = torch.rand(3, 2, dtype=torch.float64, generator=seeded(1))
    posterior = made(name).fit(x, y).posterior(new)
    assert posterior.covariance.shape == (2, 3, 3)
    draws = posterior.rsample((20000,), generator=seeded())
    assert draws.shape == (20000, 3, 2)
    assert_within_se(draws, posterior.mean)
    centred = (draws - posterior.mean).mT
    assert_within_se(centred[..., None] * centred[..., None, :], posterior.covariance)
    torch.testing.assert_close(
        posterior.covariance.diagonal(dim1=-2, dim2=-1).mT, posterior.variance
    )
    if name == "hmc":
        known = posterior.values.flatten(1)
        assert all((row == known).all(1).any() for row in draws[:50].flatten(1))


@pytest.mark.parametrize("name", NAMES)
def test_functions(name):
    """Drawn functions keep their values, have those of the posterior, and take any shape."""
    x, y = data()
    surrogate = made(name).fit(x, y)
    new = torch.rand(4, 2, 3, 2, dtype=torch.float64, generator=seeded(1))
    f = surrogate.sample_function(3)
    whole = f(new)
    assert whole.shape == (3, 4, 2, 3, 1)
    scale = float(surrogate.posterior(new).variance.mean().sqrt())
    torch.testing.assert_close(f(new[2, 1]), whole[:, 2, 1], rtol=0, atol=2e-2 * scale + 1e-3)
    if name not in ("hmc", "sghmc", "ensemble"):
        point = new[0, 0, :1]
        draws = surrogate.sample_function(4000)(point)[:, 0]
        expected = surrogate.posterior(point)
        assert_within_se(draws, expected.mean[0])
        assert_within_se((draws - expected.mean[0]) ** 2, expected.variance[0] + 1e-8)
    with pytest.raises(ValueError, match="n: expected"):
        surrogate.sample_function(0)


@pytest.mark.parametrize("name", ["ensemble", "laplace", "laplace, kron", "dkl", "ibnn", "gp"])
def test_batches(name):
    """Problems side by side; the shapes of extra dimensions; gradients by the points."""
    x, y = data(3, m=2)
    surrogate = made(name).fit(x, y)
    new = torch.rand(5, 3, 4, 2, dtype=torch.float64, generator=seeded(1))
    found = surrogate.posterior(new)
    assert found.mean.shape == found.observed_variance.shape == (5, 3, 4, 2)
    assert found.covariance.shape == (5, 3, 2, 4, 4)
    torch.testing.assert_close(surrogate.posterior(new[2]).mean, found.mean[2])
    torch.testing.assert_close(surrogate.posterior(new[2]).variance, found.variance[2])
    assert surrogate.sample_function(2)(new).shape == (2, 5, 3, 4, 2)
    if name == "ibnn":  # two parameters: both searches end at the same ones
        for index in range(3):
            alone = made(name).fit(x[index], y[index]).posterior(new[1, index])
            torch.testing.assert_close(alone.mean, found.mean[1, index], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(
                alone.variance, found.variance[1, index], rtol=1e-3, atol=1e-6
            )
    leaf = new[0].clone().requires_grad_()
    surrogate.posterior(leaf).mean.sum().backward()
    step = 1e-5 * torch.eye(2, dtype=leaf.dtype)[0]
    change = surrogate.posterior(new[0] + step).mean - surrogate.posterior(new[0] - step).mean
    torch.testing.assert_close(
        leaf.grad[..., 0], change.sum(-1).detach() / 2e-5, rtol=1e-4, atol=1e-5
    )


def test_densities():
    values = torch.tensor([[[0.0]], [[2.0]]], dtype=torch.float64)
    mixture = FunctionSamples(values, 0.25)
    gauss = lambda y, m, v: math.exp(-((y - m) ** 2) / (2 * v)) / math.sqrt(2 * math.pi * v)  # noqa: E731
    y = torch.tensor([[0.5]], dtype=torch.float64)
    expected = math.log((gauss(0.5, 0, 0.25) + gauss(0.5, 2, 0.25)) / 2)
    assert float(mixture.log_prob(y)) == pytest.approx(expected)
    assert float(mixture.observed_variance) == pytest.approx(1.25)
    joint = JointGaussian(y - 0.2, torch.full((1, 1, 1), 0.5, dtype=torch.float64), 0.3)
    assert float(joint.log_prob(y)) == pytest.approx(math.log(gauss(0.2, 0, 0.8)))


@pytest.mark.claim(4, "In botorch, qEI is the one-line formula on the same samples", 1e-9)
def test_botorch_qei():
    botorch = pytest.importorskip("botorch", reason="needs torchzoo[gp]")
    from botorch.sampling.index_sampler import IndexSampler

    x, y = data()
    new = torch.rand(5, 3, 2, dtype=torch.float64, generator=seeded(1))
    surrogate = made("hmc").fit(x, y)
    sampler = IndexSampler(torch.Size([500]), seed=0)
    model = surrogate.as_botorch_model()
    acquisition = botorch.acquisition.qExpectedImprovement(model, best_f=0.5, sampler=sampler)
    found = acquisition(new)
    values = surrogate.posterior(new).values[..., 0]
    values = values[sampler.base_samples, torch.arange(5)]
    torch.testing.assert_close(found, sample_qei(values, 0.5), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="observation_noise: expected"):
        model.posterior(new, observation_noise=True)


def test_botorch_models(monkeypatch):
    botorch = pytest.importorskip("botorch", reason="needs torchzoo[gp]")
    x, y = data(m=2)
    new = torch.rand(4, 3, 2, dtype=torch.float64, generator=seeded(1))
    for name in ("ensemble", "gp"):
        surrogate = made(name).fit(x, y)
        model, own = surrogate.as_botorch_model(), surrogate.posterior(new)
        assert (model.num_outputs, model.batch_shape) == (2, ())
        found = model.posterior(new)
        torch.testing.assert_close(found.mean, own.mean)
        assert found.rsample(torch.Size([6])).shape == (6, 4, 3, 2)
        one = model.posterior(new, output_indices=[1])
        torch.testing.assert_close(one.mean, own.mean[..., 1:])
    torch.testing.assert_close(found.variance, own.variance)
    noisy = model.posterior(new, observation_noise=True)
    torch.testing.assert_close(noisy.variance, own.observed_variance)
    reference = torch.tensor([-3.0, -3.0], dtype=torch.float64)
    parts = botorch.utils.multi_objective.box_decompositions.NondominatedPartitioning(
        ref_point=reference, Y=torch.empty(0, 2, dtype=torch.float64)
    )
    volume = botorch.acquisition.multi_objective.qExpectedHypervolumeImprovement(
        model, reference, parts, sampler=botorch.sampling.SobolQMCNormalSampler(torch.Size([64]))
    )
    draws = own.rsample((4096,), generator=seeded())[:, :, :1]
    expected = (draws - reference).clamp_min(0).prod(-1).mean((0, 2))
    torch.testing.assert_close(volume(new[:, :1]), expected, rtol=0.05, atol=0)
    monkeypatch.setitem(sys.modules, "torchzoo.gp._botorch", None)
    with pytest.raises(ImportError, match=r"torchzoo\[gp\]"):
        surrogate.as_botorch_model()


@pytest.mark.parametrize(
    ("x", "y", "name"),
    [
        (torch.zeros(4), torch.zeros(4, 1), "X"),
        (torch.zeros(0, 2), torch.zeros(0, 1), "X"),
        (torch.zeros(4, 2), torch.zeros(4), "Y"),
        (torch.zeros(4, 2), torch.zeros(5, 1), "Y"),
        (torch.zeros(4, 2), torch.zeros(4, 0), "Y"),
        (torch.full((4, 2), math.nan), torch.zeros(4, 1), "X"),
        (torch.zeros(4, 2), torch.full((4, 1), math.inf), "Y"),
        (torch.zeros(4, 3), torch.zeros(4, 1), "X"),
    ],
)
def test_bad_data(x, y, name):
    surrogate = GPSurrogate(bounds=torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    with pytest.raises(ValueError, match=f"{name}: expected"):
        surrogate.fit(x, y)


def test_bad_calls():
    for call in (
        lambda s: s.posterior(torch.zeros(1, 2)),
        lambda s: s.sample_function(1),
        lambda s: s.state_dict(),
        lambda s: s.as_botorch_model(),
    ):
        with pytest.raises(RuntimeError, match="call fit first"):
            call(made("ensemble"))
    with pytest.raises(ValueError, match="X: expected"):
        made("gp").fit(*data()).posterior(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="state: expected"):
        made("gp").load_state_dict({"x": torch.zeros(1, 1)})
    with pytest.raises(ValueError, match="bounds: expected"):
        GPSurrogate(bounds=torch.tensor([[0.0], [0.0]]))


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        (HMCSurrogate, {"hidden": (0,)}, "hidden"),
        (HMCSurrogate, {"prior_var": 0.0}, "prior_var"),
        (HMCSurrogate, {"noise_var": -1.0}, "noise_var"),
        (HMCSurrogate, {"num_chains": 0}, "num_chains"),
        (HMCSurrogate, {"pretrain_steps": -1}, "pretrain_steps"),
        (HMCSurrogate, {"grid": [(1.0, 0.0)]}, "grid"),
        (SGHMCSurrogate, {"burn_in": 1999}, "burn_in"),
        (SGHMCSurrogate, {"num_chains": 0}, "num_chains"),
        (EnsembleSurrogate, {"num_nets": 0}, "num_nets"),
        (EnsembleSurrogate, {"fraction": 0.0}, "fraction"),
        (LaplaceSurrogate, {"structure": "diag"}, "structure"),
        (LaplaceSurrogate, {"hidden": (0,)}, "hidden"),
        (LaplaceSurrogate, {"noise_var": 0.0}, "noise_var"),
        (DKLSurrogate, {"hidden": (0,)}, "hidden"),
        (DKLSurrogate, {"num_steps": -1}, "num_steps"),
        (GPSurrogate, {"max_iter": 0}, "max_iter"),
        (InfiniteWidthSurrogate, {"activation": "tanh"}, "activation"),
        (InfiniteWidthSurrogate, {"depth": -1}, "depth"),
    ],
)
def test_bad_options(kind, options, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        kind(**options)
