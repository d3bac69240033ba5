"""The emergence curve against a fine grid, its own draws, and ordinary least squares."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchzoo.sparsity import EmergenceCurve, EmergenceParams, EmergencePredictor
from torchzoo.sparsity import emergence as unit
from torchzoo.sparsity.emergence_predictor import Architecture, architecture_features

KNOWN = EmergenceParams(A=50, lam=0.3, gamma=0.02, t0=1.1, K=20)
STEPS = np.unique(np.geomspace(1, 400, 54).round())[:40]


def draw(generator):
    """A curve with its turn, if it has one, before, among or after the steps."""
    first = math.exp(generator.uniform(math.log(0.3), math.log(3)))
    span = math.exp(generator.uniform(math.log(5), math.log(500)))
    decay = math.exp(generator.uniform(math.log(0.1), math.log(10)))
    gamma = first * (span - 1) / (STEPS[-1] - STEPS[0])
    lam = decay / (gamma * (STEPS[-1] - STEPS[0])) * (generator.random() < 0.8)
    amplitude = generator.uniform(10, 200) * generator.choice([1, 1, -1])
    return EmergenceParams(
        amplitude, lam, gamma, first - gamma * STEPS[0], generator.uniform(5, 50)
    )


@pytest.mark.claim(
    57, "The peak is where the curve is largest on a fine grid, and its slope 0", tolerance=1e-9
)
def test_peak():
    curve = EmergenceCurve(KNOWN)
    peak = curve.peak()
    assert peak.kind == "maximum"
    assert peak.t == pytest.approx(95.8921, abs=5e-5)
    assert peak.value == pytest.approx(42.3338, abs=5e-5)
    grid = torch.linspace(0, 400, 400_001, dtype=torch.float64)
    values = curve.predict(grid)
    assert grid[values.argmax()].item() == pytest.approx(peak.t, abs=1e-3)
    assert abs(curve.derivative(peak.t).item()) < 1e-9
    by_hand = 50 * np.exp(-0.3 * (0.02 * 7 + 1.1)) * np.log(0.02 * 7 + 1.1) + 20
    assert curve.predict([7.0]).item() == pytest.approx(by_hand, rel=1e-14)


@pytest.mark.claim(57, "The slope is that of finite differences", tolerance=1e-7)
@given(seed=st.integers(0, 10**6), t=st.floats(2, 390))
@settings(max_examples=50, deadline=None)
def test_derivative(seed, t):
    curve = EmergenceCurve(draw(np.random.default_rng(seed)))
    low, high = curve.predict([t - 1e-4, t + 1e-4]).tolist()
    scale = abs(curve.params.A)
    assert curve.derivative(t).item() == pytest.approx((high - low) / 2e-4, abs=1e-7 * scale)


@pytest.mark.claim(57, "Without decay there is no finite peak; a falling curve has a minimum")
def test_peaks_of_other_shapes():
    for lam in (0.0, 5e-324):
        peak = EmergenceCurve(KNOWN._replace(lam=lam)).peak()
        assert math.isinf(peak.t)
        assert peak.kind == "none"
    assert EmergenceCurve(KNOWN._replace(lam=1e-8)).peak().t > 1e6
    falling = EmergenceCurve(KNOWN._replace(A=-50)).peak()
    assert falling.kind == "minimum"
    assert falling.t == EmergenceCurve(KNOWN).peak().t
    assert falling.value == pytest.approx(2 * 20 - 42.33379898667855, rel=1e-12)
    assert EmergenceCurve(KNOWN._replace(A=0.0)).peak().kind == "none"


def test_limit_and_regime():
    assert EmergenceCurve(KNOWN).limit == 20
    assert EmergenceCurve(KNOWN._replace(lam=0.0)).limit == math.inf
    assert EmergenceCurve(KNOWN._replace(lam=0.0, A=-1.0)).limit == -math.inf
    assert EmergenceCurve(KNOWN).regime == "early peak"
    assert EmergenceCurve(KNOWN, measured=(0, 90, 9)).regime == "log increase"
    assert EmergenceCurve(KNOWN, measured=(100, 400, 9)).regime == "decrease"
    assert EmergenceCurve(KNOWN._replace(lam=0.0)).regime == "log increase"
    assert EmergenceCurve(KNOWN._replace(A=-1.0)).regime == "decrease"
    # the peak lies before training begins
    assert EmergenceCurve(KNOWN._replace(t0=9.0)).regime != "early peak"


@pytest.mark.claim(
    57,
    "Curves without noise are fitted with R² above 0.9999, peaks among the data within 1 %, "
    "falling ones too",
    tolerance=0.01,
)
def test_exact_curves_are_found():
    generator = np.random.default_rng(1)
    shapes = set()
    for _ in range(50):
        curve = EmergenceCurve(draw(generator))
        r = curve.predict(STEPS)
        fit = EmergenceCurve.fit(STEPS, r, restarts=8)
        assert fit.r2 > 0.9999
        truth, found = curve.peak(), fit.peak()
        if STEPS[0] < truth.t < STEPS[-1]:
            assert found.t == pytest.approx(truth.t, rel=0.01)
            assert found.kind == truth.kind
            shapes.add(truth.kind)
        rmse = (fit.predict(STEPS) - r).square().mean().sqrt()
        assert rmse < 0.011 * r.std()
    assert shapes == {"maximum", "minimum"}


@pytest.mark.claim(
    57,
    "From noisy measurements the true curve is found to half the noise, root mean square",
    tolerance=0.5,
)
def test_noise_is_averaged_out():
    generator, errors = np.random.default_rng(2), []
    for _ in range(50):
        r = EmergenceCurve(draw(generator)).predict(STEPS).numpy()
        sigma = 0.1 * r.std()
        fit = EmergenceCurve.fit(STEPS, r + sigma * generator.standard_normal(len(r)), restarts=4)
        errors.append(np.mean((fit.predict(STEPS).numpy() - r) ** 2) / sigma**2)
    assert math.sqrt(np.mean(errors)) < 0.5
    assert math.sqrt(np.mean(errors)) > 0.2  # five parameters do cost something


@pytest.mark.claim(
    57, "For given λ, γ and t0, A and K are those of ordinary least squares", tolerance=1e-8
)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_linear_part(seed):
    generator = np.random.default_rng(seed)
    _, lam, gamma, t0, _ = draw(generator)
    r = generator.standard_normal(len(STEPS)) * 20
    x = gamma * STEPS + t0
    columns = np.stack([np.exp(-lam * x) * np.log(x), np.ones_like(x)], -1)
    expected = np.linalg.lstsq(columns, r, rcond=None)[0]
    found = unit.solve_linear(STEPS, r, lam, gamma, t0)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)


def test_the_fit_is_a_minimum_and_repeatable():
    generator = np.random.default_rng(4)
    r = EmergenceCurve(KNOWN).predict(STEPS).numpy() + generator.standard_normal(len(STEPS))
    params, r2, covariance = fit = EmergenceCurve.fit(STEPS, r)
    assert fit.params == EmergenceCurve.fit(STEPS, r).params == params
    squares = ((fit.predict(STEPS).numpy() - r) ** 2).sum()
    assert r2 == pytest.approx(1 - squares / ((r - r.mean()) ** 2).sum())
    assert fit.noise == pytest.approx(math.sqrt(squares / (len(r) - 5)))
    assert covariance.shape == (5, 5)
    for field in params._fields:
        for factor in (0.999, 1.001):
            other = EmergenceCurve(params._replace(**{field: getattr(params, field) * factor}))
            assert ((other.predict(STEPS).numpy() - r) ** 2).sum() >= squares
    # at once linear in time and in its logarithm, starts spread over t find as much
    assert EmergenceCurve.fit(STEPS, r, log_time=False).r2 == pytest.approx(r2, abs=1e-3)


@pytest.mark.claim(57, "Forecast intervals cover new measurements as often as they say")
def test_forecasts():
    generator, inside, widths = np.random.default_rng(5), [], []
    truth = EmergenceCurve(KNOWN._replace(gamma=0.05)).predict(STEPS).numpy()
    for _ in range(30):
        r = truth + 0.5 * generator.standard_normal(len(STEPS))
        fit = EmergenceCurve.fit(STEPS[:34], r[:34], restarts=4)
        mean, low, high = fit.forecast(STEPS[34:], level=0.9)
        torch.testing.assert_close(mean, fit.predict(STEPS[34:]))
        inside.append(((low.numpy() <= r[34:]) & (r[34:] <= high.numpy())).mean())
        widths.append(float((high - low).mean()))
    assert 0.8 < np.mean(inside) < 0.97
    assert np.median(widths) < 6  # 1.64 standard deviations to both sides would be 1.64


@pytest.mark.claim(57, "Parameters that follow a power of the features are predicted")
def test_prediction_from_the_architecture():
    archs = [
        Architecture(layer, depth, width, heads, 4 * width)
        for depth in (2, 3, 4)
        for width in (32, 64, 128)
        for heads in (2, 4)
        for layer in range(1, depth + 1)
    ]
    features = torch.stack([architecture_features(*arch) for arch in archs]).numpy()
    scores = (features - features.mean(0)) @ np.linspace(-0.3, 0.3, features.shape[1])
    params = np.stack(
        [-np.expm1(2 + scores / 9), *(np.expm1(1 + scores / d) for d in (9, 20, 10)), 5 * scores],
        -1,
    )
    held = np.arange(len(archs)) % 5 == 0
    kept = [arch for arch, out in zip(archs, held, strict=True) if not out]
    predictor = EmergencePredictor(ridge=1e-6).fit(kept, params[~held])
    out = [arch for arch, out in zip(archs, held, strict=True) if out]
    found = predictor.predict(out).numpy()
    # log1p makes the first four linear in the features; K passes through a power transform
    np.testing.assert_allclose(found[:, :4], params[held][:, :4], rtol=1e-4)
    residual = ((found[:, 4] - params[held][:, 4]) ** 2).sum()
    assert residual < 0.02 * ((params[held][:, 4] - params[~held][:, 4].mean()) ** 2).sum()


def test_features_and_other_estimators():
    from sklearn.linear_model import LinearRegression

    expected = [3 / 4, math.sqrt(0.75), 9 / 16, 27 / 64, 2 / 16, 5.0, 4.0, 0.5, math.log(16), 12.0]
    assert architecture_features(3, 4, 16, 2, 80).tolist() == pytest.approx(expected)
    archs = [(1, 1, d, 2, 4 * d) for d in (8, 16, 32)]
    finals = [2.0, 3.0, 5.0]
    predictor = EmergencePredictor(LinearRegression()).fit(archs, finals)
    assert predictor.predict(archs).tolist() == pytest.approx(finals, rel=0.05)


@pytest.mark.parametrize(
    ("t", "r", "message"),
    [
        (range(7), range(8), "one length"),
        (range(5), range(5), "at least 6"),
        ([0, 1, 2, 3, 3, 4], range(6), "increasing"),
        (range(6), [0, 1, 2, math.nan, 4, 5], "r: expected finite"),
        (np.zeros((6, 1)), np.zeros((6, 1)), "one length"),
    ],
)
def test_bad_measurements(t, r, message):
    with pytest.raises(ValueError, match=message):
        EmergenceCurve.fit(np.asarray(t, dtype=float), np.asarray(r, dtype=float))


def test_bad_arguments():
    good = np.arange(6.0)
    for call, message in (
        (lambda: EmergenceCurve.fit(good, good, restarts=0), "restarts"),
        (lambda: EmergenceCurve(KNOWN._replace(lam=-1.0)), "lam"),
        (lambda: EmergenceCurve(KNOWN._replace(gamma=0.0)), "gamma"),
        (lambda: EmergenceCurve(KNOWN).forecast([1.0]), "fitted"),
        (lambda: EmergenceCurve.fit(good, good).forecast([1.0], level=1.0), "level"),
        (lambda: EmergencePredictor(ridge=-1.0), "ridge"),
        (lambda: EmergencePredictor().predict([(1, 1, 8, 2, 32)]), "fit first"),
        (lambda: EmergencePredictor().fit([(1, 1, 8, 2, 32)] * 2, [1.0]), "one length"),
        (lambda: EmergencePredictor().fit([(1, 1, 8, 2, 32)] * 2, [[1.0], [2.0]]), "params"),
        (lambda: architecture_features(3, 2, 8, 2, 32), "l: expected 1 to L = 2"),
        (lambda: architecture_features(1, 2, 8, 0, 32), "H: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_constant_is_fitted():
    fit = EmergenceCurve.fit(STEPS, np.full(len(STEPS), 3.0))
    assert fit.r2 == 1
    assert fit.predict(STEPS).tolist() == pytest.approx([3.0] * len(STEPS))
