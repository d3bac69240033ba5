"""Mixtures of growth curves against SciPy, generalised least squares and Bayes' rule."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp, softmax
from scipy.stats import kstest, multivariate_normal, norm

from torchzoo.moe import BilinearSplineExpert, GrowthMoE, GrowthParams
from torchzoo.moe.growth_curves import (
    TRAJECTORIES,
    bilinear_loadings,
    centred_bilinear_loadings,
    centring,
    condition,
)
from torchzoo.moe.growth_em import solve_means

CURVES = {
    "bilinear": lambda t, g: [t**0, np.minimum(t, g), np.maximum(t - g, 0)],
    "linear": lambda t, g: [t**0, t],
    "quadratic": lambda t, g: [t**0, t, t**2],
    "exponential": lambda t, g: [t**0, 1 - np.exp(-g * t)],
}
"""The columns of the loadings, in NumPy."""


def draws(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def make(k=2, g=2, p=2, *, trajectory="bilinear", tvc=1, shared=False, seed=0):
    """A model of random parameters over times from 0 to 9."""
    torch.manual_seed(seed)
    options = {"trajectory": trajectory, "tvc": tvc, "shared_residual": shared}
    model = GrowthMoE(k, g, p, **options, time_range=(0.0, 9.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
        model.experts.mean.add_(torch.randn(p, dtype=torch.float64))
    return model


def panel(n, j=7, g=2, p=2, q=1, seed=1):
    """Inputs of `forward`, with about a quarter of the occasions missing."""
    generator = torch.Generator().manual_seed(seed)
    t = 9 * torch.rand(n, j, generator=generator, dtype=torch.float64).sort(-1).values
    mask = torch.rand(n, j, generator=generator) > 0.25
    mask[:, :3] = True
    x = draws(n, g + p, seed=seed + 1)
    y, z = draws(n, j, seed=seed + 2), draws(n, j, q, seed=seed + 3)
    return y, t, x[:, :g], x[:, g:], z, mask


def moments(model, k, row, inputs):
    """Mean and covariance of the measured responses of a subject in class k, in NumPy."""
    params = {name: value.detach().numpy() for name, value in model.params()._asdict().items()}
    _, t, _, x, z, mask = (value[row].numpy() for value in inputs)
    gamma = params["gamma"][k].item() if params["gamma"].size else None
    loadings = np.stack(CURVES[model.experts.trajectory_name](t[mask], gamma), 1)
    center = params["alpha"][k] + params["beta"][k] @ (x - model.experts.mean.numpy())
    root = params["scale_tril"][k]
    mean = loadings @ center + z[mask] @ params["kappa"][k]
    cov = loadings @ root @ root.T @ loadings.T + params["theta"][k] * np.eye(mask.sum())
    return mean, cov


def scipy_log_joint(model, inputs):
    """`(n, K)`, subject by subject, with the missing occasions left out."""
    params = model.params()
    logits = params.gate_bias + inputs[2] @ params.gate_weight.T
    weights = np.log(softmax(logits.detach().numpy(), -1))
    y, mask = inputs[0].numpy(), inputs[5].numpy()
    density = [
        [
            multivariate_normal.logpdf(y[row][mask[row]], *moments(model, k, row, inputs))
            for k in range(model.num_classes)
        ]
        for row in range(len(y))
    ]
    return weights + np.array(density)


@pytest.mark.claim(
    41,
    "log_prob equals the mixture of scipy.stats.multivariate_normal, missing occasions left out",
    tolerance=1e-8,
)
@pytest.mark.parametrize("trajectory", CURVES)
@pytest.mark.parametrize("shared", [False, True])
def test_log_prob_is_scipys_mixture(trajectory, shared):
    model, inputs = make(3, trajectory=trajectory, shared=shared), panel(20)
    exact = scipy_log_joint(model, inputs)
    with torch.no_grad():
        np.testing.assert_allclose(model(*inputs).numpy(), logsumexp(exact, -1), atol=1e-8)
        posterior = model.posterior(*inputs).numpy()
        np.testing.assert_allclose(posterior, softmax(exact, -1), atol=1e-8)
        density = model.experts(inputs[0], inputs[1], *inputs[3:]).numpy()
    weights = model.log_weights(inputs[2]).detach().numpy()
    np.testing.assert_allclose(density + weights, exact, atol=1e-8)


@pytest.mark.claim(
    41, "A masked occasion counts as a dropped row, whatever it holds", tolerance=1e-12
)
def test_masked_occasions_are_dropped_rows():
    model, inputs = make(), panel(6)
    y, t, gate_x, expert_x, z, mask = inputs
    blank = ~mask
    holes = (y.masked_fill(blank, math.nan), t.masked_fill(blank, math.nan), gate_x, expert_x)
    holes += (z.masked_fill(blank[..., None], math.nan), mask)
    with torch.no_grad():
        together = model(*holes)
        torch.testing.assert_close(together, model(*inputs), rtol=0, atol=1e-12)
        for row in range(6):
            seen = mask[row]
            alone = model(y[row, seen], t[row, seen], gate_x[row], expert_x[row], z[row, seen])
            torch.testing.assert_close(alone, together[row], rtol=0, atol=1e-12)
    model(*holes).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.claim(
    41,
    "Both parametrisations of the bilinear spline give the same densities, and the slope changes "
    "at the knot only",
    tolerance=1e-9,
)
def test_centred_spline_is_the_same_spline():
    torch.manual_seed(0)
    expert = BilinearSplineExpert(2, 1, time_range=(0.0, 9.0))
    torch.nn.init.normal_(expert.psi_raw, std=0.5)
    torch.nn.init.normal_(expert.beta)
    y, t, _, x, _, mask = panel(20, g=0, p=1, q=0)
    centred, gamma = expert.centred(), expert.params().gamma.detach()
    with torch.no_grad():
        density = expert(y, t, x, mask=mask).numpy()
    for row, k in np.ndindex(20, 2):
        seen, knot = mask[row], gamma[k].item()
        past = t[row, seen].numpy() - knot
        loadings = np.stack([past**0, past, abs(past)], 1)
        mean = (centred.alpha[k] + centred.beta[k] @ x[row]).detach().numpy()
        cov = loadings @ centred.psi[k].detach().numpy() @ loadings.T + np.eye(len(past))
        exact = multivariate_normal.logpdf(y[row, seen].numpy(), loadings @ mean, cov)
        assert density[row, k] == pytest.approx(exact, abs=1e-9)

    eta, knot = torch.tensor([3.0, -2.0, 1.5]).double(), torch.tensor([4.0]).double()
    grid = torch.linspace(0, 9, 91, dtype=torch.float64)
    curve = bilinear_loadings(grid, knot) @ eta
    torch.testing.assert_close(
        centred_bilinear_loadings(grid, knot) @ (centring(knot) @ eta), curve, rtol=0, atol=1e-12
    )
    slopes = curve.diff() / 0.1
    torch.testing.assert_close(slopes[:40], torch.full((40,), -2.0).double())
    torch.testing.assert_close(slopes[40:], torch.full((50,), 1.5).double())
    assert curve[0] == 3.0


@pytest.mark.claim(
    41,
    "For one class without covariates the alpha that maximises the likelihood, other parameters "
    "given, is the generalised least squares estimate",
    tolerance=1e-6,
)
def test_means_are_generalised_least_squares():
    model, inputs = make(1, 0, 0, tvc=0), panel(60, g=0, p=0, q=0)
    normal, moment = np.zeros((3, 3)), np.zeros(3)
    for row in range(60):
        _, cov = moments(model, 0, row, inputs)
        times = inputs[1][row][inputs[5][row]].numpy()
        loadings = np.stack(CURVES["bilinear"](times, model.params().gamma.item()), 1)
        solved = np.linalg.solve(cov, loadings)
        normal += loadings.T @ solved
        moment += solved.T @ inputs[0][row][inputs[5][row]].numpy()
    exact = np.linalg.solve(normal, moment)

    data, params = model.data(*inputs), model.experts.params()
    with torch.no_grad():
        found = solve_means(model.experts.trajectory, params, data, torch.ones(60, 1).double())
        np.testing.assert_allclose(found.alpha[0].numpy(), exact, atol=1e-6)
        model.experts.alpha.copy_(found.alpha)
    model(*inputs).sum().backward()
    np.testing.assert_allclose(model.experts.alpha.grad.numpy(), 0, atol=1e-6)


@pytest.mark.claim(
    41,
    "The full model without effects of its covariates is the finite mixture, and so are the two "
    "models between",
    tolerance=1e-10,
)
def test_nested_models():
    full, inputs = make(3), panel(20)
    y, t, gate_x, expert_x, z, mask = inputs
    with torch.no_grad():
        full.gate_weight.zero_()
        full.experts.beta.zero_()
    state = full.state_dict()
    values = []
    for g, p in ((2, 2), (0, 2), (2, 0), (0, 0)):
        model = GrowthMoE(3, g, p, tvc=1, time_range=(0.0, 9.0))
        model.load_state_dict(
            {
                name: state[name] if state[name].shape == own.shape else own.zero_()
                for name, own in model.state_dict().items()
            }
        )
        given = (gate_x if g else None, expert_x if p else None)
        values.append(model(y, t, *given, z, mask).detach())
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=0, atol=1e-10)
    with torch.no_grad():
        full.gate_weight.fill_(0.5)
    assert not torch.allclose(full(*inputs), values[0])


@pytest.mark.claim(41, "Gradients are finite differences", tolerance=1e-5)
@pytest.mark.parametrize("trajectory", CURVES)
def test_gradients_are_finite_differences(trajectory):
    model, inputs = make(trajectory=trajectory), panel(5)
    model(*inputs).sum().backward()
    for parameter in filter(torch.numel, model.parameters()):
        flat, slope = parameter.data.flatten(), parameter.grad.flatten()
        for index in range(len(flat)):
            ends = []
            for step in (1e-5, -1e-5):
                moved = flat.clone()
                moved[index] += step
                with torch.no_grad():
                    kept = parameter.data
                    parameter.data = moved.view_as(kept)
                    ends.append(model(*inputs).sum().item())
                    parameter.data = kept
            assert slope[index].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-5)


@pytest.mark.claim(41, "Rows of the posterior sum to 1", tolerance=1e-12)
@settings(max_examples=15, deadline=None)
@given(k=st.integers(1, 4), n=st.integers(0, 5), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_posterior_sums_to_one(k, n, scale):
    y, *others = panel(n)
    posterior = make(k).posterior(scale * y, *others)
    assert posterior.shape == (n, k)
    assert (posterior >= 0).all()
    torch.testing.assert_close(posterior.sum(-1), torch.ones(n).double(), rtol=0, atol=1e-12)


@pytest.mark.claim(
    41,
    "Covariances are positive definite and knots stay in their range, whatever the raw parameters",
)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 5))
def test_parameters_stay_valid(seed, scale):
    torch.manual_seed(seed)
    expert = BilinearSplineExpert(2, time_range=(-3.0, 5.0))
    for parameter in expert.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    params = expert.params()
    assert (params.gamma > -2.6).all()  # 5 % of the span from the first time
    assert (params.gamma < 4.6).all()
    assert (params.theta > 0).all()
    diagonal = params.scale_tril.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(params.scale_tril, params.scale_tril.tril(), rtol=0, atol=0)
    assert (diagonal > 0).all()
    if scale < 2:  # beyond, float64 rounds the smallest eigenvalue away
        assert (torch.linalg.eigvalsh(params.psi) > 0).all()


@pytest.mark.claim(
    41,
    "Covariates of the gate change the probabilities of the classes but not their densities, "
    "those of the experts the densities but not the probabilities",
)
def test_gate_and_expert_covariates_are_different_inputs():
    model, (y, t, gate_x, expert_x, z, mask) = make(), panel(10)
    order = torch.arange(9, -1, -1)
    with torch.no_grad():
        before = model.data(y, t, gate_x, expert_x, z, mask)
        for name, changed in (
            ("gate", (gate_x[order], expert_x)),
            ("expert", (gate_x, expert_x[order])),
        ):
            after = model.data(y, t, *changed, z, mask)
            same_prior = torch.equal(
                model.log_weights(after.gate_x), model.log_weights(before.gate_x)
            )
            densities = [model.experts.condition(data).log_density for data in (before, after)]
            assert same_prior == (name == "expert")
            assert torch.equal(*densities) == (name == "gate")
            assert not torch.allclose(
                model.posterior(y, t, *changed, z, mask),
                model.posterior(y, t, gate_x, expert_x, z, mask),
            )


def test_growth_factors_are_the_conditional_mean():
    model, inputs = make(), panel(8)
    weights = softmax(scipy_log_joint(model, inputs), -1)
    params = model.params()
    exact = np.zeros((8, 3))
    for row, k in np.ndindex(8, 2):
        mean, cov = moments(model, k, row, inputs)
        seen = inputs[5][row]
        times = inputs[1][row][seen].numpy()
        loadings = np.stack(CURVES["bilinear"](times, params.gamma[k].item()), 1)
        psi = params.psi[k].detach().numpy()
        x = (inputs[3][row] - model.experts.mean).numpy()
        center = params.alpha[k].detach().numpy() + params.beta[k].detach().numpy() @ x
        gap = inputs[0][row][seen].numpy() - mean
        exact[row] += weights[row, k] * (center + psi @ loadings.T @ np.linalg.solve(cov, gap))
    with torch.no_grad():
        np.testing.assert_allclose(model.growth_factors(*inputs).numpy(), exact, atol=1e-9)


def test_predicted_trajectories_are_the_class_means():
    model, inputs = make(), panel(4)
    full = (*inputs[:5], torch.ones_like(inputs[5]))
    with torch.no_grad():
        curves = model.predict_trajectory(inputs[1], inputs[3], inputs[4]).numpy()
    for row, k in np.ndindex(4, 2):
        np.testing.assert_allclose(curves[row, k], moments(model, k, row, full)[0], atol=1e-12)


def test_samples_follow_the_density():
    model = make()
    _, t, gate_x, expert_x, z, _ = panel(1)
    many = [value.expand(5000, *value.shape[1:]) for value in (t, gate_x, expert_x, z)]
    sample = model.sample(*many, generator=torch.Generator().manual_seed(5))
    inputs = (t, t, gate_x, expert_x, z, torch.ones_like(t, dtype=torch.bool))
    weights = model.log_weights(gate_x)[0].exp().detach().numpy()
    share = (sample.classes == 1).double().mean().item()
    assert share == pytest.approx(weights[1], abs=4 * math.sqrt(weights.prod() / 5000))
    way = np.random.default_rng(0).normal(size=t.shape[1])
    for k in range(2):
        mean, cov = moments(model, k, 0, inputs)
        projected = sample.y[sample.classes == k].numpy() @ way
        assert kstest(projected, norm(way @ mean, math.sqrt(way @ cov @ way)).cdf).pvalue > 0.01
    again = model.sample(*many, generator=torch.Generator().manual_seed(5))
    assert torch.equal(sample.y, again.y)


def test_batched_parameters_are_models_side_by_side():
    models, inputs = [make(seed=seed) for seed in range(3)], panel(5)
    stacked = GrowthParams(*map(torch.stack, zip(*(m.params() for m in models), strict=True)))
    data = models[0].data(*inputs)
    together = condition(TRAJECTORIES["bilinear"], stacked.experts.per_subject(), data).log_density
    for index, model in enumerate(models):
        torch.testing.assert_close(together[index], model.experts.condition(data).log_density)
        weights = stacked.log_weights(data.gate_x)[index]
        torch.testing.assert_close(weights, model.log_weights(data.gate_x))


def test_params_round_trip():
    model, twin, inputs = make(), make(seed=5), panel(5)
    twin.set_params(model.params())
    twin.experts.mean.copy_(model.experts.mean)
    torch.testing.assert_close(twin(*inputs), model(*inputs), rtol=1e-12, atol=0)
    assert not torch.allclose(copy.deepcopy(make(seed=5))(*inputs), model(*inputs))


T5, Y5 = torch.arange(5.0).expand(4, 5), torch.zeros(4, 5)
P = make().params()
BAD = [
    (lambda: GrowthMoE(0), r"num_classes: expected an integer at least 1, got 0"),
    (lambda: GrowthMoE(2, trajectory="cubic"), r"trajectory: expected one of .*got 'cubic'"),
    (lambda: GrowthMoE(2, time_range=(1, 1)), r"time_range: .*increasing, got \(1, 1\)"),
    (lambda: GrowthMoE(2)(Y5, T5[:, :4]), r"y, t: expected both .*\(4, 5\) and \(4, 4\)"),
    (
        lambda: GrowthMoE(2)(Y5, T5, gate_x=torch.zeros(4, 2)),
        r"gate_x: got 2 columns, expected 0",
    ),
    (lambda: GrowthMoE(2, 0, 1)(Y5, T5), r"expert_x: got None, expected \(4, 1\)"),
    (
        lambda: GrowthMoE(2, 0, 1)(Y5, T5, expert_x=torch.zeros(3, 1)),
        r"expert_x: got \(3, 1\), expected \(4, 1\)",
    ),
    (lambda: GrowthMoE(2)(Y5, T5, mask=torch.ones(4, 5)), r"mask: expected bool .*got torch.float"),
    (
        lambda: make().set_params(P._replace(theta=-P.theta)),
        r"params.theta: expected above 0",
    ),
    (
        lambda: make().set_params(P._replace(gamma=P.gamma + 9)),
        r"params.gamma: expected within \(0.45, 8.55\)",
    ),
    (
        lambda: make().set_params(P._replace(gate_bias=P.gate_bias + 1)),
        r"params.gate_bias: expected 0 for the first class",
    ),
    (
        lambda: make().set_params(P._replace(alpha=P.alpha[:1])),
        r"params.alpha: expected \(2, 3\), got \(1, 3\)",
    ),
    (
        lambda: make().set_params(P._replace(gate_weight=P.gate_weight[:1])),
        r"params.gate_weight: expected \(2, 2\), got \(1, 2\)",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
