"""The top-K sparse gate of a Gaussian mixture against SciPy, and its regions by enumeration."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import logsumexp, softmax
from scipy.stats import chi2, norm
from torch.func import functional_call, grad, hessian

from torchzoo.moe import (
    GaussianMoE,
    MoEParams,
    TopKGate,
    fit_em,
    fit_mle,
    minimum_top_k,
    minimum_top_k_bound,
    overfit_exponents,
    region_experts,
    topk_regions,
    voronoi_cells,
    voronoi_loss,
)
from torchzoo.moe import em as em_module
from torchzoo.moe.em import update_experts, update_gate
from torchzoo.moe.fitting import initialize_from_clusters
from torchzoo.testing import check_module

both_rules = pytest.mark.parametrize("with_bias", [False, True])


def random_params(k, d=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = {"generator": g, "dtype": torch.float64}
    return MoEParams(
        beta0=2 * torch.randn(k, **draw),
        beta1=2 * torch.randn(k, d, **draw),
        a=2 * torch.randn(k, d, **draw),
        b=2 * torch.randn(k, **draw),
        var=torch.rand(k, **draw) + 0.2,
    )


def random_data(n, d=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    return x, 3 * torch.randn(n, generator=g, dtype=torch.float64)


def topk_model(params, top_k, *, with_bias=False):
    return GaussianMoE.from_params(params, gate="topk", top_k=top_k, select_with_bias=with_bias)


def atoms(params, which):
    """Some of the atoms, in any order, some of them perhaps several times."""
    return MoEParams(*(field[which] for field in params[:5]))


def scipy_log_prob(params, x, y, top_k, with_bias):
    """The density by its definition, one pair at a time."""
    p = [field.numpy() for field in params[:5]]
    values = []
    for point, response in zip(x.numpy(), y.numpy(), strict=True):
        scores = p[1] @ point
        order = np.argsort(-(scores + p[0] if with_bias else scores), kind="stable")
        chosen = np.sort(order[:top_k])
        logits = (scores + p[0])[chosen]
        parts = norm.logpdf(response, p[2][chosen] @ point + p[3][chosen], np.sqrt(p[4][chosen]))
        values.append(logsumexp(logits - logsumexp(logits) + parts))
    return np.array(values)


# The density


@pytest.mark.claim(
    146, "With K = k the density is that of the dense softmax mixture", tolerance=1e-12
)
@both_rules
def test_all_experts_give_the_dense_density(with_bias):
    params, (x, y) = random_params(4), random_data(200)
    with torch.no_grad():
        sparse = topk_model(params, 4, with_bias=with_bias).log_prob(x, y)
        dense = GaussianMoE.from_params(params, gate="softmax").log_prob(x, y)
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-12)
    p = [field.numpy() for field in params[:5]]
    densities = norm.pdf(y.numpy()[:, None], x.numpy() @ p[2].T + p[3], np.sqrt(p[4]))
    exact = np.log((softmax(x.numpy() @ p[1].T + p[0], axis=-1) * densities).sum(-1))
    np.testing.assert_allclose(sparse.numpy(), exact, atol=1e-12)


@pytest.mark.claim(
    146,
    "With K = 1 the model is hard-routed linear regression: the density is the chosen expert's, "
    "and EM finds each region's least-squares line and mean square",
    tolerance=1e-9,
)
@both_rules
def test_one_expert_is_hard_routed_regression(with_bias):
    params, (x, y) = random_params(3, seed=7), random_data(200)
    model = topk_model(params, 1, with_bias=with_bias)
    scores = x @ params.beta1.T + (params.beta0 if with_bias else 0)
    chosen = scores.argmax(-1)
    assert len(chosen.unique()) == 3
    mean = (x * params.a[chosen]).sum(-1) + params.b[chosen]
    exact = norm.logpdf(y.numpy(), mean.numpy(), params.var[chosen].sqrt().numpy())
    with torch.no_grad():
        np.testing.assert_allclose(model.log_prob(x, y).numpy(), exact, atol=1e-12)
    torch.testing.assert_close(model.mean(x), mean)
    torch.testing.assert_close(model.variance(x), params.var[chosen], rtol=0, atol=1e-9)

    model.fit(x, y, method="em", max_iter=3)
    fitted = model.params()
    assert torch.equal(fitted.beta1, params.beta1)
    for i in range(3):
        design = np.c_[x[chosen == i].numpy(), np.ones(int((chosen == i).sum()))]
        line, squares, *_ = np.linalg.lstsq(design, y[chosen == i].numpy(), rcond=None)
        got = torch.cat([fitted.a[i], fitted.b[i : i + 1]]).detach().numpy()
        np.testing.assert_allclose(got, line, atol=1e-9)
        assert fitted.var[i].item() == pytest.approx(squares[0] / len(design), rel=1e-9)


@pytest.mark.claim(146, "The weights add up to 1, with exactly K that are not 0", tolerance=1e-12)
@both_rules
@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_weights_are_a_distribution_over_k_experts(top_k, with_bias):
    model = topk_model(random_params(5), top_k, with_bias=with_bias)
    x, _ = random_data(300)
    weights = model.log_weights(x).exp()
    torch.testing.assert_close(
        weights.sum(-1), torch.ones(300, dtype=torch.float64), atol=1e-12, rtol=0
    )
    assert ((weights > 0).sum(-1) == top_k).all()


@pytest.mark.claim(146, "Ties of the scores go to the experts of lowest index", tolerance=0.0)
def test_ties_go_to_the_lowest_experts():
    params = random_params(4)._replace(beta1=torch.ones(4, 2, dtype=torch.float64))
    x, _ = random_data(20)
    assert torch.equal(topk_model(params, 2).selected(x)[0], torch.tensor([1, 1, 0, 0]).bool())
    assert (topk_model(params, 2).log_weights(x)[:, 2:] == -math.inf).all()
    assert (topk_regions(x, params.beta1, 2) == 0).all()
    largest = set(params.beta0.topk(2).indices.tolist())
    selected = topk_model(params, 2, with_bias=True).selected(x)[0]
    assert set(selected.nonzero().flatten().tolist()) == largest != {0, 1}


@pytest.mark.claim(
    146,
    "The biases enter the weights after the choice of experts, and before it only on request",
    tolerance=1e-12,
)
def test_where_the_bias_enters():
    params, (x, _) = random_params(4), random_data(300)
    scores = x @ params.beta1.T
    for with_bias, chosen_by in ((False, scores), (True, scores + params.beta0)):
        top = chosen_by.topk(2).indices
        weights = (scores + params.beta0).gather(-1, top).softmax(-1)
        exact = torch.zeros_like(scores).scatter(-1, top, weights)
        got = topk_model(params, 2, with_bias=with_bias).log_weights(x).exp()
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)
    different = topk_model(params, 2).selected(x) != topk_model(params, 2, with_bias=True).selected(
        x
    )
    assert different.any(-1).float().mean() > 0.2


@pytest.mark.claim(
    146,
    "log_prob equals the sum over the selected experts with scipy's logsumexp",
    tolerance=1e-10,
)
@settings(max_examples=30, deadline=None)
@given(
    k=st.integers(1, 5),
    d=st.integers(1, 3),
    seed=st.integers(0, 10_000),
    with_bias=st.booleans(),
    data=st.data(),
)
def test_log_prob_is_brute_force_over_the_selected_experts(k, d, seed, with_bias, data):
    top_k = data.draw(st.integers(1, k))
    params, (x, y) = random_params(k, d, seed), random_data(30, d, seed + 1)
    model = topk_model(params, top_k, with_bias=with_bias)
    exact = scipy_log_prob(params, x, y, top_k, with_bias)
    with torch.no_grad():
        np.testing.assert_allclose(model.log_prob(x, y).numpy(), exact, atol=1e-10)
        np.testing.assert_allclose(model(x).log_prob(y).numpy(), exact, atol=1e-10)


@pytest.mark.claim(146, "The conditional density integrates to 1 over y", tolerance=1e-6)
@both_rules
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_density_integrates_to_one(top_k, with_bias):
    model = topk_model(random_params(3), top_k, with_bias=with_bias)
    for point in torch.tensor([[0.3, -1.0], [-1.2, 0.5]], dtype=torch.float64):

        def density(y, point=point):
            with torch.no_grad():
                return model.log_prob(point, torch.tensor(y, dtype=torch.float64)).exp().item()

        means = model.expert_means(point).tolist()
        assert quad(density, -30, 30, points=means, limit=200)[0] == pytest.approx(1, abs=1e-6)


@pytest.mark.claim(
    146,
    "Log-weights of -inf give finite first and second derivatives, however far the scores are "
    "apart",
    tolerance=None,
)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_gradients_are_finite(scale):
    params, (x, y) = random_params(4), random_data(20)
    params = params._replace(beta1=scale * params.beta1, beta0=-scale * params.beta0)
    model = topk_model(params, 2)
    inputs = x.requires_grad_()
    loss = -model.log_prob(inputs, y).sum()
    wanted = [inputs, *model.parameters()]
    first = torch.autograd.grad(loss, wanted, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
    assert all(g.isfinite().all() for g in (*first, *second))
    assert all(p.isfinite().all() for p in (model.mean(x), model.variance(x)))


@pytest.mark.claim(
    146,
    "Experts that are not selected get a gradient of exactly 0 from that pair",
    tolerance=0.0,
)
@both_rules
def test_unselected_experts_get_no_gradient(with_bias):
    model = topk_model(random_params(5), 2, with_bias=with_bias)
    x, y = random_data(40)
    selected = model.selected(x)
    for t in range(40):
        model.zero_grad()
        model.log_prob(x[t], y[t]).backward()
        for p in (model.a, model.b, model.log_var, model.gate.weight, model.gate.bias):
            rows = p.grad.reshape(5, -1)
            assert (rows[~selected[t]] == 0).all()
            assert (rows[selected[t]] != 0).all()


@pytest.mark.claim(
    146, "Away from boundaries the gradients are central differences", tolerance=1e-6
)
def test_gradients_are_finite_differences():
    model = topk_model(random_params(4), 2)
    x, y = random_data(60)
    scores = (x @ model.gate.weight.T).sort(-1, descending=True).values
    inside = (scores[:, 1] - scores[:, 2]) > 1e-2  # farther from a boundary than the steps go
    x, y = x[inside], y[inside]
    assert len(x) > 40
    loss = model.log_prob(x, y).mean()
    loss.backward()
    for p in model.parameters():
        for index in np.ndindex(*p.shape):
            kept, step, sides = p[index].item(), 1e-5, []
            for sign in (1, -1):
                with torch.no_grad():
                    p[index] = kept + sign * step
                    sides.append(model.log_prob(x, y).mean().item())
            with torch.no_grad():
                p[index] = kept
            slope = (sides[0] - sides[1]) / (2 * step)
            assert p.grad[index].item() == pytest.approx(slope, abs=1e-6)


# Regions


def point_between(beta1):
    """A point where the scores of two of four experts tie as second and third, and these two."""
    for i, j in itertools.combinations(range(4), 2):
        normal = beta1[i] - beta1[j]
        along = torch.stack([-normal[1], normal[0]])
        for point in (along, -along):
            scores = beta1 @ point
            above = sum(scores[e] > scores[i] for e in range(4) if e not in (i, j))
            if above == 1:
                return point, i, j
    raise AssertionError("no such line")


@pytest.mark.claim(
    146,
    "Across a boundary the density jumps, and its two limits are the dense softmax mixtures of "
    "the two regions' experts",
    tolerance=1e-6,
)
@pytest.mark.parametrize("seed", range(3))
def test_the_density_jumps_between_regional_models(seed):
    params = random_params(4, seed=seed)
    model = topk_model(params, 2)
    boundary, first, second = point_between(params.beta1)
    normal = params.beta1[first] - params.beta1[second]
    y = torch.linspace(-12, 12, 2001, dtype=torch.float64)
    limits = []
    for side in (1, -1):
        x = boundary + side * 1e-9 * normal
        region = topk_regions(x, params.beta1, 2)
        experts = region_experts(region, 4, 2)
        assert (first in experts) == (side == 1)
        assert (second in experts) == (side == -1)
        regional = GaussianMoE.from_params(atoms(params, experts), gate="softmax")
        with torch.no_grad():
            at_boundary = regional.log_prob(boundary.expand(2001, 2), y).exp()
            beside = model.log_prob(x.expand(2001, 2), y).exp()
        torch.testing.assert_close(beside, at_boundary, rtol=0, atol=1e-6)
        limits.append(beside)
    assert (limits[0] - limits[1]).abs().max() > 1e-3


@settings(max_examples=40, deadline=None)
@given(k=st.integers(1, 6), d=st.integers(1, 3), seed=st.integers(0, 10_000), data=st.data())
def test_regions_are_the_selected_sets(k, d, seed, data):
    top_k = data.draw(st.integers(1, k))
    params, (x, _) = random_params(k, d, seed), random_data(24, d, seed)
    x = x.reshape(2, 3, 4, d)
    for with_bias in (False, True):
        beta0 = params.beta0 if with_bias else None
        regions = topk_regions(x, params.beta1, top_k, beta0=beta0)
        assert regions.shape == (2, 3, 4)
        experts = region_experts(regions, k, top_k)
        selected = topk_model(params, top_k, with_bias=with_bias).selected(x)
        assert torch.equal(torch.zeros_like(selected).scatter(-1, experts, True), selected)


@pytest.mark.claim(
    146, "There are at most C(k, K) regions, and each is a cone: x and 2 x share one", tolerance=0.0
)
def test_regions_are_cones():
    params, (x, _) = random_params(5, 3), random_data(5000, 3)
    regions = topk_regions(x, params.beta1, 2)
    assert 4 < len(regions.unique()) <= math.comb(5, 2)
    assert torch.equal(topk_regions(2 * x, params.beta1, 2), regions)


@pytest.mark.parametrize(("num_experts", "k"), [(1, 1), (5, 2), (6, 3), (6, 6), (7, 1)])
def test_every_set_has_its_place_in_colexicographic_order(num_experts, k):
    sets = itertools.combinations(range(num_experts), k)
    exact = sorted((list(s) for s in sets), key=lambda s: s[::-1])
    places = torch.arange(math.comb(num_experts, k))
    assert region_experts(places, num_experts, k).tolist() == exact
    beta1 = torch.eye(num_experts)
    x = torch.zeros(len(exact), num_experts).scatter(1, torch.tensor(exact), 1.0)
    assert torch.equal(topk_regions(x, beta1, k), places)


def test_large_numbers_of_sets_fit_or_are_refused():
    last = torch.tensor([math.comb(100, 99) - 1, math.comb(100, 99) - 2])
    assert region_experts(last, 100, 99)[:, 0].tolist() == [1, 0]
    last = torch.tensor(math.comb(64, 32) - 1)
    assert region_experts(last, 64, 32).tolist() == list(range(32, 64))
    with pytest.raises(ValueError, match=r"k: expected fewer than 2\^63 sets"):
        topk_regions(torch.zeros(1, 1), torch.zeros(128, 1), 64)


# Identities behind the slow rates


class Calls(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        return self.model.log_joint(x, y)[0] - self.model.log_weights(x)[1]


def atom(theta, model, x, y):
    """`exp(beta1^T x) N(y | a^T x + b, var)`, of expert 0; one is at 0, two are off."""
    zero = torch.zeros_like(theta["beta1"])
    far = zero.detach() - 50 * x.sign()
    values = {
        "gate.weight": torch.stack([theta["beta1"], zero, far, far]),
        "gate.bias": torch.zeros(4, dtype=torch.float64),
        "a": theta["a"].repeat(4, 1),
        "b": theta["b"].repeat(4),
        "log_var": theta["var"].log().repeat(4),
    }
    prefixed = {f"model.{name}": value for name, value in values.items()}
    return functional_call(Calls(model), prefixed, (x, y)).exp()


@pytest.mark.claim(
    146,
    "u = exp(beta1 x) N(y | a x + b, var) of a selected expert satisfies d2u/dbeta1 db = du/da and "
    "du/dvar = (1/2) d2u/db2",
    tolerance=1e-8,
)
@pytest.mark.parametrize("seed", range(5))
def test_pde_identities_behind_the_slow_rates(seed):
    g = torch.Generator().manual_seed(seed)
    draw = {"generator": g, "dtype": torch.float64}
    theta = {
        "beta1": torch.randn(3, **draw),
        "a": torch.randn(3, **draw),
        "b": torch.randn((), **draw),
        "var": torch.rand((), **draw) + 0.5,
    }
    x, y = torch.randn(3, **draw), torch.randn((), **draw)
    model = GaussianMoE(3, 4, gate="topk", top_k=2, dtype=torch.float64)
    u = lambda t: atom(t, model, x, y)  # noqa: E731
    t = {name: value.numpy() for name, value in theta.items()}
    density = norm.pdf(y, t["a"] @ x.numpy() + t["b"], np.sqrt(t["var"]))
    exact = np.exp(t["beta1"] @ x.numpy()) * density
    assert u(theta).item() == pytest.approx(exact, rel=1e-12)
    first, second = grad(u)(theta), hessian(u)(theta)
    pairs = ((second["beta1"]["b"], first["a"]), (first["var"], second["b"]["b"] / 2))
    for left, right in pairs:
        assert left.norm() > 1e-6
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)


# Voronoi losses and the threshold


def cell_terms(fitted, true, exponents):
    """What each true atom's cell costs, by the definition of D1 and D2."""
    distance = torch.cdist(flat(fitted), flat(true))
    cell_of = distance.argmin(-1).tolist()
    terms = []
    for j in range(len(true.b)):
        cell = [i for i, owner in enumerate(cell_of) if owner == j]
        r = exponents(len(cell))
        weights = [math.exp(fitted.beta0[i]) for i in cell]
        term = abs(sum(weights) - math.exp(true.beta0[j]))
        for i, weight in zip(cell, weights, strict=True):
            gaps = (
                (fitted.beta1[i] - true.beta1[j]).norm().item(),
                (fitted.a[i] - true.a[j]).norm().item(),
                abs(fitted.b[i] - true.b[j]).item(),
                abs(fitted.var[i] - true.var[j]).item(),
            )
            term += weight * sum(gap**power for gap, power in zip(gaps, r, strict=True))
        terms.append(term)
    return terms


def flat(params):
    columns = (params.beta1, params.a, params.b[:, None], params.var[:, None])
    return torch.cat(columns, -1)


def d1_exponents(size):
    return (1, 1, 1, 1)


def d2_exponents(size):
    rbar = {2: 4, 3: 6, 4: 8, 5: 10}.get(size, 1)
    return (rbar, rbar / 2, rbar, rbar / 2) if size > 1 else (1, 1, 1, 1)


@pytest.mark.claim(
    146,
    "The losses D1 and D2 are the largest sum of the cells' terms over all K-subsets of the true "
    "experts, at most the sum over all of them, and equal to it at K = k*",
    tolerance=1e-10,
)
@settings(max_examples=40, deadline=None)
@given(k=st.integers(1, 5), num_true=st.integers(1, 4), seed=st.integers(0, 10_000))
def test_regional_losses_are_the_maximum_over_subsets(k, num_true, seed):
    fitted, true = random_params(k, seed=seed), random_params(num_true, seed=seed + 1)
    for order, exponents in ((1, d1_exponents), (overfit_exponents, d2_exponents)):
        terms = cell_terms(fitted, true, exponents)
        total = voronoi_loss(fitted, true, order).item()
        assert total == pytest.approx(sum(terms), rel=1e-10)
        for top_k in range(1, num_true + 1):
            exact = max(map(sum, itertools.combinations(terms, top_k)))
            got = voronoi_loss(fitted, true, order, top_k=top_k, reduce="regions-max").item()
            assert got == pytest.approx(exact, rel=1e-10)
            assert got <= total * (1 + 1e-12)
        assert got == pytest.approx(total, rel=1e-12)


@pytest.mark.claim(
    146,
    "D2 and the distance of the densities are of the same order where m = 2, 3, 4 atoms of a "
    "shared cell imitate one by Gauss-Hermite nodes",
    tolerance=0.1,
)
@pytest.mark.parametrize("m", [2, 3, 4])
def test_d2_is_of_the_order_of_the_densities_distance(m):
    nodes, weights = np.polynomial.hermite_e.hermegauss(m)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    true = MoEParams(0 * one, zero, zero, 0 * one, one)
    y = torch.linspace(-8, 8, 3001, dtype=torch.float64)
    x = torch.zeros(3001, 1, dtype=torch.float64)
    sizes, losses, distances = np.array([0.12, 0.1, 0.08]), [], []
    for size in sizes:
        many = zero.expand(m, 1)
        fitted = MoEParams(
            beta0=torch.tensor(weights / weights.sum()).log(),
            beta1=many,
            a=many,
            b=torch.tensor(nodes) * size,
            var=torch.full((m,), 1 - size**2, dtype=torch.float64),
        )
        losses.append(voronoi_loss(fitted, true, overfit_exponents).item())
        models = [topk_model(fitted, m), topk_model(true, 1)]
        with torch.no_grad():
            first, second = (model.log_prob(x, y).exp() for model in models)
        distances.append(torch.trapezoid((first - second).abs(), y).item())
    slopes = [np.polyfit(np.log(sizes), np.log(v), 1)[0] for v in (losses, distances)]
    assert slopes[0] == pytest.approx(2 * m, abs=1e-6)
    assert slopes[1] == pytest.approx(2 * m, abs=0.1)


@pytest.mark.claim(
    146,
    "Fitted cells of sizes (2, 1) need 2 active experts at K = 1, cells of sizes (1, 1) need 1, "
    "and any others the largest sum of K of them over all subsets",
    tolerance=0.0,
)
@settings(max_examples=40, deadline=None)
@given(
    cells=st.lists(st.integers(0, 3), min_size=1, max_size=8),
    seed=st.integers(0, 1000),
    top_k=st.integers(1, 4),
)
def test_minimum_top_k(cells, seed, top_k):
    true = random_params(4, seed=seed)
    two = atoms(true, [0, 1])
    assert minimum_top_k(atoms(true, [0, 1, 0]), two, 1) == 2
    assert minimum_top_k(atoms(true, [1, 0]), two, 1) == 1
    fitted = atoms(true, cells)
    assert voronoi_cells(fitted, true).tolist() == cells
    counts = [cells.count(j) for j in range(4)]
    exact = max(map(sum, itertools.combinations(counts, top_k)))
    assert minimum_top_k(fitted, true, top_k) == exact


@pytest.mark.claim(
    146,
    "num_fitted - num_true + K is the largest threshold over all ways to share out the fitted "
    "experts that leave no true one empty",
    tolerance=0.0,
)
@pytest.mark.parametrize(("num_fitted", "num_true"), [(3, 2), (5, 3), (6, 4), (4, 4)])
def test_the_bound_is_the_worst_case(num_fitted, num_true):
    shares = [
        counts
        for counts in itertools.product(range(1, num_fitted + 1), repeat=num_true)
        if sum(counts) == num_fitted
    ]
    for top_k in range(1, num_true + 1):
        worst = max(sum(sorted(counts)[-top_k:]) for counts in shares)
        assert minimum_top_k_bound(num_fitted, num_true, top_k) == worst


# Fitting


def known():
    columns = {
        "beta0": [0.5, -0.3, 0.0],
        "beta1": [[4.0], [2.0], [0.0]],
        "a": [[-4.0], [3.0], [1.0]],
        "b": [1.0, -1.0, 3.0],
        "var": [0.1, 0.15, 0.12],
    }
    return MoEParams(**{k: torch.tensor(v, dtype=torch.float64) for k, v in columns.items()})


def known_data(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(n, 1, generator=g, dtype=torch.float64) - 1
    return x, topk_model(known(), 2).sample(x, generator=g)


@pytest.mark.claim(
    146,
    "EM with the sparse gate never decreases the likelihood, though its steps change regions",
    tolerance=1e-12,
)
def test_em_is_monotone_across_regions():
    x, y = random_data(150)
    y = y + 4 * x[:, 0].abs()
    moved = 0
    for seed in range(8):
        model = topk_model(random_params(4, seed=seed), 2, with_bias=bool(seed % 2))
        before = model.selected(x)
        trace = fit_em(model, x, y, max_iter=12, tol=0.0)
        assert trace.diff().min() >= -1e-12
        assert trace[-1].item() == pytest.approx(model.log_prob(x, y).mean().item(), abs=1e-12)
        moved += int((model.selected(x) != before).any())
    assert moved >= 4


@pytest.mark.claim(
    146,
    "A gate's step that lowers the likelihood is halved until it doesn't, and undone if no half "
    "does",
    tolerance=0.0,
)
@pytest.mark.parametrize("halves", [0, 1, 3, None])
def test_a_step_that_lowers_the_likelihood_is_cut_back(monkeypatch, halves):
    """The step moves the gate's bias, and the likelihood falls beyond a wanted length of it."""
    x, y = known_data(50)
    model = topk_model(known(), 2)
    start = model.gate.bias.detach().clone()
    step = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    longest = -1.0 if halves is None else 0.5**halves

    def take_step(model, x, responsibilities):
        with torch.no_grad():
            model.gate.bias.add_(step)

    def likelihood(model, x, y):
        moved = (model.gate.bias - start)[0].detach()
        return torch.where((moved > 0) & (moved > 1.01 * longest), -1.0, moved)

    monkeypatch.setattr(em_module, "update_gate", take_step)
    monkeypatch.setattr(em_module, "mean_log_likelihood", likelihood)
    with torch.no_grad():
        responsibilities = model.responsibilities(x, y)
    after = em_module._climb_gate(model, x, y, responsibilities)
    wanted = 0.0 if halves is None else longest
    assert after == wanted
    assert torch.equal(model.gate.bias, start + wanted * step)


@pytest.mark.claim(
    146,
    "The experts' M step is numpy's least squares with the responsibilities as weights",
    tolerance=1e-10,
)
def test_the_experts_step_is_weighted_least_squares():
    model, (x, y) = topk_model(random_params(4), 2), random_data(120)
    with torch.no_grad():
        r = model.responsibilities(x, y)
    assert (r[~model.selected(x)] == 0).all()
    torch.testing.assert_close(r.sum(-1), torch.ones(120, dtype=torch.float64))
    update_experts(model, x, y, r)
    fitted, design = model.params(), np.c_[x.numpy(), np.ones(120)]
    for i in range(4):
        w = r[:, i].numpy()
        root = np.sqrt(w)
        exact = np.linalg.lstsq(root[:, None] * design, root * y.numpy(), rcond=None)[0]
        got = torch.cat([fitted.a[i], fitted.b[i : i + 1]]).detach().numpy()
        np.testing.assert_allclose(got, exact, atol=1e-10)
        mean_square = (w * (y.numpy() - design @ exact) ** 2).sum() / w.sum()
        assert fitted.var[i].item() == pytest.approx(mean_square, rel=1e-10)


def test_the_gates_step_holds_the_experts_chosen():
    """Equal responsibilities within each chosen set call for a bias and weights of 0."""
    model, (x, _) = topk_model(random_params(3), 2), random_data(100)
    selected = model.selected(x)
    r = selected.double() / 2
    update_gate(model, x, r)
    weights = model.log_weights(x, selected=selected).exp()
    torch.testing.assert_close(weights, r, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["lbfgs", "em"])
def test_fit_from_nearby_is_as_far_from_the_truth_as_fisher_information_says(method):
    """Wilks: twice the gain in likelihood over the truth is chi-square of 15 - 2 degrees."""
    n = 3000
    x, y = known_data(n)
    g = torch.Generator().manual_seed(5)
    noise = lambda p: p + 0.05 * torch.randn(p.shape, generator=g, dtype=p.dtype)  # noqa: E731
    model = topk_model(MoEParams(*(noise(p) for p in known()[:5])), 2)
    model.fit(x, y, method=method, max_iter=100)
    with torch.no_grad():
        gain = (model.log_prob(x, y) - topk_model(known(), 2).log_prob(x, y)).sum().item()
    assert 0.001 < chi2(13).cdf(2 * gain) < 0.999
    fitted = model.params().anchored()
    torch.testing.assert_close(fitted.a, known().a, rtol=0, atol=0.12)
    torch.testing.assert_close(fitted.var, known().var, rtol=0, atol=0.03)


def test_fit_mle_finds_the_experts_from_clusters():
    x, y = known_data(1500)
    model = fit_mle(x, y, 3, gate="topk", top_k=2, restarts=4)
    assert model.gate.k == 2
    assert not model.gate.select_with_bias
    assert model.log_prob(x, y).mean() > topk_model(known(), 2).log_prob(x, y).mean() - 0.05
    rule = fit_mle(x, y, 3, gate="topk", top_k=2, select_with_bias=True, restarts=1, max_iter=2)
    assert rule.gate.select_with_bias


def test_a_start_from_clusters_chooses_by_weights_that_tell_them_apart():
    x, _ = random_data(600)
    labels = (x @ torch.tensor([[3.0, 0.0, -3.0], [0.0, 3.0, -3.0]]).double()).argmax(-1)
    y = labels * 20.0
    model = GaussianMoE(2, 3, gate="topk", top_k=1, dtype=torch.float64)
    initialize_from_clusters(model, x, y, seed=0)
    assert (model.gate.bias == 0).all()
    chosen = model.selected(x).int().argmax(-1)
    pairs = {(int(i), int(j)) for i, j in zip(chosen, labels, strict=True)}
    agree = max(
        (chosen == torch.tensor(p)[labels]).double().mean().item()
        for p in itertools.permutations(range(3))
    )
    assert len(pairs) >= 3
    assert agree > 0.95


def test_restarts_keep_the_best_fit():
    x, y = known_data(300)
    poor = topk_model(random_params(3, 1), 2)
    singles = [copy.deepcopy(poor)]
    for seed in range(2):
        singles.append(copy.deepcopy(poor))
        initialize_from_clusters(singles[-1], x, y, seed=seed)
    values = [one.fit(x, y, max_iter=40).log_prob(x, y).mean().item() for one in singles]
    for restarts in (1, 2, 3):
        found = copy.deepcopy(poor).fit(x, y, max_iter=40, restarts=restarts)
        assert found.log_prob(x, y).mean().item() == max(values[:restarts])
    assert max(values) > values[0] + 0.01


# The router


@pytest.mark.claim(
    146,
    "A renormalising TopKGate routes as softmax, then top-k, then division by the sum",
    tolerance=1e-7,
)
def test_routing_is_softmax_topk_normalise():
    gate = TopKGate(6, 5, 2, renormalize=True)
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    routing = gate(x)
    probs = (x.double() @ gate.weight.double().T + gate.bias.double()).softmax(-1)
    best = probs.topk(2)
    assert torch.equal(routing.experts, best.indices)
    exact = best.values / best.values.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.weights.double(), exact, rtol=0, atol=1e-7)


def test_the_density_weighs_as_the_gate_routes():
    model = topk_model(random_params(5), 2)
    x, _ = random_data(50)
    routing = model.gate(x)
    weights = model.log_weights(x).exp()
    torch.testing.assert_close(weights.gather(-1, routing.experts), routing.weights)
    raw = TopKGate(2, 5, 2, renormalize=False, dtype=torch.float64)
    total = GaussianMoE(2, 5, gate=raw, dtype=torch.float64).log_weights(x).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_sample_never_takes_an_unselected_expert(monkeypatch):
    params = random_params(3)._replace(b=torch.tensor([-1e6, 0.0, 1e6], dtype=torch.float64))
    model, (x, _) = topk_model(params, 1), random_data(500)
    regions = model.selected(x).int().argmax(-1)
    for extreme in (0.0, 1 - 2**-53):
        monkeypatch.setattr(
            torch.Tensor, "uniform_", lambda t, extreme=extreme, **_: t.fill_(extreme)
        )
        y = model.sample(x, generator=torch.Generator().manual_seed(0))
        assert torch.equal((y / 1e6).round().long() + 1, regions)


def test_the_topk_model_keeps_the_contract():
    check_module(
        lambda **kw: GaussianMoE(3, 4, gate="topk", **{"top_k": 2, **kw}),
        (torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),),
        bad_options={"top_k": 5},
    )


P = random_params(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GaussianMoE(2, 3, gate="topk", top_k=5), "top_k: .*from 1 to 3, got 5"),
        (lambda: GaussianMoE(2, 3, select_with_bias=True), "select_with_bias: expected False"),
        (
            lambda: GaussianMoE(
                2, 3, gate=TopKGate(2, 3, 1, select_with_bias=False), select_with_bias=True
            ),
            "select_with_bias: expected False",
        ),
        (lambda: topk_model(P._replace(var=-P.var), 2), "params.var: expected values above 0"),
        (lambda: topk_model(P, 2).log_prob(torch.zeros(4, 3), torch.zeros(4)), r"x: expected .*2"),
        (lambda: topk_model(P, 2).log_prob(torch.zeros(4, 2), torch.zeros(3)), r"y: expected"),
        (
            lambda: topk_model(P, 2).fit(torch.zeros(4, 2), torch.zeros(4), restarts=0),
            "restarts: expected an integer at least 1",
        ),
        (
            lambda: topk_model(P, 2).fit(torch.zeros(2, 2), torch.zeros(2), restarts=2),
            "num_experts: expected at most 2",
        ),
        (lambda: topk_regions(torch.zeros(4, 3), P.beta1, 2), r"x: expected \(\.\.\., 2\)"),
        (lambda: topk_regions(torch.zeros(4, 2), P.beta0, 2), r"beta1: expected \(E, d\)"),
        (lambda: topk_regions(torch.zeros(4, 2), P.beta1, 4), "k: .*from 1 to 3, got 4"),
        (
            lambda: topk_regions(torch.zeros(4, 2), P.beta1, 2, beta0=torch.zeros(2)),
            r"beta0: expected \(3,\), got \(2,\)",
        ),
        (lambda: region_experts(torch.tensor([3]), 3, 2), r"regions: expected 0\.\.2, got 3"),
        (lambda: region_experts(torch.tensor([-1]), 3, 2), r"regions: expected 0\.\.2, got -1"),
        (lambda: region_experts(torch.tensor([0]), 0, 1), "num_experts: expected"),
        (lambda: minimum_top_k(P, P, 4), "top_k: .*from 1 to 3, got 4"),
        (
            lambda: minimum_top_k(MoEParams(*(p[None] for p in P[:5])), P, 1),
            r"fitted.beta1: expected \(k, d\) without batch dimensions",
        ),
        (lambda: minimum_top_k(random_params(3, 3), P, 1), "params.beta1: expected 2 features"),
        (lambda: minimum_top_k_bound(2, 3, 1), "num_fitted: expected an integer at least 3"),
        (lambda: minimum_top_k_bound(3, 3, 4), "top_k: expected an integer from 1 to 3"),
        (lambda: minimum_top_k_bound(3, 0, 1), "num_true: expected an integer at least 1"),
        (lambda: overfit_exponents(1), "num_atoms: expected an integer at least 2"),
        (lambda: voronoi_loss(P, P, lambda size: (1.0, size)), "order: expected a number above 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
