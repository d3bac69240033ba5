"""Regions of the top-K gate by enumeration, its Voronoi losses, and how many experts it needs."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch.func import functional_call, grad, hessian

from tests.moe.topk_mixtures import atoms, random_data, random_params, topk_model
from torchzoo.moe import (
    GaussianMoE,
    MoEParams,
    minimum_top_k,
    minimum_top_k_bound,
    overfit_exponents,
    region_experts,
    topk_regions,
    voronoi_cells,
    voronoi_loss,
)

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
