"""Error rates of sparse patterns against SciPy's distributions, enumeration and simulation."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, hypergeom

from torchzoo.sparsity import (
    SDR,
    capacity,
    optimal_threshold,
    repeated_error,
    sdr_false_negative,
    sdr_false_positive,
    sdr_log_pmf,
    sdr_union_false_positive,
)
from torchzoo.testing.statistics import assert_within_se

TRIALS = 200_000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@st.composite
def sizes(draw, matching=False):
    n = draw(st.integers(2, 400))
    a = draw(st.integers(1, n))
    s = draw(st.integers(1, min(a if matching else n, 60)))
    return n, a, s, draw(st.integers(1, s))


@pytest.mark.claim(
    60, "False positives are the tail of the hypergeometric distribution", tolerance=1e-10
)
@given(case=sizes())
@settings(max_examples=80, deadline=None)
def test_false_positive_is_scipys(case):
    n, a, s, theta = case
    expected = hypergeom.sf(theta - 1, n, s, a)
    np.testing.assert_allclose(float(sdr_false_positive(n, a, s, theta)), expected, 1e-10, 1e-300)


@pytest.mark.claim(60, "False positives have the values computed beforehand", tolerance=1e-7)
def test_false_positive_values():
    n, a, s, theta = torch.tensor(
        [[200, 20, 10, 4], [1000, 40, 20, 5], [2048, 40, 20, 10], [10000, 300, 20, 9]]
    ).T
    expected = [0.0104757649, 7.914933e-4, 3.9105893e-13, 2.195160e-9]
    found = sdr_false_positive(n, a, s, theta)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=3e-7)
    scipys = hypergeom.sf(theta.numpy() - 1, n.numpy(), s.numpy(), a.numpy())
    np.testing.assert_allclose(found.numpy(), scipys, rtol=1e-10)


@pytest.mark.claim(60, "Overlap probabilities sum to 1 and are those of every pattern listed")
def test_pmf_by_enumeration():
    n, a, s = 9, 4, 3
    hits = [len(set(active) & set(range(s))) for active in itertools.combinations(range(n), a)]
    expected = np.bincount(hits, minlength=6) / len(hits)
    b = torch.arange(6)
    np.testing.assert_allclose(sdr_log_pmf(b, n, a, s).exp().numpy(), expected, rtol=1e-12)
    assert sdr_log_pmf(-1, n, a, s).item() == -math.inf
    totals = sdr_log_pmf(torch.arange(61), 500, torch.tensor([[0], [40], [490]]), 60).exp()
    np.testing.assert_allclose(totals.sum(-1).numpy(), 1, rtol=1e-12)


@pytest.mark.claim(60, "At theta = 1 it is 1 - C(n-s, a) / C(n, a)", tolerance=1e-12)
def test_threshold_of_one():
    for n, a, s in ((200, 20, 10), (50, 1, 7), (2000, 40, 15)):
        expected = 1 - math.comb(n - s, a) / math.comb(n, a)
        assert float(sdr_false_positive(n, a, s, 1)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.claim(60, "The logarithm is finite and exact where the probability underflows")
def test_logarithm_of_tiny_probabilities():
    for n, a, s in ((10**6, 20_000, 100), (10**6, 2_000, 150)):
        found = float(sdr_false_positive(n, a, s, s, log=True))
        exact = math.comb(n - s, a - s), math.comb(n, a)
        expected = math.log(exact[0]) - math.log(exact[1])
        assert found == pytest.approx(expected, rel=1e-9)  # as exact as the two large logarithms
        terms = [math.log((a - i) / (n - i)) for i in range(s)]
        assert found == pytest.approx(math.fsum(terms), rel=1e-13)
    union = sdr_union_false_positive(10**6, 2000, 30, 30, 2, log=True)
    assert union.exp() < 1e-40
    assert union.isfinite()


@pytest.mark.claim(60, "2e5 random patterns match the false-positive rate within 4 s.e.")
def test_false_positive_by_simulation():
    pattern = SDR.random(200, 20, generator=seeded(1)).subsample(10, seeded(2))
    inputs = SDR.random(200, 20, (TRIALS,), seeded(3))
    fires = (inputs.overlap(pattern) >= 4).double()
    assert_within_se(fires, sdr_false_positive(200, 20, 10, 4))


@pytest.mark.claim(60, "2e5 noisy patterns match the false-negative rate within 4 s.e.")
@pytest.mark.parametrize("eta", [0.2, 0.5])
@pytest.mark.parametrize("model", ["replace", "drop"])
def test_false_negative_by_simulation(eta, model):
    n, a, s, theta = 200, 20, 10, 7
    pattern = SDR.random(n, a, generator=seeded(1))
    synapses = pattern.subsample(s, seeded(2))
    if model == "replace":
        copies = SDR(n, pattern.indices.expand(TRIALS, a))
        overlap = copies.noise(eta, seeded(3)).overlap(synapses)
    else:
        kept = torch.rand(TRIALS, s, generator=seeded(3)) >= eta
        overlap = kept.sum(-1)
    assert_within_se((overlap < theta).double(), sdr_false_negative(a, s, theta, eta, model=model))


@pytest.mark.claim(
    60,
    "Lost synapses are hypergeometric where cells are replaced, binomial where each drops by "
    "itself",
    tolerance=1e-10,
)
@given(case=sizes(matching=True), noise=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_false_negative_is_scipys(case, noise):
    _, a, s, theta = case
    lost = round(noise * a)
    replaced = hypergeom.sf(s - theta, a, s, lost)
    dropped = binom.sf(s - theta, s, noise)
    found = [float(sdr_false_negative(a, s, theta, noise, model=m)) for m in ("replace", "drop")]
    np.testing.assert_allclose(found, [replaced, dropped], 1e-9, 1e-290)


@pytest.mark.claim(
    60, "Unions by their mean size, and averaged over their size, are as computed", tolerance=1e-4
)
def test_union_values():
    count = torch.tensor([5, 10, 20])
    mean = sdr_union_false_positive(2000, 40, 10, 6, count)
    exact = sdr_union_false_positive(2000, 40, 10, 6, count, exact=True)
    sizes = [round(2000 * (1 - 0.995**m)) for m in count.tolist()]
    np.testing.assert_allclose(mean.numpy(), hypergeom.sf(5, 2000, sizes, 40), rtol=1e-10)
    assert mean.tolist() == pytest.approx([3.611e-4, 1.1754e-2, 0.17633], rel=1.4e-4)  # 4 digits
    assert exact.tolist() == pytest.approx([3.4232e-4, 1.16501e-2, 0.175750], rel=1e-4)
    logs = sdr_union_false_positive(2000, 40, 10, 6, count, exact=True, log=True)
    torch.testing.assert_close(logs.exp(), exact, rtol=1e-12, atol=0)


@pytest.mark.claim(60, "The exact form is the mean over all pairs of patterns listed")
def test_union_by_enumeration():
    n, a, s, theta = 7, 3, 2, 2
    sets = [set(c) for c in itertools.combinations(range(n), s)]
    sizes = [len(one | two) for one in sets for two in sets]
    expected = np.mean([hypergeom.sf(theta - 1, n, size, a) for size in sizes])
    found = sdr_union_false_positive(n, a, s, theta, torch.tensor([1, 2]), exact=True)
    assert found.tolist() == pytest.approx([hypergeom.sf(1, n, s, a), expected], rel=1e-12)


@pytest.mark.claim(60, "2e5 random unions match the exact form within 4 s.e.")
@pytest.mark.parametrize("count", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (10, 20))])
def test_union_by_simulation(count):
    n, a, s, theta = 2000, 40, 10, 6
    hits = torch.zeros(TRIALS, a + 1, dtype=torch.bool)  # of the input 0..39, by symmetry
    generator = seeded(count)
    for _ in range(count):
        cells = SDR.random(n, s, (TRIALS,), generator).indices.clamp_max(a)
        hits.scatter_(-1, cells, True)
    fires = (hits[:, :a].sum(-1) >= theta).double()
    assert_within_se(fires, sdr_union_false_positive(n, a, s, theta, count, exact=True))


@pytest.mark.claim(60, "Errors are monotone in threshold, sizes, noise and number of patterns")
def test_monotone():
    def falls(values):
        return (values.diff() < 0).all()

    assert falls(sdr_false_positive(1000, 40, 20, torch.arange(1, 21)))
    assert falls(sdr_false_positive(torch.arange(200, 3000, 100), 40, 20, 5))
    assert falls(-sdr_false_positive(1000, torch.arange(10, 200, 10), 20, 5))
    assert falls(-sdr_false_positive(1000, 40, torch.arange(5, 40), 5))
    for exact in (False, True):
        count = torch.arange(1, 12)
        assert falls(-sdr_union_false_positive(2000, 40, 10, 6, count, exact=exact))
    assert falls(-sdr_false_negative(40, 20, torch.arange(12, 21), 0.3))
    for model in ("replace", "drop"):
        assert falls(-sdr_false_negative(40, 20, 12, torch.arange(0.3, 0.7, 0.1), model=model))


@pytest.mark.claim(
    60, "Doubling a large n divides the false-positive rate by 2^theta", tolerance=0.02
)
def test_power_law():
    small, large = sdr_false_positive(torch.tensor([10**6, 2 * 10**6]), 40, 20, 5)
    assert float(large / small) == pytest.approx(2**-5, rel=0.02)


@pytest.mark.claim(60, "The optimal threshold and its error are as computed", tolerance=1e-3)
@pytest.mark.parametrize(
    ("model", "noise", "theta", "total"),
    [
        ("drop", 0.3, 6, 6.844e-6),
        ("drop", 0.5, 5, 8.669e-4),
        ("replace", 0.3, 7, 1.793e-6),
        ("replace", 0.5, 5, 4.796e-4),
    ],
)
def test_optimal_threshold(model, noise, theta, total):
    found = optimal_threshold(10000, 200, 24, noise, model=model)
    assert int(found.theta) == theta
    assert float(found.p_fp + found.p_fn) == pytest.approx(total, rel=1e-3)


@pytest.mark.claim(60, "No threshold has a lower cost, and ties go to the lowest")
@given(
    case=sizes(matching=True),
    noise=st.floats(0, 1),
    cost=st.floats(0, 50),
    count=st.integers(1, 4),
)
@settings(max_examples=40, deadline=None)
def test_optimal_threshold_by_search(case, noise, cost, count):
    n, a, s, _ = case
    found = optimal_threshold(n, a, s, noise, cost=cost, num_patterns=count)
    totals = [
        float(sdr_union_false_positive(n, a, s, t, count))
        + cost * float(sdr_false_negative(a, s, t, noise))
        for t in range(1, s + 1)
    ]
    best = float(found.p_fp + cost * found.p_fn)
    assert best == pytest.approx(min(totals), rel=1e-9)
    assert best == pytest.approx(totals[int(found.theta) - 1], rel=1e-9)
    assert all(total > best * (1 - 1e-9) for total in totals[: int(found.theta) - 1])
    again = optimal_threshold(n, a, torch.tensor([[s, 1]]), noise, cost=cost, num_patterns=count)
    assert int(again.theta[0, 0]) == int(found.theta)
    assert int(again.theta[0, 1]) == 1


def test_ties_go_to_the_lowest_threshold():
    found = optimal_threshold(10, 5, 5, 1.0, cost=0.0)  # only false alarms count
    assert int(found.theta) == 5
    found = optimal_threshold(10, 10, 5, 0.0)  # every input has all cells active
    assert int(found.theta) == 1


@pytest.mark.claim(60, "Capacity is the last number of patterns whose union stays below the error")
def test_capacity():
    n = torch.tensor([[1000], [2000], [8000]])
    theta = torch.tensor([5, 6, 8])
    found = capacity(n, 40, 10, theta, 1e-3)
    within = sdr_union_false_positive(n, 40, 10, theta, found.clamp_min(1)) <= 1e-3
    assert torch.equal(within, found > 0)
    assert (sdr_union_false_positive(n, 40, 10, theta, found + 1) > 1e-3).all()
    assert found[2, 2] > 30
    assert int(capacity(50, 20, 10, 2, 0.01)) == 0


@pytest.mark.claim(
    60, "At least one error in J tries: 1 - (1 - p)^J, for tiny p too", tolerance=1e-12
)
def test_repeated_error():
    p = torch.tensor([0.3, 1e-18], dtype=torch.float64)
    assert repeated_error(p, 7).tolist() == pytest.approx([1 - 0.7**7, 7e-18], rel=1e-12)


def test_broadcasting():
    found = sdr_false_positive(torch.tensor([[500], [1000]]), 40, torch.tensor([10, 15, 20]), 3)
    assert found.shape == (2, 3)
    assert found[1, 2] == sdr_false_positive(1000, 40, 20, 3)
    none = torch.ones(2, 0).long()
    assert sdr_union_false_positive(900, 40, 10, 3, none, exact=True).shape == (2, 0)
    assert sdr_false_positive(none, 1, 1, 1).shape == (2, 0)
    assert sdr_false_negative(none, 1, 1, 0.5, model="drop").shape == (2, 0)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: sdr_false_positive(10, 11, 3, 1), "a"),
        (lambda: sdr_false_positive(10, 5, 11, 1), "s"),
        (lambda: sdr_false_positive(10, 5, 3, 0), "theta"),
        (lambda: sdr_false_positive(10, 5, 3, 4), "theta"),
        (lambda: sdr_false_positive(10, 5.0, 3, 1), "a"),
        (lambda: sdr_log_pmf(1, -10, 5, 3), "n"),
        (lambda: sdr_false_negative(5, 6, 1, 0.1), "s"),
        (lambda: sdr_false_negative(5, 3, 1, 1.1), "noise"),
        (lambda: sdr_false_negative(5, 3, 1, 0.1, model="lose"), "model"),
        (lambda: sdr_union_false_positive(10, 5, 3, 1, 0), "num_patterns"),
        (lambda: optimal_threshold(10, 5, 6, 0.1), "s"),
        (lambda: optimal_threshold(10, 5, 0, 0.1), "s"),
        (lambda: optimal_threshold(10, 5, 3, 0.1, cost=-1.0), "cost"),
        (lambda: optimal_threshold(10, 5, 3, 0.1, num_patterns=0), "num_patterns"),
        (lambda: capacity(10, 5, 3, 2, 1.0), "max_error"),
        (lambda: capacity(10, 1, 3, 2, 0.1), "theta"),
    ],
)
def test_errors_name_the_argument(call, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*got"):
        call()
