"""The experiment on top-K sparse gates runs, and its statistics are what they say."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy.integrate import simpson
from scipy.stats import linregress, norm

from torchzoo.experiment import Measurement, reproduce
from torchzoo.experiments.moe import topk_softmax as unit
from torchzoo.moe import GaussianMoE, minimum_top_k, voronoi_cells


def test_smoke_run():
    result = reproduce(unit.EXPERIMENT, budget="smoke")
    assert len(result.criteria) == 6
    measured = result.measured()
    assert len(measured) == 4 * (len(unit.CURVES) + 2) + 1
    unit.plot(measured, Figure())


RATES = {
    unit.EXACT_D1: -0.5,
    unit.EXACT_H: -0.5,
    unit.ONE_ACTIVE: -0.5,
    unit.FEW_H: 0.0,
    unit.FEW_LOCAL_H: 0.0,
    unit.ALL_H: -0.5,
    unit.ALL_LOSS: -0.25,
    unit.ALL_D2: -0.2,
}


def synthetic(ratio=8.0, spread=0.0, **rates):
    """Measurements of four seeds with given slopes; `ratio` is that of the last densities."""
    rates = RATES | {getattr(unit, name): rate for name, rate in rates.items()}
    last, seeds = unit.SIZES[-1], np.array([-1.5, -0.5, 0.5, 1.5])
    figures = {unit.FREE_H: np.ones(4)}
    for n in unit.SIZES:
        figures[unit.shared(2, n)] = figures[unit.shared(3, n)] = np.full(4, 2.0)
        for curve, rate in rates.items():
            scale = ratio if curve == unit.FEW_H else 1.0
            figures[unit.at(curve, n)] = scale * (n / last) ** (rate + spread * seeds)
    return {name: Measurement(name, tuple(values.tolist())) for name, values in figures.items()}


@pytest.mark.parametrize(
    ("measured", "failing"),
    [
        (synthetic(), None),
        (synthetic(EXACT_D1=-0.34, ALL_LOSS=-0.1), 0),
        (synthetic(EXACT_D1=-0.66), 0),
        (synthetic(EXACT_D1=-0.66, spread=0.02), None),
        (synthetic(EXACT_H=-0.34), 1),
        (synthetic(ratio=1.9), 2),
        (synthetic(FEW_H=-0.21), 3),
        (synthetic(ALL_H=-0.34), 4),
        (synthetic(ALL_LOSS=-0.36), 5),
    ],
)
def test_criteria_can_fail_one_by_one(measured, failing):
    outcomes = [criterion.test(measured)[0] for criterion in unit.EXPERIMENT.criteria]
    assert outcomes == [index != failing for index in range(6)]


def test_slope_is_a_regression_of_the_mean_log_with_its_error_over_seeds():
    values = np.exp(np.random.default_rng(0).normal(size=(5, 4)))
    measured = {
        unit.at("x", n): Measurement("x", tuple(column))
        for n, column in zip(unit.SIZES, values.T, strict=True)
    }
    logs = np.log(unit.SIZES)
    rate, error = unit.slope(measured, "x")
    assert rate == pytest.approx(linregress(logs, np.log(values).mean(0)).slope)
    each = [linregress(logs, np.log(row)).slope for row in values]
    assert error == pytest.approx(np.std(each, ddof=1) / np.sqrt(5))


def test_the_over_specified_start_needs_all_three_experts():
    start = unit.near(unit.with_copies(unit.DENSE_TRUTH), torch.Generator().manual_seed(0))
    assert voronoi_cells(start.anchored(), unit.DENSE_TRUTH).tolist() == [0, 0, 1]
    assert minimum_top_k(start.anchored(), unit.DENSE_TRUTH, 2) == 3
    copies = unit.with_copies(unit.DENSE_TRUTH)
    assert copies.beta0.exp().tolist() == pytest.approx([0.5, 0.5, 1.0])
    model = GaussianMoE.from_params(start, gate="topk", top_k=2)
    assert unit.atoms_in_first_cell(model) == 2
    assert model.selected(torch.tensor([[0.5]], dtype=torch.float64)).tolist() == [[1, 1, 0]]


def test_the_truths_choose_where_the_setup_says():
    x = torch.tensor([[-0.5], [0.31], [0.33], [0.5]], dtype=torch.float64)
    sparse = GaussianMoE.from_params(unit.SPARSE_TRUTH, gate="topk", top_k=2)
    assert sparse.selected(x)[[0, 3]].tolist() == [[0, 1, 1], [1, 1, 0]]
    hard = GaussianMoE.from_params(unit.HARD_TRUTH, gate="topk", top_k=1, select_with_bias=True)
    assert hard.selected(x)[1:3].tolist() == [[0, 1], [1, 0]]


def test_hellinger_is_the_integral_of_scipys_densities():
    near = unit.near(unit.SPARSE_TRUTH, torch.Generator().manual_seed(0))
    x, y = np.linspace(0, 1, 2001)[:, None], np.linspace(-9, 9, 901)

    def root(p, side):
        pair = sorted((p.beta1[:, 0] * side).argsort(descending=True)[:2].tolist())
        logits = [(p.beta1[i].item() * side * x + p.beta0[i].item()) for i in pair]
        weights = np.exp(logits) / np.exp(logits).sum(0)
        parts = [
            norm.pdf(y, p.a[i].item() * side * x + p.b[i].item(), p.var[i].item() ** 0.5)
            for i in pair
        ]
        return np.sqrt(weights[0] * parts[0] + weights[1] * parts[1])

    squared = 0.0
    for side in (1, -1):
        gap = (root(near, side) - root(unit.SPARSE_TRUTH, side)) ** 2
        squared += simpson(simpson(gap, x=y), x=x[:, 0]) / 4
    both = (near, unit.SPARSE_TRUTH)
    model, true = (GaussianMoE.from_params(p, gate="topk", top_k=2) for p in both)
    distance = unit.hellinger(model, unit.root_density(true))
    assert distance == pytest.approx(np.sqrt(squared), rel=1e-3)


def test_loss_ignores_the_gates_anchor():
    model = GaussianMoE.from_params(unit.SPARSE_TRUTH, gate="topk", top_k=2)
    assert unit.regional_loss(model, unit.SPARSE_TRUTH, 2) == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        model.gate.bias += 3.0
        model.gate.weight -= 2.0
        model.b[0] += 0.1
    loss = unit.regional_loss(model, unit.SPARSE_TRUTH, 2)
    assert loss == pytest.approx(0.1 * np.exp(0.5))
