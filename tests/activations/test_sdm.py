"""The SDM activation and its head against closed forms and loops over all pairs."""

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from torchzoo.activations import SDMHead, sdm_loss, sdm_softmax, sdm_training, train_sdm_head
from torchzoo.activations.sdm import SOFTMAX_Q
from torchzoo.activations.sdm_tables import cdf, class_table
from torchzoo.activations.sdm_training import view_calibration
from torchzoo.ops import knn


def drawn(*shape, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=g, dtype=torch.float64)


def uniform(*shape, seed=0, high=1.0):
    g = torch.Generator().manual_seed(seed)
    return high * torch.rand(*shape, generator=g, dtype=torch.float64)


# The activation


@pytest.mark.claim(
    141,
    "At q = e - 2, d = 1 it is softmax and cross entropy; at d = 0 uniform; for large q one-hot",
    tolerance=1e-6,
)
def test_limits():
    z, y = drawn(20, 5, scale=3.0), torch.arange(20) % 5
    one, zero = torch.ones(20).double(), torch.zeros(20).double()
    q = one * (math.e - 2)
    assert pytest.approx(math.e - 2) == SOFTMAX_Q
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(sdm_softmax(z, q, one), z.softmax(-1), **close)
    torch.testing.assert_close(sdm_softmax(z, q, one, log=True), z.log_softmax(-1), **close)
    torch.testing.assert_close(sdm_loss(z, y, q, one), F.cross_entropy(z, y), **close)
    some = 100 * uniform(20)
    torch.testing.assert_close(sdm_softmax(z, some, zero), torch.full_like(z, 0.2), **close)
    expected = (math.log(5) / (2 + some).log()).mean()
    torch.testing.assert_close(sdm_loss(z, y, some, zero), expected, **close)
    onehot = F.one_hot(z.argmax(-1), 5).double()
    z = z + onehot  # a clear maximum
    torch.testing.assert_close(sdm_softmax(z, one * 1e300, 0.9 * one), onehot, **close)


@pytest.mark.claim(
    141,
    "It equals (2 + q)^(d z) normalised, and the gradient of the loss is d (SDM - onehot)",
    tolerance=1e-12,
)
def test_definition_and_gradient():
    z, y = drawn(30, 4, scale=2.0).requires_grad_(), torch.arange(30) % 4
    q, d = torch.arange(30), uniform(30, seed=1)
    powers = (2 + q.double()[:, None]) ** (d[:, None] * z.detach())
    expected = powers / powers.sum(-1, keepdim=True)
    probabilities = sdm_softmax(z, q, d)
    torch.testing.assert_close(probabilities.detach(), expected, rtol=1e-12, atol=1e-12)
    logs = sdm_softmax(z, q, d, log=True).detach().numpy()
    exact = np.log(expected.numpy())
    np.testing.assert_allclose(logs, exact / np.log(2 + q.numpy())[:, None], atol=1e-12)
    natural = sdm_softmax(z, q, d, log=True, base="e").detach().numpy()
    np.testing.assert_allclose(natural, exact, atol=1e-12)
    (grad,) = torch.autograd.grad(sdm_loss(z, y, q, d), z)
    onehot = F.one_hot(y, 4)
    torch.testing.assert_close(grad * 30, d[:, None] * (expected - onehot), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda z: sdm_loss(z, y, q, d), (z,))


def test_a_distance_for_each_class():
    z, q, d = drawn(6, 3), torch.arange(6), uniform(6, 3)
    expected = torch.softmax(z * d * (2 + q.double()).log()[:, None], -1)
    torch.testing.assert_close(sdm_softmax(z, q, d), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        sdm_softmax(z[None, :], q[None, :], d[None, :])[0], expected, rtol=0, atol=1e-12
    )


@pytest.mark.claim(
    141, "The maximum stays where it is, and entropy falls strictly in q and in d", tolerance=None
)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    q=st.floats(0, 50),
    more=st.floats(0.1, 20),
    d=st.floats(0.05, 0.9),
    closer=st.floats(0.02, 0.1),
)
def test_monotone(seed, q, more, d, closer):
    z = drawn(4, seed=seed)

    def outcome(q, d):
        p = sdm_softmax(z, torch.tensor(q).double(), torch.tensor(d).double())
        return p.argmax(), float(torch.special.entr(p).sum())

    place, entropy = outcome(q, d)
    assert place == z.argmax()
    for other in (outcome(q + more, d), outcome(q, d + closer)):
        assert other[0] == z.argmax()
        assert other[1] < entropy


def test_half_precision_and_compile():
    z, q, d = drawn(6, 3).float(), torch.arange(6), uniform(6).float()
    p = sdm_softmax(z.bfloat16(), q, d)
    assert p.dtype == torch.bfloat16
    exact = sdm_softmax(z.bfloat16().double(), q, d.double()).float()
    torch.testing.assert_close(p.float(), exact, rtol=1e-2, atol=1e-2)
    compiled = torch.compile(sdm_softmax, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z, q, d), sdm_softmax(z, q, d))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.tensor([-1.0, 0.0])}, "q: expected values of at least 0, got -1"),
        ({"q": torch.ones(3)}, r"q: expected the shape of z without .*got \(3,\)"),
        ({"d": torch.tensor([0.5, 1.5])}, r"d: expected values in \[0, 1\], got 0.5 to 1.5"),
        ({"d": torch.tensor([0.5, math.nan])}, "d: expected values in"),
        ({"d": torch.ones(2, 4)}, r"d: expected the shape of q or z, got \(2, 4\)"),
        ({"base": "2"}, "base: expected 'q' or 'e', got '2'"),
    ],
)
def test_what_is_refused(change, message):
    options = {"z": torch.zeros(2, 3), "q": torch.zeros(2), "d": torch.ones(2)} | change
    with pytest.raises(ValueError, match=message):
        sdm_softmax(**options)
    with pytest.raises(ValueError, match="target"):
        sdm_loss(torch.zeros(2, 3), torch.zeros(3).long(), torch.zeros(2), torch.ones(2))


# The head: similarity and distance

CLASSES = 3


def fitted(n=200, seed=0, q_max=1000, **options):
    """A head in float64 with training points, about a fifth of them predicted wrong."""
    torch.manual_seed(seed)
    head = SDMHead(6, CLASSES, exemplar_dim=4, q_max=q_max, dtype=torch.float64, **options)
    with torch.no_grad():
        head.classifier.bias.zero_()
        head.adaptor.bias.zero_()
    e = drawn(n, 6, seed=seed)
    pred = head(e).logits.argmax(-1)
    wrong = uniform(n, seed=seed + 1) < 0.2
    y = torch.where(wrong, (pred + 1) % CLASSES, pred)
    head.fit_support([(e[: n // 2], y[: n // 2]), (e[n // 2 :], y[n // 2 :])])
    return head, e, y


def brute_q(head, h, pred, skip=None, most=1000):
    """The run of agreeing neighbours, by sorting all distances of one point."""
    order = sorted(
        (float((h.detach() - s).square().sum()), j) for j, s in enumerate(head.support) if j != skip
    )
    run = 0
    for _, j in order[:most]:
        if not (head.support_labels[j] == head.support_predictions[j] == pred):
            break
        run += 1
    return run, math.sqrt(order[0][0])


@pytest.mark.claim(
    141,
    "q equals brute force on 200 points, with and without the point itself; a far point changes "
    "none",
    tolerance=0,
)
@pytest.mark.parametrize("q_max", [1000, 3])
def test_similarity(q_max):
    head, e, _ = fitted(q_max=q_max)
    other = drawn(80, 6, seed=5)
    for points, own in ((e, True), (e, False), (other, False)):
        logits, h = head(points)
        pred = logits.argmax(-1)
        expected = [
            brute_q(head, h[i], pred[i], i if own else None, q_max)[0] for i in range(len(h))
        ]
        q = head.similarity(h, pred, exclude_self=own)
        assert q.tolist() == expected
        assert len(set(expected)) >= min(q_max, 5)
    assert head.similarity(h.view(8, 10, 4), pred.view(8, 10)).flatten().tolist() == expected
    head.support = torch.cat([head.support, torch.full((1, 4), 1e6).double()])
    head.support_labels = torch.cat([head.support_labels, torch.tensor([0])])
    head.support_predictions = torch.cat([head.support_predictions, torch.tensor([1])])
    assert head.similarity(h, pred).tolist() == expected


@pytest.mark.claim(
    141, "d is the least share, over the classes, of known distances that are not nearer", 0
)
def test_distance():
    head, e, y = fitted()
    h, pred = head(e).exemplar.detach(), head.support_predictions
    pairs = [brute_q(head, h[i], pred[i], i) for i in range(200)]
    known = [
        [near for (run, near), label in zip(pairs, y.tolist(), strict=True) if run and label == c]
        for c in range(CLASSES)
    ]
    assert min(map(len, known)) > 10
    assert len(set(y.tolist())) == CLASSES
    # a wrong point can have q > 0: it counts with its true class
    assert any(run and a != b for (run, _), a, b in zip(pairs, y, pred, strict=True))
    for points, own in ((e, True), (drawn(80, 6, seed=5), False)):
        g = head(points).exemplar
        near = [brute_q(head, g[i], 0, i if own else None)[1] for i in range(len(g))]
        expected = [min(1 - np.mean(np.array(k) < v - 1e-12) for k in known) for v in near]
        np.testing.assert_allclose(
            head.distance(g, exclude_self=own).numpy(), expected, rtol=0, atol=1e-12
        )


@pytest.mark.claim(
    141,
    "d is 0 beyond all known distances or where a class has none, and 1 below all of them; "
    "scaling h by 3 changes neither q nor d",
    tolerance=0,
)
def test_extremes_of_distance():
    head, e, _ = fitted()
    h = head(e).exemplar
    assert (head.distance(h + 1e3) == 0).all()
    assert (head.distance(h) == 1).all(), "on a training point"
    known = head.distances[head.distances.isfinite()]
    assert head.quantile(known.max() + 1e-9 + torch.zeros(1))[0] == 0
    assert head.quantile(head.distances[:, 0].min()[None])[0] == 1

    other = drawn(50, 6, seed=5)
    g, pred = head(other).exemplar, head(other).logits.argmax(-1)
    q, d = head.similarity(g, pred), head.distance(g)
    assert len(d.unique()) > 10
    head.support = 3 * head.support
    near, run = head.search(3 * h, head.support_predictions, exclude_self=True)
    head.set_distances(near, head.support_labels, run)
    assert torch.equal(head.similarity(3 * g, pred), q)
    assert torch.equal(head.distance(3 * g), d)

    none_of_1 = torch.where(head.support_labels == 1, 0, run)
    head.set_distances(near, head.support_labels, none_of_1)
    assert (head.distance(3 * h) == 0).all()


def test_chunks_do_not_matter(monkeypatch):
    head, e, _ = fitted()
    logits, h = head(e)
    before = head.similarity(h, logits.argmax(-1)), head.distance(h + 0.1)
    monkeypatch.setattr(sys.modules["torchzoo.ops.knn"], "_CHUNK_ENTRIES", 700)
    assert torch.equal(head.similarity(h, logits.argmax(-1)), before[0])
    assert torch.equal(head.distance(h + 0.1), before[1])


def test_an_index_of_ones_own():
    head, e, _ = fitted()
    logits, h = head(e)
    pred = logits.argmax(-1)
    expected = [
        (head.similarity(h, pred, exclude_self=own), head.distance(h, exclude_self=own))
        for own in (False, True)
    ]
    head.index = lambda h, k: knn(h, head.support, k)
    for own, (q, d) in zip((False, True), expected, strict=True):
        assert torch.equal(head.similarity(h, pred, exclude_self=own), q)
        assert torch.equal(head.distance(h, exclude_self=own), d)


def test_adaptors_and_normalisation():
    linear = SDMHead(6, 3, exemplar_dim=4)
    conv = SDMHead(6, 3, exemplar_dim=4, adaptor="conv")
    with torch.no_grad():
        conv.adaptor.weight.copy_(linear.adaptor.weight[:, None])
        conv.adaptor.bias.copy_(linear.adaptor.bias)
    conv.classifier.load_state_dict(linear.classifier.state_dict())
    e = 5 + 2 * drawn(40, 6).float()
    torch.testing.assert_close(conv(e), linear(e))
    through = conv.adaptor(e[:, None])[..., 0]
    torch.testing.assert_close(conv(e).exemplar, through)
    linear.fit_normalization([(e[:30], None), (e[30:], None)])
    assert linear.mean.item() == pytest.approx(e.double().mean().item(), rel=1e-6)
    assert linear.std.item() == pytest.approx(e.double().numpy().std(ddof=1), rel=1e-6)
    standard = (e - linear.mean) / linear.std
    torch.testing.assert_close(linear(e).exemplar, linear.adaptor(standard))
    off = SDMHead(6, 3, exemplar_dim=4, normalize=False)
    off.load_state_dict(linear.state_dict())
    torch.testing.assert_close(off(e).exemplar, linear.adaptor(e))


def test_state_of_a_fitted_head(tmp_path):
    head, e, y = fitted()
    twin = SDMHead(6, CLASSES, exemplar_dim=4, dtype=torch.float64)
    twin.load_state_dict(head.state_dict())
    saved = SDMHead.from_pretrained(head.save_pretrained(tmp_path / "head"))
    again = SDMHead.from_pretrained(twin.save_pretrained(tmp_path / "twin"))
    logits, h = head(drawn(30, 6, seed=5))
    for other in (twin, saved, again):
        assert torch.equal(other.distance(h), head.distance(h))
        assert torch.equal(
            other.similarity(h, logits.argmax(-1)), head.similarity(h, logits.argmax(-1))
        )
    head.fit_support([(e, y)], dtype=torch.float16)
    assert head.support.dtype == torch.float16
    assert (head.distance(h) - twin.distance(h)).abs().mean() < 0.02
    head.reset_parameters()
    with pytest.raises(ValueError, match="support: expected training points, got none"):
        head.distance(h)


def test_what_the_head_refuses():
    head, e, y = fitted()
    with pytest.raises(ValueError, match="labels: expected integers"):
        head.fit_support([(e, y + 1)])
    with pytest.raises(ValueError, match="loader: expected at least 2"):
        head.fit_support([(e[:1], y[:1])])
    with pytest.raises(ValueError, match=r"h: expected \(..., 4\), got \(200, 6\)"):
        head.distance(e)
    with pytest.raises(ValueError, match=r"pred: expected shape \(200,\)"):
        head.similarity(head(e).exemplar, y[:3])


def test_tables():
    values = torch.tensor([5.0, 1.0, 1.0, 3.0, 2.0])
    table, counts = class_table(values, torch.tensor([0, 0, 0, 0, 1]), 3)
    asked = torch.tensor([[1.0, 2.0, 0.0], [1.5, 2.5, 9.0], [5.0, 1.0, 0.0], [9.0, 9.0, 9.0]])
    expected = [[0.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.75, 0.0, 0.0], [1.0, 1.0, 0.0]]
    assert cdf(table, counts, asked).tolist() == expected
    expected[0][1] = expected[2][0] = 1.0
    assert cdf(table, counts, asked, saturate=True).tolist() == expected


# Training


def blobs(n, seed, noise=1.0):
    y = torch.arange(n) % CLASSES
    centres = 3 * torch.eye(CLASSES, 6)
    return (centres[y] + noise * drawn(n, 6, seed=seed).float()), y


def test_training_uses_the_epoch_before(monkeypatch):
    """The losses are those of a loop written out, epoch by epoch, with full batches."""
    train, calibration = blobs(60, 0), blobs(45, 1)
    torch.manual_seed(0)
    head = SDMHead(6, CLASSES, exemplar_dim=5)
    twin = SDMHead(6, CLASSES, exemplar_dim=5)
    twin.load_state_dict(head.state_dict())
    history = train_sdm_head(head, train, calibration, epochs=4, batch_size=60, lr=0.02)

    twin.fit_normalization([train])
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.02)
    e, y = train
    losses, medians, weights = [], [], []
    for epoch in range(4):
        z, h = twin(e)
        q, d = torch.full((60,), math.e - 2), torch.ones(60)
        if epoch:
            twin.fit_support([train])
            q = twin.similarity(h, z.argmax(-1), exclude_self=True)
            d = twin.distance(h, exclude_self=True)
            q = torch.where((d == 0) & (z.argmax(-1) != 0), 0, q)
        base = 2 + q.float()
        loss = -(torch.log_softmax(z * (d * base.log())[:, None], -1)[range(60), y] / base.log())
        loss.mean().backward()
        losses.append(loss.mean().item())
        optimizer.step(), optimizer.zero_grad()
        twin.fit_support([train])
        z, h = twin(calibration[0])
        q = twin.similarity(h, z.argmax(-1)).numpy()
        nearest = knn(h, twin.support, 1)[0][:, 0]
        twin.set_distances(nearest, calibration[1], torch.as_tensor(q))
        q = np.where((twin.distance(h) == 0).numpy() & (z.argmax(-1) != 0).numpy(), 0, q)
        medians.append(np.mean([np.median(q[calibration[1] == c]) for c in range(CLASSES)]))
        weights.append(twin.classifier.weight.detach().clone())
    np.testing.assert_allclose([epoch.loss for epoch in history], losses, rtol=1e-4)
    np.testing.assert_allclose([epoch.median_q for epoch in history], medians, rtol=1e-6)
    best = 3 - int(np.argmax(medians[::-1]))
    torch.testing.assert_close(head.classifier.weight, weights[best], rtol=1e-4, atol=1e-5)
    assert len(head.support) == 60


def test_warm_up_and_selection():
    train, calibration = blobs(60, 0, noise=2.0), blobs(45, 1, noise=2.0)

    def run(**options):
        torch.manual_seed(0)
        head = SDMHead(6, CLASSES, exemplar_dim=5)
        g = torch.Generator().manual_seed(0)
        return head, train_sdm_head(
            head, train, calibration, epochs=4, batch_size=20, lr=0.02, generator=g, **options
        )

    plain, one, three = (run(warm_up_epochs=w)[1] for w in (0, 1, 3))
    assert one == plain
    assert three[0] == plain[0]
    assert three[1].loss != plain[1].loss
    head, history = run(select="balanced_accuracy")
    z = head(calibration[0]).logits.argmax(-1)
    reached = np.mean([(z == c)[calibration[1] == c].float().mean() for c in range(CLASSES)])
    assert reached == pytest.approx(max(epoch.balanced_accuracy for epoch in history), abs=1e-6)
    with pytest.raises(ValueError, match="select"):
        run(select="loss")
    with pytest.raises(ValueError, match="epochs"):
        train_sdm_head(head, train, calibration, epochs=0)


def test_of_equal_epochs_the_last_is_kept(monkeypatch):
    weights = []

    def watched(head, e, y):
        weights.append(head.classifier.weight.detach().clone())
        return view_calibration(head, e, y)

    monkeypatch.setattr(sdm_training, "view_calibration", watched)
    torch.manual_seed(0)
    head = SDMHead(6, CLASSES, exemplar_dim=5)
    history = train_sdm_head(
        head,
        blobs(60, 0, noise=0.3),
        blobs(45, 1, noise=0.3),
        epochs=8,
        lr=0.02,
        select="balanced_accuracy",
    )
    reached = [epoch.balanced_accuracy for epoch in history]
    assert reached[-2:] == [max(reached)] * 2
    assert not torch.equal(weights[-1], weights[-2])
    assert torch.equal(head.classifier.weight, weights[-1])
