"""Estimation of mixtures of growth curves: monotone steps, one maximum, honest standard errors."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import norm
from sklearn.base import clone
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV, KFold

from torchzoo.moe import (
    GrowthMoE,
    GrowthMoERegressor,
    GrowthParams,
    compare_models,
    fit_growth_moe,
    sem_forest_importance,
)
from torchzoo.moe.growth_em import expectation_maximisation, update_gate
from torchzoo.moe.growth_fitting import _scores
from torchzoo.moe.growth_result import QUANTILE, objective, relative_entropy
from torchzoo.moe.growth_starts import initial_params, shape_bounds
from torchzoo.moe.sem_forest import best_split, forest_drops

CURVES = ("bilinear", "linear", "quadratic", "exponential")


def known(trajectory="bilinear"):
    """Two classes; the gate has two covariates, the experts one."""

    def make(values):
        return torch.tensor(values, dtype=torch.float64)

    alpha = {
        "bilinear": [[5.0, 2.0, -1.0], [5.0, 1.0, 1.5]],
        "linear": [[5.0, -2.0], [5.0, 1.5]],
        "quadratic": [[5.0, -2.0, 0.1], [5.0, 1.0, -0.2]],
        "exponential": [[0.0, 6.0], [1.0, -5.0]],
    }[trajectory]
    gamma = {"bilinear": [[2.5], [4.5]], "exponential": [[0.4], [0.9]]}
    d = len(alpha[0])
    tril = torch.eye(d, dtype=torch.float64) * 0.5
    tril[1, 0] = 0.2
    return GrowthParams(
        gate_bias=make([0.0, 0.3]),
        gate_weight=make([[0.0, 0.0], [1.0, -0.5]]),
        gamma=make(gamma.get(trajectory, [[], []])),
        alpha=make(alpha),
        beta=make([[0.5] * d, [-0.3] * d])[..., None],
        scale_tril=torch.stack([tril, 0.8 * tril]),
        theta=make([0.2, 0.3]),
        kappa=make([[], []]),
    )


def panel(n, trajectory="bilinear", seed=0, j=8):
    """Arguments of a fit, and the true classes."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(j, dtype=torch.float64).repeat(n, 1)
    t[:, 1:-1] += 0.5 * torch.rand(n, j - 2, generator=generator, dtype=t.dtype) - 0.25
    x = torch.randn(n, 3, generator=generator, dtype=t.dtype)
    model = GrowthMoE(2, 2, 1, trajectory=trajectory, time_range=(0.0, j - 1.0))
    model.set_params(known(trajectory))
    mask = torch.rand(n, j, generator=generator) > 0.15
    mask[:, [0, 3, -1]] = True
    sample = model.sample(t, x[:, :2], x[:, 2:], generator=generator)
    inputs = {"y": sample.y, "t": t, "gate_x": x[:, :2], "expert_x": x[:, 2:], "mask": mask}
    return inputs, sample.classes


def climb(model, inputs, start, **options):
    return expectation_maximisation(
        model.experts.trajectory,
        start,
        model.data(**inputs),
        bounds=shape_bounds(model),
        **options,
    )


@pytest.mark.claim(
    41, "EM never decreases the log-likelihood from one iteration to the next", tolerance=1e-8
)
@pytest.mark.parametrize("trajectory", CURVES)
@pytest.mark.parametrize("shared", [False, True])
def test_em_is_monotone(trajectory, shared):
    inputs, _ = panel(80, trajectory)
    inputs["tvc_x"] = torch.randn(80, 8, 1, dtype=torch.float64)
    model = GrowthMoE(
        2, 2, 1, trajectory=trajectory, shared_residual=shared, tvc=1, time_range=(0.0, 7.0)
    )
    start = initial_params(model, model.data(**inputs), 3, 0)
    found = climb(model, inputs, start, shared_residual=shared, max_iter=25, tol=0.0)
    assert found.trace.shape[1:] == (3,)
    assert found.trace.diff(dim=0).min() >= -1e-8
    assert (found.trace[-1] - found.trace[0] > 1).all()
    for index in range(3):  # each of the fits at once is the one it is alone
        model.set_params(GrowthParams(*(value[index] for value in found.params)))
        assert model(**inputs).sum().item() == pytest.approx(found.trace[-1, index].item())
    if shared:
        assert torch.equal(found.params.theta[:, 0], found.params.theta[:, 1])


@pytest.mark.claim(
    41, "EM and L-BFGS reach the same maximum of the log-likelihood from one start", tolerance=1e-4
)
@pytest.mark.parametrize("trajectory", ["bilinear", "linear", "quadratic"])
def test_lbfgs_and_em_meet_at_a_stationary_point(trajectory):
    inputs, _ = panel(100, trajectory)
    fits = [
        fit_growth_moe(
            num_classes=2, trajectory=trajectory, init=known(trajectory), **options, **inputs
        )
        for options in ({"method": "lbfgs"}, {"method": "em", "tol": 1e-6, "max_iter": 1000})
    ]
    assert fits[0].converged
    assert fits[1].converged
    assert fits[0].loglik == pytest.approx(fits[1].loglik, abs=1e-4)
    for one, other, se in zip(fits[0].params, fits[1].params, fits[0].se, strict=True):
        assert ((one - other).abs() <= 0.02 * se + 1e-9).all()


def test_em_gains_nothing_at_the_top_of_exponential_curves():
    inputs, _ = panel(100, "exponential")
    given = {**inputs, "num_classes": 2, "trajectory": "exponential", "init": known("exponential")}
    fit = fit_growth_moe(**given)
    assert fit.converged
    with torch.no_grad():
        top = fit.model.params()
    found = climb(fit.model, inputs, top, max_iter=20, tol=0.0)
    assert 0 <= found.trace[-1] - found.trace[0] < 1e-4
    slow = fit_growth_moe(**given, method="em", max_iter=40)
    assert fit.loglik - 0.5 < slow.loglik < fit.loglik + 1e-4


def test_converges_where_a_knot_is_at_a_time():
    inputs, _ = panel(150)
    t = inputs["t"].round(decimals=1)  # many subjects share their times, so that a knot can be one
    start = known()._replace(gamma=torch.tensor([[2.2], [5.0]]).double())
    given = {**inputs, "t": t, "init": start, "num_classes": 2}
    fits = [fit_growth_moe(method=method, **given) for method in ("lbfgs", "em")]
    assert fits[0].converged
    assert fits[0].loglik == pytest.approx(fits[1].loglik, abs=0.05)


def test_the_gates_step_is_maximum_likelihood():
    x, r = torch.randn(100, 2).double(), torch.randn(100, 3).double().softmax(-1)
    bias, weight = torch.zeros(3).double(), torch.zeros(3, 2).double()
    for _ in range(60):
        bias, weight = update_gate(bias, weight, x, r)

    def loss(v):
        logits = torch.nn.functional.pad(torch.as_tensor(v).view(2, 3), (0, 0, 1, 0))
        scores = torch.cat([torch.ones(100, 1).double(), x], 1) @ logits.T
        return -(r * scores.log_softmax(-1)).sum().item()

    exact = minimize(loss, np.zeros(6), tol=1e-10).x.reshape(2, 3)
    found = torch.cat([bias[:, None], weight], 1)
    assert (found[0] == 0).all()
    np.testing.assert_allclose(found[1:].numpy(), exact, atol=1e-4)


def test_recovers_a_known_mixture_from_clusters():
    inputs, classes = panel(400)
    fit = fit_growth_moe(num_classes=2, **inputs)
    true = known()
    assert fit.converged
    shifted = true.alpha + (true.beta @ inputs["expert_x"].mean(0)[:, None]).squeeze(-1)
    targets = {**true._asdict(), "psi": true.psi, "alpha": shifted}
    for name, value, se in zip(fit.params._fields, fit.params, fit.se, strict=True):
        assert ((value - targets[name]).abs() <= 4 * se).all(), name
    posterior = fit.model.posterior(**inputs).detach()
    assert adjusted_rand_score(classes, posterior.argmax(-1)) > 0.7
    assert torch.equal(fit.se.gate_bias[:1], torch.zeros(1).double())


@pytest.mark.claim(
    41,
    "Standard errors of the observed information agree with a parametric bootstrap",
    tolerance=0.15,
)
def test_standard_errors_agree_with_a_parametric_bootstrap():
    true = known("linear")._replace(
        alpha=torch.tensor([[5.0, -4.0], [5.0, 4.0]]).double(),
        scale_tril=2 * known("linear").scale_tril,
        gate_weight=torch.zeros(2, 0).double(),
        beta=torch.zeros(2, 2, 0).double(),
    )
    inputs = {"t": panel(80, "linear", j=5)[0]["t"]}
    model = GrowthMoE(2, trajectory="linear", time_range=(0.0, 4.0))
    model.set_params(true)
    inputs["y"] = model.sample(**inputs, generator=torch.Generator().manual_seed(0)).y
    fit = fit_growth_moe(num_classes=2, trajectory="linear", init=true, **inputs)
    panels, generator = 250, torch.Generator().manual_seed(1)
    t = inputs["t"].expand(panels, -1, -1)
    y = fit.model.sample(t, generator=generator).y
    start = GrowthParams(*(p.detach().expand(panels, *p.shape) for p in fit.model.params()))
    found = climb(fit.model, {"y": y, "t": t}, start, max_iter=12, tol=0.0)
    assert (found.trace[-1] - found.trace[-2]).mean() < 1e-2
    spread = found.params.ordered()._replace(scale_tril=found.params.ordered().psi)
    for name, values, se in zip(fit.se._fields, spread, fit.se, strict=True):
        free = se > 0
        ratio = values.std(0)[free] / se[free]
        assert ((ratio - 1).abs() < 0.15).all(), (name, ratio)


def test_scores_are_the_subjects_gradients():
    inputs, _ = panel(6)
    model = GrowthMoE(2, 2, 1, time_range=(0.0, 7.0))
    model.set_params(known())
    given = tuple(inputs.get(name) for name in ("y", "t", "gate_x", "expert_x", "tvc_x", "mask"))
    scores = _scores(model, given, objective(model, given)[0])
    for density, score in zip(model(*given), scores, strict=True):
        grads = torch.autograd.grad(density, list(model.parameters()), retain_graph=True)
        torch.testing.assert_close(score, torch.cat([g.flatten() for g in grads]))


def test_confidence_intervals_are_walds():
    inputs, _ = panel(150, "linear")
    fit = fit_growth_moe(num_classes=2, trajectory="linear", init=known("linear"), **inputs)
    assert pytest.approx(norm.ppf(0.975)) == QUANTILE
    for value, se, low, high in zip(fit.params, fit.se, *fit.ci, strict=True):
        torch.testing.assert_close(high - value, QUANTILE * se)
        torch.testing.assert_close(value - low, QUANTILE * se)
    # One class of straight lines at the same times: the mean of the coefficients of n subjects.
    t = torch.arange(4.0, dtype=torch.float64).expand(300, 4)
    y = torch.randn(300, 4, generator=torch.Generator().manual_seed(0)).double().cumsum(-1)
    one = fit_growth_moe(y, t, 1, trajectory="linear", n_starts=1)
    design = torch.stack([t[0] ** 0, t[0]], 1)
    solve = torch.linalg.inv(design.T @ design)
    total = one.params.psi[0] + one.params.theta[0] * solve
    torch.testing.assert_close(one.se.alpha[0], (total.diagonal() / 300).sqrt(), rtol=1e-5, atol=0)
    own = y @ design @ solve
    torch.testing.assert_close(one.params.alpha[0], own.mean(0), rtol=1e-6, atol=1e-6)
    dof = one.params.theta * 300 * 2  # residuals of n lines through four points
    squares = (y - own @ design.T).square().sum()
    assert dof.item() == pytest.approx(squares.item(), rel=1e-5)


@pytest.mark.claim(41, "Classes come in the order of their knots, whatever the start's labels")
def test_label_order_is_deterministic():
    inputs, _ = panel(150)
    true = known()
    swapped = GrowthParams(*(value.flip(0) for value in true))
    swapped = swapped._replace(
        gate_bias=swapped.gate_bias - swapped.gate_bias[0],
        gate_weight=swapped.gate_weight - swapped.gate_weight[0],
    )
    fits = [fit_growth_moe(num_classes=2, init=init, **inputs) for init in (true, swapped)]
    assert fits[0].params.gamma[0] < fits[0].params.gamma[1]
    assert torch.equal(fits[0].params.gamma.argsort(0), torch.tensor([[0], [1]]))
    for one, other in zip(fits[0].params, fits[1].params, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        model = GrowthMoE(2, 2, 1, time_range=(0.0, 7.0))
        model.set_params(swapped)
        before = model(**inputs)
        model.set_params(swapped.ordered())
        torch.testing.assert_close(model(**inputs), before, rtol=1e-12, atol=0)
    again = fit_growth_moe(num_classes=2, n_starts=2, seed=3, **inputs)
    once = fit_growth_moe(num_classes=2, n_starts=2, seed=3, **inputs)
    assert again.loglik == once.loglik


def test_ties_of_the_knot_go_by_the_means():
    params = known()._replace(gamma=torch.full((2, 1), 3.0).double())
    flipped = GrowthParams(*(value.flip(0) for value in params))
    assert torch.equal(flipped.ordered().alpha, params.ordered().alpha)


@pytest.mark.claim(41, "Entropy is between 0 and 1")
def test_entropy_is_between_none_and_all():
    k = 3
    uniform, certain = torch.ones(5, k).double() / k, torch.eye(k).double()
    assert relative_entropy(uniform) == pytest.approx(0, abs=1e-12)
    assert relative_entropy(certain) == 1
    assert relative_entropy(torch.ones(5, 1)) == 1
    mixed = torch.tensor([[0.5, 0.5, 0.0]]).double()
    assert relative_entropy(mixed) == pytest.approx(1 - math.log(2) / math.log(3))
    assert relative_entropy(torch.randn(50, k).double().softmax(-1)) > 0


def test_compare_models_and_information_criteria():
    inputs, _ = panel(200, "linear")
    fits = compare_models(num_classes=2, trajectory="linear", init=known("linear"), **inputs)
    assert next(iter(fits)) == "full"
    assert [fit.bic for fit in fits.values()] == sorted(fit.bic for fit in fits.values())
    counts = {"full": 1 + 2 + 4 + 4 + 6 + 2, "expert": 17, "gating": 15, "mixture": 13}
    for name, fit in fits.items():
        assert fit.num_parameters == counts[name]
        assert fit.aic == pytest.approx(2 * counts[name] - 2 * fit.loglik)
        assert fit.bic == pytest.approx(counts[name] * math.log(200) - 2 * fit.loglik)
        assert 0 <= fit.entropy <= 1
    assert fits["full"].loglik > max(fits["expert"].loglik, fits["gating"].loglik)
    assert min(fits["expert"].loglik, fits["gating"].loglik) > fits["mixture"].loglik


@pytest.mark.claim(
    41, "Covariates of the experts are centred by their training mean, at prediction too"
)
def test_expert_covariates_are_centred_by_the_training_mean():
    inputs, _ = panel(150, "linear")
    shift = 10.0
    moved = {**inputs, "expert_x": inputs["expert_x"] + shift}
    near, far = (
        fit_growth_moe(num_classes=2, trajectory="linear", init=known("linear"), **given)
        for given in (inputs, moved)
    )
    torch.testing.assert_close(far.model.experts.mean, inputs["expert_x"].mean(0) + shift)
    torch.testing.assert_close(far.params.alpha, near.params.alpha, rtol=1e-4, atol=1e-4)
    part = {name: value[:20] for name, value in moved.items()}
    wanted = near.model(**{name: value[:20] for name, value in inputs.items()})
    torch.testing.assert_close(far.model(**part), wanted, rtol=1e-4, atol=1e-4)
    half = far.model.predict_trajectory(part["t"], part["expert_x"])
    torch.testing.assert_close(
        half,
        near.model.predict_trajectory(part["t"], inputs["expert_x"][:20]),
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.fixture(scope="module")
def forest():
    """A forest of 100 trees on 500 subjects: two covariates that act, three that don't."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(500, 5, generator=generator, dtype=torch.float64)
    t = torch.arange(6, dtype=torch.float64).repeat(500, 1)
    noise = torch.randn(500, 9, generator=generator, dtype=torch.float64)
    slope = -1 + 0.5 * x[:, 3:4] + 0.6 * noise[:, 1:2]
    y = 5 + 1.2 * x[:, :1] + noise[:, :1] + slope * t + 0.5 * noise[:, 3:]
    options = {"trajectory": "linear", "num_trees": 100, "max_depth": 3, "min_leaf": 30}
    part = (y[:150], t[:150], x[:150])
    few = options | {"num_trees": 4}
    return forest_drops(y, t, x, **options), forest_drops(*part, **few), (part, few)


def by_subject(drops, which):
    """Means over the subjects' trees, `(n, c)`."""
    weight = which.double()[..., None]
    return (drops.values * weight).sum(0) / weight.sum(0)


@pytest.mark.claim(
    41,
    "Importance of covariates: those that act rank first, the 95 % intervals of those that don't "
    "cover 0; in the bag they would be above it",
)
def test_forest_separates_what_acts_from_noise(forest):
    drops, _, _ = forest
    importance = by_subject(drops, drops.out).mean(0)
    assert set(importance.argsort(descending=True)[:2].tolist()) == {0, 3}
    idle = [1, 2, 4]
    outside, inside = (by_subject(drops, which)[:, idle] for which in (drops.out, ~drops.out))
    error = 1.96 * outside.std(0) / 500**0.5
    assert (outside.mean(0).abs() <= error).all()
    assert (inside.mean(0) > 0).all()
    error = 1.96 * inside.sum(-1).std() / 500**0.5
    assert inside.sum(-1).mean() > error
    assert outside.sum(-1).mean() < error
    assert 0.3 < drops.out.double().mean() < 0.44


def test_importance_is_the_mean_over_trees_of_unseen_subjects(forest):
    _, drops, (part, few) = forest
    trees = [values[out].mean(0) for values, out in zip(*drops, strict=True)]
    torch.testing.assert_close(sem_forest_importance(*part, **few), torch.stack(trees).mean(0))


def test_forest_splits_by_the_score_statistic():
    x, scores = torch.randn(60, 2).double(), torch.randn(60, 3).double()
    scores[:, 0] += 2 * (x[:, 1] > 0.1)
    counts = torch.ones(60).double()
    covariate, threshold = best_split(x, scores, counts, 10)
    centred = (scores - scores.mean(0)).numpy()
    inverse, best = np.linalg.inv(centred.T @ centred), (-1.0, None)
    for j in range(2):
        for level in np.linspace(0, 1, 17)[1:-1]:
            cut = np.quantile(x[:, j].numpy(), level, method="lower")
            left = x[:, j].numpy() <= cut
            part, m = centred[left].sum(0), left.sum()
            gain = 0.5 * part @ inverse @ part * (60 / m + 60 / (60 - m))
            if min(m, 60 - m) >= 10 and gain > best[0]:
                best = (gain, (j, cut))
    assert (covariate, threshold) == best[1]
    assert covariate == 1
    assert best_split(x, scores, counts, 31) == (0, math.inf)


def test_regressor_is_a_scikit_learn_estimator():
    inputs, _ = panel(100, "linear")
    x = torch.cat([inputs["t"], inputs["gate_x"], inputs["expert_x"]], 1).numpy()
    y = inputs["y"].masked_fill(~inputs["mask"], math.nan).numpy()
    options = {"trajectory": "linear", "n_starts": 1, "gate_columns": [0, 1], "expert_columns": [2]}
    model = clone(GrowthMoERegressor(2, **options)).fit(x, y)
    assert model.get_params()["gate_columns"] == [0, 1]
    fit = fit_growth_moe(num_classes=2, trajectory="linear", n_starts=1, **inputs)
    assert model.score(x, y) == pytest.approx(fit.loglik / 100, abs=1e-6)
    with torch.no_grad():
        posterior = fit.model.posterior(**inputs).numpy()
        prior = fit.model.log_weights(inputs["gate_x"]).exp().numpy()
        curves = fit.model.predict_trajectory(inputs["t"], inputs["expert_x"]).numpy()
    np.testing.assert_allclose(model.predict_proba(x, y), posterior, atol=1e-6)
    np.testing.assert_allclose(model.predict_proba(x), prior, atol=1e-6)
    np.testing.assert_allclose(model.predict(x), np.einsum("nk,nkj->nj", prior, curves), atol=1e-4)
    search = GridSearchCV(model, {"num_classes": [1, 2]}, cv=KFold(2)).fit(x, y)
    assert search.best_params_ == {"num_classes": 2}
    with pytest.raises(ValueError, match="depth: expected one of"):
        model.set_params(depth=2)
    with pytest.raises(RuntimeError, match="not fitted"):
        clone(model).predict(x)
    with pytest.raises(ValueError, match="X: got 9 columns, expected 11"):
        model.predict(x[:, :9])
    with pytest.raises(ValueError, match=r"gate_columns: expected from 0 to 2, .* got \[5\]"):
        clone(model).set_params(gate_columns=[5]).fit(x, y)


Y, T = torch.randn(6, 4).double(), torch.arange(4.0).repeat(6, 1).double()
BACK = T.clone()
BACK[2, 1] = 5.0
FEW = torch.ones(6, 4, dtype=torch.bool)
FEW[1, :2] = False
HOLE = Y.clone()
HOLE[0, 0] = math.nan
BAD = [
    (lambda: fit_growth_moe(Y, T[:, :3], 1), r"y, t: expected both \(n, J\)"),
    (lambda: fit_growth_moe(Y[:0], T[:0], 1), r"y, t: .*not empty"),
    (lambda: fit_growth_moe(Y, T, 0), r"num_classes: expected an integer at least 1, got 0"),
    (lambda: fit_growth_moe(Y, T, 7), r"num_classes: expected at most 6, the subjects, got 7"),
    (lambda: fit_growth_moe(Y, BACK, 1), r"t: expected increasing times, got \[0.0, 5.0.* row 2"),
    (lambda: fit_growth_moe(Y, T, 1, mask=FEW), r"mask: expected at least 3 measurements.* got 2"),
    (lambda: fit_growth_moe(HOLE, T, 1), r"y: expected finite values, got 1 that are not"),
    (lambda: fit_growth_moe(Y, T, 1, method="sgd"), r"method: expected 'lbfgs' or 'em', got 'sgd'"),
    (lambda: fit_growth_moe(Y, T, 1, n_starts=0), r"n_starts: expected an integer at least 1"),
    (lambda: fit_growth_moe(Y, T, 1, gate_x=Y[:5]), r"gate_x: got \(5, 4\), expected \(6, 4\)"),
    (lambda: sem_forest_importance(Y, T, Y[:5]), r"covariates: expected \(6, c\)"),
    (lambda: sem_forest_importance(Y, T, HOLE), r"covariates: expected finite values"),
    (lambda: sem_forest_importance(Y, T, Y, num_trees=0), r"num_trees: expected an integer"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
