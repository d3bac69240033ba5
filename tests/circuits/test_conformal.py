"""Conformal sets: coverage over many repeats, thresholds by numpy, and certificates."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

from torchzoo.circuits import (
    COLEP,
    KnowledgeCircuit,
    KnowledgeMixture,
    ball_bounds,
    conformal_quantile,
)

CLASSES, SIZE = 3, 5
TABLE = torch.tensor([[1, 0], [1, 1], [0, 1]]).bool()
RULES = [(c, 3 + a if TABLE[c, a] else ~(3 + a), 1.0) for c in range(3) for a in range(2)]


def reasoner():
    return KnowledgeCircuit(SIZE, RULES, dtype=torch.float64)


def draw(n, seed, noise=1.2):
    """Exchangeable points: noisy detectors of three classes and two attributes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (n,), generator=generator)
    concepts = torch.cat([torch.eye(CLASSES).bool()[y], TABLE[y]], 1)
    logits = 2.0 * concepts.double() - 1
    logits += noise * torch.randn(n, SIZE, generator=generator, dtype=torch.float64)
    return logits.sigmoid(), concepts, y


def colep(**options):
    return COLEP(reasoner(), CLASSES, **options)


def hits(sets, y):
    return sets.gather(1, y[:, None])[:, 0].double()


@pytest.mark.claim(
    21,
    "Mean coverage over 200 repeats is in [1 - alpha - 0.01, 1], for both allocations and scores",
    tolerance=0.01,
)
@pytest.mark.parametrize("allocation", ["union", "mondrian"])
@pytest.mark.parametrize("score", ["hps", "aps"])
def test_coverage(allocation, score):
    model = colep(alpha=0.2, allocation=allocation, score=score)
    generator = torch.Generator().manual_seed(5)
    pi, concepts, y = draw(200 * 300, 0)
    covered = []
    for rows in torch.arange(len(y)).split(300):
        fit, new = rows[:200], rows[200:]
        model.calibrate(pi[fit], concepts[fit], generator=generator)
        covered.append(hits(model.predict(pi[new], generator=generator), y[new]).mean())
    mean = torch.stack(covered).mean().item()
    assert 0.79 <= mean <= 1
    if allocation == "mondrian":  # the quantile of each class's own points is not slack
        assert mean <= 0.8 + 0.04


@pytest.mark.claim(
    21,
    "Over 100 splits, coverage is within the 99 % binomial interval of its nominal level where "
    "thresholds have no slack",
)
def test_coverage_is_binomial_over_splits():
    pi, _, _ = draw(100 * 120, 3)
    # one class alone: the union bound is over it only, and 90 of 100 scores are the threshold's
    one = COLEP(KnowledgeCircuit(1, []), 1, alpha=0.1)
    count = 0
    for rows in torch.arange(12_000).split(120):
        own = pi[rows, :1]
        one.calibrate(own[:99], torch.ones(99, 1))
        count += int(one.predict(own[99:100]).sum())
    low, high = binom.interval(0.99, 100, 0.9)
    assert low <= count <= high


@pytest.mark.claim(
    21, "The full level alpha for every class, taken over all points, misses more often than alpha"
)
def test_naive_levels_fail():
    # Hard cases are of one class each, so that the misses of thresholds over all points add up.
    generator = torch.Generator().manual_seed(0)
    n, alpha, classes = 30_000, 0.1, 10
    y = torch.randint(0, classes, (n,), generator=generator)
    labels = torch.eye(classes).bool()[y]
    pi = 0.3 * torch.rand(n, classes, generator=generator)
    pi[labels] = 0.7 * torch.rand(n, generator=generator)  # scores of label 1 are the largest
    naive = COLEP(KnowledgeCircuit(classes, []), classes, alpha=alpha)
    fit, new = slice(0, n // 2), slice(n // 2, n)
    scores = torch.where(labels, 1 - pi, pi)[fit]
    for j in range(classes):
        naive.qhat[j] = conformal_quantile(scores[:, j], alpha)
    assert hits(naive.predict(pi[new]), y[new]).mean() < 1 - alpha - 0.2
    for allocation in ("union", "mondrian"):
        model = COLEP(KnowledgeCircuit(classes, []), classes, alpha=alpha, allocation=allocation)
        model.calibrate(pi[fit], labels[fit])
        assert hits(model.predict(pi[new]), y[new]).mean() >= 1 - alpha - 0.01


@pytest.mark.claim(
    21, "Thresholds are those of split conformal prediction written in numpy", tolerance=1e-12
)
def test_thresholds_by_numpy():
    pi, concepts, _ = draw(400, 1)
    p = reasoner()(pi).numpy()
    true = concepts.numpy()
    score = 1 - np.where(true, p, 1 - p)
    model = colep(alpha=0.2, alpha_cert=0.002)
    model.calibrate(pi, concepts)
    rank = math.ceil(401 * (1 - (0.2 - 0.002 * SIZE) / SIZE))
    expected = np.sort(score, 0)[rank - 1]
    np.testing.assert_allclose(model.qhat.double(), expected, atol=1e-6)
    mondrian = colep(alpha=0.2, allocation="mondrian")
    mondrian.calibrate(pi, concepts)
    for j in range(CLASSES):
        own = np.sort(score[true[:, j], j])
        expected = own[math.ceil((len(own) + 1) * 0.8) - 1]
        assert mondrian.qhat[j].item() == pytest.approx(expected, abs=1e-6)
    assert mondrian.qhat[CLASSES:].isinf().all()


@pytest.mark.claim(21, "APS scores are the randomised cumulative mass", tolerance=1e-12)
def test_aps_scores():
    model, grid = colep(score="aps"), torch.linspace(0, 1, 41, dtype=torch.float64)
    for u in (0.0, 0.3, 1.0):
        draws = torch.full_like(grid, u)
        found = model._scores(grid, grid, draws)
        exact = torch.where(grid >= 0.5, grid - u * grid, 1 - grid + grid - u * grid)
        torch.testing.assert_close(found[0], exact, rtol=0, atol=1e-12)
        torch.testing.assert_close(found[1], exact, rtol=0, atol=1e-12)
        for i in range(0, 40, 4):  # extremes over intervals
            low, high = (grid[k].expand(1) for k in (i, i + 5 if i + 5 < 41 else 40))
            fine = torch.linspace(low.item(), high.item(), 1001, dtype=torch.float64)
            s = torch.where(fine >= 0.5, (1 - u) * fine, 1 - u * fine)
            best, worst = model._scores(low, high, torch.full((1,), u, dtype=torch.float64))
            assert best.item() == pytest.approx(s.min().item(), abs=2e-3)
            assert worst.item() == pytest.approx(s.max().item(), abs=2e-3)
            assert best.item() <= s.min().item() + 1e-12
            assert worst.item() >= s.max().item() - 1e-12


@pytest.mark.claim(
    21, "Where the rank is above n the threshold is infinite or refused, never the largest score"
)
@pytest.mark.parametrize(("n", "infinite"), [(8, True), (9, False), (18, False)])
def test_too_few_points(n, infinite):
    scores = torch.arange(1.0, n + 1)
    found = conformal_quantile(scores, 0.1)
    assert found.isinf() == infinite
    assert infinite or found == scores[math.ceil(round((n + 1) * 0.9, 9)) - 1]
    pi, concepts, _ = draw(48, 0)
    with pytest.raises(ValueError, match="pi: got 48 points, expected at least 49"):
        colep(alpha=0.1).calibrate(pi, concepts)
    with pytest.raises(ValueError, match="points of class 0, expected at least 99"):
        colep(alpha=0.01, allocation="mondrian").calibrate(pi, concepts)
    assert colep().predict(pi).all()  # before calibration all sets are full


class HalfSpaces:
    """Smoothed votes of half-spaces: exact values, and the worst point of the ball."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.normal = torch.randn(SIZE, 4, generator=generator, dtype=torch.float64)
        self.normal /= self.normal.norm(dim=1, keepdim=True)

    def points(self, n, seed):
        generator = torch.Generator().manual_seed(seed)
        y = torch.randint(0, CLASSES, (n,), generator=generator)
        concepts = torch.cat([torch.eye(CLASSES).bool()[y], TABLE[y]], 1)
        x = (2.0 * concepts.double() - 1) @ torch.linalg.pinv(self.normal).T
        x = 1.5 * x + torch.randn(n, 4, generator=generator, dtype=torch.float64)
        return x, concepts, y

    def smoothed(self, x, shift=0.0):
        return torch.special.ndtr(x @ self.normal.T / 0.5 + shift)


@pytest.mark.claim(
    21,
    "Certified coverage is at most the worst-case coverage of a linear detector, known in closed "
    "form, in at least 95 of 100 and 190 of 200 repeats at beta 0.05, and near it",
)
def test_certified_coverage_is_a_lower_bound():
    model, radius = HalfSpaces(), 0.3
    # a single class: its set's worst case in the ball is at the point nearest to the boundary
    one = COLEP(KnowledgeCircuit(1, []), 1, alpha=0.2)
    x, _, _ = model.points(40_000, 9)
    exact = model.smoothed(x)[:, :1]
    worst = model.smoothed(x, -radius / 0.5)[:, 0]
    lo, hi = ball_bounds(exact, exact, sigma=0.5, radius=radius)
    torch.testing.assert_close(lo[:, 0], worst)
    truth = torch.ones(200, 1)
    below, gaps = 0, []
    for repeat in range(200):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(repeat))
        fit, certify = order[:100], order[100:300]
        one.calibrate(exact[fit], truth[:100])
        bound = one.certified_coverage(lo[certify], hi[certify], truth, beta=0.05)
        coverage = (1 - worst <= one.qhat[0]).double().mean().item()
        below += bound <= coverage
        gaps.append(coverage - bound)
    assert below >= binom.ppf(0.01, 200, 0.95)
    assert np.mean(gaps) < 0.08


@pytest.mark.claim(
    21,
    "Through reasoning too, certified coverage is at most the coverage at every point of the ball "
    "that is tried, and at radius 0 it is the clean value up to its interval",
)
def test_certified_coverage_with_reasoning():
    model, radius = HalfSpaces(), 0.2
    fit, fit_concepts, _ = model.points(300, 0)
    x, concepts, y = model.points(400, 1)
    made = colep(alpha=0.2)
    made.calibrate(model.smoothed(fit), fit_concepts)
    pi = model.smoothed(x)
    ends = ball_bounds(pi, pi, sigma=0.5, radius=radius)
    kept = made.covered(*ends, concepts)
    assert 0.2 < kept.double().mean() < 1
    generator = torch.Generator().manual_seed(3)
    for _ in range(60):
        way = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        moved = x + radius * way / way.norm(dim=1, keepdim=True)
        covered = hits(made.predict(model.smoothed(moved)), y)
        assert (covered >= kept.double()).all()
    clean = hits(made.predict(pi), y)
    assert torch.equal(made.covered(pi, pi, concepts).double(), clean)
    low, _ = binom.interval(0.998, 400, clean.mean().item())
    assert made.certified_coverage(pi, pi, concepts) <= clean.mean()
    assert made.certified_coverage(pi, pi, concepts) >= low / 400 - 0.02
    certain = colep(alpha=0.2, alpha_cert=0.01)
    certain.qhat.copy_(made.qhat)
    loss = made.certified_coverage(*ends, concepts) - certain.certified_coverage(*ends, concepts)
    assert loss == pytest.approx(0.01 * SIZE)


@pytest.mark.claim(21, "A certified set contains the set at every point of the ball, the clean too")
@pytest.mark.parametrize("options", [{}, {"prune": True}, {"score": "aps"}])
def test_certified_set_contains_clean_set(options):
    model, radius = HalfSpaces(), 0.2
    fit, concepts, _ = model.points(300, 0)
    made = colep(alpha=0.3, **options)
    made.calibrate(model.smoothed(fit), concepts, generator=torch.Generator().manual_seed(0))
    x, concepts, y = model.points(300, 2)
    seen = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    attacked = x + radius * seen / seen.norm(dim=1, keepdim=True)
    pi = model.smoothed(attacked)
    lo, hi = ball_bounds(pi, pi, sigma=0.5, radius=radius)
    sets = made.predict_certified(lo, hi, generator=torch.Generator().manual_seed(7))
    clean = made.predict(model.smoothed(x), generator=torch.Generator().manual_seed(7))
    assert (sets >= clean).all()
    assert sets.sum() > clean.sum()
    assert hits(sets, y).mean() >= 0.7
    assert not sets.all()
    kept = made.covered(lo, hi, concepts, generator=torch.Generator().manual_seed(7))
    own = made.predict(pi, generator=torch.Generator().manual_seed(7))
    assert (hits(own, y) >= kept.double()).all()


def test_pruning_drops_what_attributes_rule_out():
    made = COLEP(KnowledgeCircuit(3, [(0, 2, 0.0), (1, ~2, 0.0)]), 2, prune=True)
    made.qhat.copy_(torch.tensor([1.0, 1.0, 0.3]))
    found = made.predict(torch.tensor([[0.5, 0.5, 0.9], [0.5, 0.5, 0.1], [0.5, 0.5, 0.5]]))
    assert found.tolist() == [[True, False], [False, True], [True, True]]  # the last set is empty
    lo = torch.tensor([[0.4, 0.4, 0.6], [0.4, 0.4, 0.8]])
    labels = torch.tensor([[1, 0, 1], [1, 0, 1]])
    assert made.covered(lo, lo + 0.1, labels).tolist() == [False, True]
    absent = torch.tensor([[0.4, 0.4, 0.1], [0.4, 0.4, 0.2], [0.4, 0.4, 0.25]])
    labels = torch.tensor([[0, 1, 0]]).expand(3, -1)  # 0.3 and more of attribute 2 is too much
    assert made.covered(absent, absent + 0.08, labels).tolist() == [True, True, False]
    lo = torch.tensor([[0.4, 0.4, 0.1], [0.4, 0.4, 0.8], [0.4, 0.4, 0.1]])
    hi = torch.tensor([[0.6, 0.6, 0.2], [0.6, 0.6, 0.9], [0.6, 0.6, 0.6]])
    certified = made.predict_certified(lo, hi)
    assert certified.tolist() == [[False, True], [True, False], [False, True]]


def test_mixture_reasons_too():
    parts = [KnowledgeCircuit(SIZE, RULES[i::2], dtype=torch.float64) for i in range(2)]
    made = COLEP(KnowledgeMixture(parts), CLASSES, alpha=0.2, alpha_cert=0.001)
    pi, concepts, y = draw(500, 0)
    made.calibrate(pi[:300], concepts[:300])
    assert hits(made.predict(pi[300:]), y[300:]).mean() > 0.75
    ends = (pi[300:] - 0.01).clamp_min(0), (pi[300:] + 0.01).clamp_max(1)
    assert made.certified_coverage(*ends, concepts[300:]) > 0.6
    again = COLEP(KnowledgeMixture(parts), CLASSES)
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.qhat, made.qhat)


def test_bad_input_is_refused():
    pi, concepts, _ = draw(60, 0)
    with pytest.raises(ValueError, match="prune: got True with 'mondrian'"):
        colep(prune=True, allocation="mondrian")
    with pytest.raises(ValueError, match=r"concepts: got \(60, 3\)"):
        colep().calibrate(pi, concepts[:, :3])
    with pytest.raises(ValueError, match="concepts: got 0 classes in row 0"):
        colep().calibrate(pi, torch.zeros(60, SIZE))
    with pytest.raises(ValueError, match="concepts: got values other than 0 and 1"):
        colep().calibrate(pi, 0.5 * concepts)
    with pytest.raises(ValueError, match="pi: got values from"):
        colep().calibrate(pi + 1, concepts)
    with pytest.raises(ValueError, match="level: got 1"):
        conformal_quantile(torch.ones(3), 1)
    with pytest.raises(ValueError, match=r"scores: got shape \(3, 1\)"):
        conformal_quantile(torch.ones(3, 1), 0.1)
