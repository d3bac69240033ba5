"""The SDM calibrator against a loop over points and a search over all candidates."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchzoo.activations import (
    SDMCalibrator,
    SDMHead,
    SDMNetwork,
    dkw_band,
    find_region,
    train_sdm_head,
)
from torchzoo.activations import sdm_estimator as module
from torchzoo.activations.sdm_region import bin_medians, cauchy_spread, fit_rescaler, rescale
from torchzoo.activations.sdm_training import SDMEpoch, view_calibration

CLASSES = 3


def points(n, seed, noise=0.6, wrong=0.0):
    """Clusters on the axes, in float64, some of the labels wrong."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % CLASSES
    e = 3 * torch.eye(CLASSES, 6, dtype=torch.float64)[y]
    e = e + noise * torch.randn(n, 6, generator=g, dtype=torch.float64)
    flip = torch.rand(n, generator=g) < wrong
    return e, torch.where(flip, (y + 1) % CLASSES, y)


def fitted(alpha=0.9, seed=0, noise=0.6, wrong=0.02):
    torch.manual_seed(seed)
    head = SDMHead(6, CLASSES, exemplar_dim=8, dtype=torch.float64)
    train, calibration = points(300, seed, noise, wrong), points(300, seed + 1, noise, wrong)
    g = torch.Generator().manual_seed(seed)
    train_sdm_head(head, train, calibration, epochs=12, lr=3e-3, generator=g)
    return SDMCalibrator(alpha).fit(head, [calibration]), calibration


@pytest.fixture(scope="module")
def calibrated():
    return fitted()


# The region


def slow_region(p, qt, y, alpha):
    """Every candidate from below, every class sorted anew."""
    classes = range(p.shape[1])
    for candidate in sorted(set(qt.tolist())):
        psi = []
        for c in classes:
            own = sorted(p[(qt >= candidate) & (y == c), c].tolist())
            psi.append(own[min(int((1 - alpha) * len(own)), len(own) - 1)] if own else 0.0)
        if min(psi) >= alpha:
            return candidate, psi
    return math.inf, [0.0] * p.shape[1]


@pytest.mark.claim(
    141,
    "The threshold search equals one that tries every candidate; of each true class a share of "
    "alpha then has p_c >= psi_c >= alpha",
    tolerance=0,
)
@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(0, 60),
    alpha=st.sampled_from([0.6, 0.75, 0.9, 0.95]),
    sharp=st.floats(1, 12),
    noise=st.floats(0, 0.4),
    seed=st.integers(0, 999),
)
def test_region(n, alpha, sharp, noise, seed):
    """Outputs that sharpen with the bin, bins that tie, and labels that are wrong."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (n,), generator=g)
    pred = torch.where(torch.rand(n, generator=g) < noise, 1 - y, y)
    qt = 1 + torch.randint(8, (n,), generator=g).double() / 2
    lead = sharp * qt * torch.rand(n, generator=g).double()
    p = torch.softmax(torch.stack([0 * lead, lead], -1), -1)
    p = torch.where(pred[:, None] == 0, p.flip(-1), p)
    found = find_region(p, qt, y, alpha)
    least, psi = slow_region(p, qt, y, alpha)
    assert found.qt_min.item() == least
    assert found.psi.tolist() == psi
    if math.isfinite(least):
        for c in range(2):
            own = p[(qt >= least) & (y == c), c]
            assert found.psi[c] >= alpha
            assert (own >= found.psi[c]).double().mean() >= alpha - 1e-12


def test_the_region_is_by_true_class():
    """Label noise within predicted class 0: by prediction it would pass, by truth it must not."""
    n = 100
    y = torch.tensor([0] * n + [1] * n)
    p = torch.tensor([[0.99, 0.01]] * (n + 15) + [[0.01, 0.99]] * (n - 15)).double()
    qt = torch.full((2 * n,), 2.0).double()
    assert not find_region(p, qt, y, 0.9).qt_min.isfinite()
    assert find_region(p, qt, y, 0.8).qt_min == 2


@pytest.mark.claim(141, "The band of 100 values at 0.95 has a half width of 0.13581", 1e-5)
def test_band():
    n = torch.tensor([100, 0, 1, 50])
    band = dkw_band(n, 0.95).tolist()
    assert band[0] == pytest.approx(0.13581, abs=1e-5)
    assert band[1] == 1
    assert band[3] == pytest.approx(band[0] * math.sqrt(2), rel=1e-6)


# The calibrator, a point at a time


def share(values, v):
    """Empirical distribution, saturated at the largest value."""
    values = sorted(values)
    if not values:
        return 0.0
    return 1.0 if v >= values[-1] else sum(u < v for u in values) / len(values)


def softmax(scores):
    scores = np.exp(scores - scores.max())
    return scores / scores.sum()


class Reference:
    """The estimator written out for one point, from the paper."""

    def __init__(self, head, calibration, alpha, weight):
        self.head, self.alpha, self.weight = head, alpha, weight
        e, y = calibration
        z, h = (t.detach().numpy() for t in head(e))
        self.y = y.tolist()
        self.support = head.support.numpy()
        self.right = (head.support_labels == head.support_predictions).tolist()
        self.known = [[] for _ in range(CLASSES)]
        looked = [self.look(*row) for row in zip(z, h, strict=True)]
        for (q, near), c in zip(looked, self.y, strict=True):
            if q:
                self.known[c].append(near)
        outputs = [self.activate(*row) for row in zip(z, looked, strict=True)]
        self.outputs = [
            [o[0][c] for o, label in zip(outputs, self.y, strict=True) if label == c]
            for c in range(CLASSES)
        ]
        states = [self.quantiles(*row) for row in zip(z, outputs, strict=True)]
        self.v, self.q = [s[0] for s in states], [s[1] for s in states]
        self.pred = [int(row.argmax()) for row in z]
        rows = zip(self.v, self.q, self.pred, strict=True)
        self.qt, self.p = zip(*(self.estimate(*row) for row in rows), strict=True)
        self.bins = [
            [t for t, label in zip(self.qt, self.y, strict=True) if label == c]
            for c in range(CLASSES)
        ]
        rows = [i for i in range(len(e)) if self.qt[i] >= 1 and self.p[i].argmax() == self.pred[i]]
        p, qt = torch.tensor(np.array(self.p)), torch.tensor(self.qt)
        self.qt_min, self.psi = slow_region(p[rows], qt[rows], y[rows], alpha)

    def look(self, z, h):
        order = np.argsort(((self.support - h) ** 2).sum(-1), kind="stable")
        run = 0
        for j in order:
            if not (self.right[j] and self.head.support_labels[j] == z.argmax()):
                break
            run += 1
        return run, float(np.linalg.norm(self.support[order[0]] - h))

    def activate(self, z, looked):
        q, near = looked
        below = [sum(u < near for u in k) / len(k) if k else 1.0 for k in self.known]
        d = min(1 - b for b in below)
        return softmax(z * d * math.log(2 + q)), q, d

    def quantiles(self, z, output):
        p, q, _ = output
        v = np.array([share(self.outputs[c], p[c]) for c in range(CLASSES)])
        return v, q if p.argmax() == z.argmax() else 0

    def estimate(self, v, q, pred):
        qt = v[pred] * math.log(2 + q)
        return qt, softmax(self.weight @ v * math.log(2 + qt))

    def predict(self, z, h, bound):
        output = self.activate(z, self.look(z, h))
        v, q = self.quantiles(z, output)
        pred = int(z.argmax())
        qt, p = self.estimate(v, q, pred)
        if bound == "lower":
            qt = qt if p.argmax() == pred else 0
            counts = [sum(t < qt for t in self.bins[c]) for c in range(CLASSES)]
            eps = [math.sqrt(math.log(2 / (1 - self.alpha)) / 2 / n) if n else 1.0 for n in counts]
            v = np.clip([v[c] + (-eps[c] if c == pred else eps[c]) for c in range(CLASSES)], 0, 1)
            qt, p = self.estimate(v, q, pred)
        qt = qt if p.argmax() == pred else 0
        chosen = {c for c in range(CLASSES) if p[c] >= self.psi[c]}
        accept = qt >= 1 and qt >= self.qt_min and chosen == {pred}
        return pred, p[pred], accept, qt, output[1], output[2]


@pytest.mark.claim(
    141,
    "A calibrator's tables, region and predictions equal the paper's steps done a point at a time",
    tolerance=1e-9,
)
@pytest.mark.parametrize("bound", ["lower", "centroid"])
def test_reference(calibrated, bound):
    calibrator, calibration = calibrated
    head = calibrator.head
    twin = Reference(head, calibration, 0.9, calibrator.rescaler.numpy())
    assert calibrator.qt_min.item() == pytest.approx(twin.qt_min, abs=1e-12)
    assert math.isfinite(twin.qt_min)
    np.testing.assert_allclose(calibrator.psi.numpy(), twin.psi, atol=1e-12)
    near, far = points(60, 7), points(30, 8, noise=4.0)
    e = torch.cat([near[0], far[0], 50 * near[0][:5]])
    z, h = (t.detach().numpy() for t in head(e))
    expected = list(
        zip(*(twin.predict(*row, bound) for row in zip(z, h, strict=True)), strict=True)
    )
    found = calibrator.predict(e, bound=bound)
    assert found.label.tolist() == list(expected[0])
    np.testing.assert_allclose(found.p_lower.numpy(), expected[1], atol=1e-9)
    assert found.accept.tolist() == list(expected[2])
    np.testing.assert_allclose(found.qt.numpy(), expected[3], atol=1e-9)
    assert found.q.tolist() == list(expected[4])
    np.testing.assert_allclose(found.d.numpy(), expected[5], atol=1e-12)
    assert found.accept[:60].any()
    assert not found.accept[-5:].any()
    first = np.linalg.norm(h[:, None] - head.support.numpy(), axis=-1).argsort(1)[:, :10]
    np.testing.assert_array_equal(found.neighbours.numpy(), first)


@pytest.mark.claim(
    141, "Each of the four conditions of acceptance can refuse a prediction", tolerance=0
)
@pytest.mark.parametrize(
    ("qt_min", "psi"),
    [(3.0, 0.5), (0.0, 0.3), (0.0, 0.05)],
    ids=["a low bin for the region", "outside of all bins", "several classes"],
)
def test_conditions_of_acceptance(calibrated, qt_min, psi):
    fixed, calibration = calibrated
    calibrator = copy.deepcopy(fixed)
    calibrator.qt_min.fill_(qt_min)
    calibrator.psi.fill_(psi)
    twin = Reference(calibrator.head, calibration, 0.9, calibrator.rescaler.numpy())
    twin.qt_min, twin.psi = qt_min, [psi] * CLASSES
    e = torch.cat([points(60, 7)[0], points(60, 8, noise=2.0)[0]])
    rows = zip(*(t.detach().numpy() for t in calibrator.head(e)), strict=True)
    expected = [twin.predict(*row, "centroid")[2] for row in rows]
    assert any(expected)
    assert calibrator.predict(e, bound="centroid").accept.tolist() == expected


def test_the_region_leaves_out_points_whose_rescaled_output_disagrees(calibrated, monkeypatch):
    fixed, (e, y) = calibrated
    outputs, regions = [], []

    def moved(v, weight, qt):
        p = rescale(v, weight, qt)
        p[::7] = p[::7].roll(1, -1)
        outputs.append((p, qt))
        return p

    def watched(p, qt, y, alpha):
        regions.append((p, qt, y))
        return find_region(p, qt, y, alpha)

    monkeypatch.setattr(module, "rescale", moved)
    monkeypatch.setattr(module, "find_region", watched)
    head = copy.deepcopy(fixed.head)
    SDMCalibrator(0.9).fit(head, [(e, y)])
    ((p, qt),) = outputs
    agree = p.argmax(-1) == head(e).logits.argmax(-1)
    assert ((qt >= 1) & ~agree).any()
    inside = (qt >= 1) & agree
    (found,) = regions
    assert all(map(torch.equal, found, (p[inside], qt[inside], y[inside])))


def test_rescaler():
    """The loss is convex: L-BFGS from elsewhere finds no less than Adam from the identity."""
    g = torch.Generator().manual_seed(0)
    y = torch.randint(3, (200,), generator=g)
    noisy = torch.where(torch.rand(200, generator=g) < 0.2, (y + 1) % 3, y)
    v = (torch.rand(200, 3, generator=g) + nn.functional.one_hot(noisy, 3)).double() / 2
    qt = 4 * torch.rand(200, generator=g).double()

    def loss(weight):
        logs = torch.log_softmax((2 + qt).log()[:, None] * (v @ weight.T), -1)
        return -(logs[range(200), y] / (2 + qt).log()).mean()

    weight = torch.randn(3, 3, generator=g).double().requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(weight)
        value.backward()
        return value

    optimizer.step(closure)
    ours = fit_rescaler(v, qt, y)
    assert not ours.requires_grad
    assert loss(weight) - 1e-9 <= loss(ours) < loss(torch.eye(3).double()) - 0.01
    longer = fit_rescaler(v, qt, y, steps=1500)
    assert float(loss(longer)) == pytest.approx(loss(weight).item(), abs=1e-5)
    expected = torch.softmax((2 + qt).log()[:, None] * (v @ ours.T), -1)
    torch.testing.assert_close(rescale(v, ours, qt), expected)


@pytest.mark.claim(
    141,
    "Saved and loaded, by state dict or as safetensors, it predicts the same; so it does in other "
    "chunks",
    tolerance=0,
)
def test_saving(calibrated, tmp_path, monkeypatch):
    calibrator, _ = calibrated
    e = torch.cat([points(40, 9)[0], points(20, 9, noise=3.0)[0]])
    expected = calibrator.predict(e)
    torch.save(calibrator.state_dict(), tmp_path / "state.pt")
    twin = SDMCalibrator(0.9, head=SDMHead(6, CLASSES, exemplar_dim=8, dtype=torch.float64))
    twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    saved = SDMCalibrator.from_pretrained(calibrator.save_pretrained(tmp_path / "model"))
    network = SDMNetwork(nn.Identity(), calibrator)
    for other in (twin.predict(e), saved.predict(e), network.verify(e), network(e)):
        assert all(map(torch.equal, other, expected))
    chosen = network.select(e)
    assert torch.equal(chosen >= 0, expected.accept)
    assert torch.equal(chosen[chosen >= 0], expected.label[expected.accept])
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    knn_module = __import__("sys").modules["torchzoo.ops.knn"]
    monkeypatch.setattr(knn_module, "_CHUNK_ENTRIES", 1000)
    assert all(map(torch.equal, calibrator.predict(e), expected))
    assert calibrator.predict(e[:0]).label.shape == (0,)


@pytest.mark.claim(
    141, "An empty region is said to be one, and nothing is accepted in it", tolerance=None
)
def test_empty_region():
    calibrator, calibration = fitted(alpha=0.999, noise=2.5, wrong=0.3)
    assert calibrator.accepts_nothing
    assert not calibrator.predict(calibration[0]).accept.any()


# Repeated runs


def test_spread():
    values = torch.tensor([1.0, 5.0, 2.0, 9.0]).double()
    expected = 2.0 * math.tan(math.pi * 0.45)  # median 3.5; deviations 2.5, 1.5, 1.5, 5.5
    assert cauchy_spread(values, 0.95) == pytest.approx(expected)
    many = torch.tensor([1.0, 2.0, 3.0, math.inf]).double()
    assert cauchy_spread(many, 0.95) == pytest.approx(1.0 * math.tan(math.pi * 0.45))
    assert cauchy_spread(torch.tensor([1.0, math.inf, math.inf]).double(), 0.95) == 0
    assert cauchy_spread(torch.tensor([4.0]), 0.95) == 0


def test_medians_of_bins():
    p = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.6, 0.4], [0.2, 0.8]])
    pred, hard = torch.tensor([0, 0, 0, 1]), torch.tensor([1, 1, 2, 0])
    found = bin_medians(p, pred, hard, 3).numpy()
    np.testing.assert_allclose(found, [[np.nan, 0.8, 0.6], [0.8, np.nan, np.nan]], rtol=1e-6)


def test_several_runs(monkeypatch):
    """Bounds are the best run's, widened by the spread of runs that are looked at from outside."""
    e, y = points(360, 3, wrong=0.02)
    seen, histories = [], []

    def calibrate(self, head, *args):
        seen.append((head, args, SDMCalibrator._calibrate(self, head, *args)))
        return seen[-1][2]

    class Watched(SDMCalibrator):
        _calibrate = calibrate

    def train(*args, **options):
        histories.append(train_sdm_head(*args, **options))
        return histories[-1]

    monkeypatch.setattr(module, "train_sdm_head", train)
    torch.manual_seed(0)
    head = SDMHead(6, CLASSES, exemplar_dim=8, dtype=torch.float64)
    options = {"epochs": 8, "lr": 3e-3}
    calibrator = Watched(0.9, num_runs=4).fit(
        head, [(e, y)], generator=torch.Generator().manual_seed(0), **options
    )
    assert [len(args[1]) for _, args, _ in seen] == [180] * 4
    for _, (inner, _), _ in seen[1:]:
        assert not torch.equal(inner, seen[0][1][0]), "another split"
    kernels = {round(float(h.adaptor.weight.detach().sum()), 9) for h, _, _ in seen}
    assert len(kernels) == 4, "another start"

    medians = [max(epoch.median_q for epoch in history) for history in histories]
    best = 3 - int(np.argmax(medians[::-1]))
    torch.testing.assert_close(head.adaptor.weight, seen[best][0].adaptor.weight)
    runs = [run for _, _, run in seen]
    least = torch.stack([run.region.qt_min for run in runs])
    expected = runs[best].region.qt_min + cauchy_spread(least, 0.9)
    assert calibrator.qt_min == expected
    assert calibrator.qt_min > runs[best].region.qt_min
    assert torch.equal(calibrator.psi, runs[best].region.psi)
    for c in range(CLASSES):
        for b in range(calibrator.offsets.shape[1]):
            some = torch.stack([run.medians[c, b] for run in runs])
            some = some[~some.isnan()]
            spread = cauchy_spread(some, 0.9) if len(some) else 0.0
            assert calibrator.offsets[c, b].item() == spread
    assert (calibrator.offsets > 0).any()

    found, offsets = calibrator.predict(e), calibrator.offsets.clone()
    calibrator.offsets = torch.zeros_like(offsets)
    plain = calibrator.predict(e)
    lowered = (plain.p_lower - offsets[plain.label, plain.qt.long()]).clamp(0, 1)
    torch.testing.assert_close(found.p_lower, lowered, rtol=0, atol=1e-12)
    assert (found.accept <= plain.accept).all()
    again = SDMCalibrator(0.9, num_runs=4).fit(
        head, [(e, y)], generator=torch.Generator().manual_seed(0), **options
    )
    assert torch.equal(again.predict(e).p_lower, found.p_lower)


def test_the_view_measures_against_itself(calibrated):
    calibrator, (e, y) = calibrated
    view = view_calibration(calibrator.head, e, y)
    flipped = view.sdm.argmax(-1) != view.pred
    assert flipped.any()
    assert (view.q[flipped] == 0).all()
    run = calibrator.head.similarity(calibrator.head(e).exemplar, view.pred)
    assert torch.equal(view.q[~flipped], run[~flipped])
    counts = [int(((y == c) & (run > 0)).sum()) for c in range(CLASSES)]
    assert calibrator.head.distance_counts.tolist() == counts
    assert SDMEpoch._fields == ("loss", "median_q", "balanced_accuracy")


def test_what_is_refused(calibrated):
    for alpha in (0.5, 1.0, 0.2):
        with pytest.raises(ValueError, match="alpha: expected a probability above 1/2"):
            SDMCalibrator(alpha)
    with pytest.raises(ValueError, match="num_runs"):
        SDMCalibrator(num_runs=0)
    head = SDMHead(6, CLASSES, exemplar_dim=8, dtype=torch.float64)
    e, y = points(30, 0)
    with pytest.raises(ValueError, match="support: expected training points, got none"):
        SDMCalibrator().fit(head, [(e, y)])
    head.fit_support([(e, y)])
    with pytest.raises(ValueError, match=r"loader: expected points of every class, got none of"):
        SDMCalibrator().fit(head, [(e[y != 1], y[y != 1])])
    with pytest.raises(ValueError, match="head: expected a calibrated one"):
        SDMCalibrator().predict(e)
    calibrator, _ = calibrated
    with pytest.raises(ValueError, match="bound: expected 'lower' or 'centroid', got 'upper'"):
        calibrator.predict(e, bound="upper")
    with pytest.raises(ValueError, match=r"e: expected \(N, in_features\), got \(6,\)"):
        calibrator.predict(e[0])
