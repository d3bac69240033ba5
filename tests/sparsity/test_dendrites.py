"""Sparse patterns against sets of Python, and segments against a dense integer product."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchzoo.sparsity import SDR, DendriteSegments


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def as_sets(sdr):
    """The active cells of a batch of one dimension, as sets."""
    return [set(row.tolist()) - {sdr.n} for row in sdr.indices]


def filled(n=300, segments=6, seed=0, **options):
    """Segments that know one to four patterns each, and the patterns."""
    layer = DendriteSegments(n, segments, 40, 6, **options)
    stored = []
    for segment in range(segments):
        patterns = SDR.random(n, 20, (1 + segment % 4,), seeded(seed + segment))
        layer.store(patterns, segment, 10, seeded(seed + 50 + segment))
        stored.append(patterns)
    return layer, stored


@pytest.mark.claim(60, "Segments equal the dense integer product, thresholded")
@given(seed=st.integers(0, 1000), a=st.integers(0, 150))
@settings(max_examples=25, deadline=None)
def test_segments_equal_dense_product(seed, a):
    layer, _ = filled(seed=seed)
    inputs = SDR.random(300, a, (4, 7), seeded(seed))
    dense = torch.zeros(6, 300, dtype=torch.int64)
    for segment, cells in enumerate(layer.synapses.tolist()):
        for cell in cells:
            if cell < 300:
                dense[segment, cell] += 1
    expected = inputs.to_dense().long() @ dense.T
    assert dense.max() == 1
    for x in (inputs, inputs.to_dense()):
        assert torch.equal(layer.overlaps(x), expected)
        assert torch.equal(layer(x), expected >= 6)
    assert layer(inputs).dtype == torch.bool


@pytest.mark.claim(60, "Stored patterns always fire their segment, in unions too")
def test_stored_patterns_fire():
    layer, stored = filled()
    for segment, patterns in enumerate(stored):
        assert (layer.overlaps(patterns)[:, segment] >= 10).all()
        assert layer(patterns)[:, segment].all()
    assert layer.synapses.lt(300).sum(-1).tolist()[0] == 10
    assert layer.synapses.lt(300).sum(-1).tolist()[3] > 30


@pytest.mark.claim(60, "A neuron fires when any of its segments does")
def test_neurons():
    layer, stored = filled(segments_per_neuron=3)
    inputs = SDR(300, torch.cat([patterns.indices for patterns in stored]))
    fires = layer(inputs)
    assert 0 < fires.double().mean() < 1
    expected = torch.stack([fires[:, :3].any(-1), fires[:, 3:].any(-1)], -1)
    assert torch.equal(layer.neurons(inputs), expected)
    assert torch.equal(DendriteSegments(5, 3, 2, 1).neurons(SDR.random(5, 2)), torch.zeros(3) > 0)


@pytest.mark.claim(
    60, "The surrogate's gradient is that of sigmoid(overlap - theta + 1/2)", tolerance=1e-12
)
def test_surrogate_gradient():
    layer, _ = filled(surrogate="ste", segments_per_neuron=2)
    x = torch.rand(5, 300, generator=seeded(), dtype=torch.float64).requires_grad_()
    weight = torch.randn(5, 6, generator=seeded(1), dtype=torch.float64)
    y = layer(x)
    assert torch.equal(y, (layer.overlaps(x) >= 6).double())
    dense = torch.zeros(6, 301, dtype=torch.float64)
    dense = dense.scatter(-1, layer.synapses.long(), 1.0)[:, :300]
    overlap = x.detach() @ dense.T
    sigma = torch.sigmoid(overlap - 5.5)
    expected = (weight * sigma * (1 - sigma)) @ dense
    (found,) = torch.autograd.grad((y * weight).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    assert layer.neurons(x).shape == (5, 3)
    pattern = SDR.random(300, 20, generator=seeded())
    assert layer(pattern).dtype == torch.get_default_dtype()


def test_state_is_kept():
    layer, stored = filled()
    twin = DendriteSegments(300, 6, 40, 6)
    twin.load_state_dict(layer.state_dict())
    for other in (twin, copy.deepcopy(layer)):
        assert torch.equal(other(stored[3]), layer(stored[3]))
    layer.reset_parameters()
    assert not layer.overlaps(stored[3]).any()


def test_a_full_segment(tmp_path):
    layer = DendriteSegments(100, 2, 10, 3)
    one, two = (SDR(100, torch.arange(0, 8) + start) for start in (0, 4))
    layer.store(one, 0, 8)
    before = layer.synapses.clone()
    with pytest.raises(ValueError, match=r"^sdr: expected at most max_synapses = 10 .*got 12"):
        layer.store(two, 0, 8)
    assert torch.equal(layer.synapses, before)
    room = DendriteSegments(100, 2, 10, 3, grow=True)
    room.store(one, 0, 8)
    room.store(two, 0, 8)
    assert room.synapses[0].tolist() == list(range(12))
    assert room.synapses[1].tolist() == [100] * 12
    again = DendriteSegments.from_pretrained(room.save_pretrained(tmp_path / "model"))
    assert torch.equal(again.overlaps(two), room.overlaps(two))
    assert isinstance(nn.Sequential(room).state_dict()["0.synapses"], torch.Tensor)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda layer: layer.store(SDR.random(9, 5), 0, 4), "sdr"),
        (lambda layer: layer.store(SDR.random(8, 5), 2, 4), "segment"),
        (lambda layer: layer.store(SDR.random(8, 5), 0, 2), "s"),
        (lambda layer: layer.store(SDR.random(8, 5), 0, 6), "s"),
        (lambda layer: layer(torch.rand(2, 8)), "x"),
        (lambda layer: layer(SDR.random(9, 5)), "x"),
    ],
)
def test_errors_of_segments(call, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*got"):
        call(DendriteSegments(8, 2, 4, 3))


@pytest.mark.claim(60, "Packed bits are read back, at every width")
@given(n=st.integers(1, 200), seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_bits_round_trip(n, seed):
    dense = torch.rand(3, n, generator=seeded(seed)) < 0.3
    sdr = SDR.from_dense(dense)
    assert torch.equal(sdr.to_dense(), dense)
    words = sdr.bits()
    assert words.dtype == torch.uint64
    values = [sum(1 << cell for cell in cells) for cells in as_sets(sdr)]
    found = [sum(word << (64 * i) for i, word in enumerate(row)) for row in words.tolist()]
    assert found == values
    assert torch.equal(SDR.from_bits(n, words).indices, sdr.indices)


@pytest.mark.claim(60, "Overlap is the size of the intersection, either way round")
@given(seed=st.integers(0, 1000), density=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_overlap(seed, density):
    one = SDR.from_dense(torch.rand(6, 50, generator=seeded(seed)) < density)
    two = SDR.random(50, 12, (6,), seeded(seed))
    expected = [len(a & b) for a, b in zip(as_sets(one), as_sets(two), strict=True)]
    assert one.overlap(two).tolist() == two.overlap(one).tolist() == expected
    assert torch.equal(one.overlap(two[0]), two[0].overlap(one))
    assert one.overlap(one).tolist() == one.active.tolist()


@pytest.mark.claim(60, "Noise replaces round(eta a) cells by cells outside, and a stay active")
@pytest.mark.parametrize("eta", [0.0, 0.2, 0.33, 1.0])
def test_noise(eta):
    n, a = 60, 15
    pattern = SDR.random(n, a, (400,), seeded())
    noisy = pattern.noise(eta, seeded(1))
    assert noisy.indices.shape == (400, a)
    assert (noisy.active == a).all()
    assert (pattern.overlap(noisy) == a - round(eta * a)).all()


def test_noise_is_uniform():
    pattern = SDR(12, torch.tensor([0, 3, 4, 9]).expand(40_000, 4))
    share = pattern.noise(0.5, seeded()).to_dense().double().mean(0)
    expected = torch.full((12,), 2 / 8, dtype=torch.float64)
    expected[[0, 3, 4, 9]] = 0.5
    assert (share - expected).abs().max() < 4 * (0.25 / 40_000) ** 0.5


@pytest.mark.parametrize("a", [3, 18])  # by Floyd's algorithm, and by random keys
def test_random_patterns_are_uniform(a):
    n, trials = 20, 40_000
    drawn = SDR.random(n, a, (trials,), seeded())
    assert (drawn.active == a).all()
    dense = drawn.to_dense().double()
    pairs = dense.T @ dense / trials
    expected = torch.full((n, n), a * (a - 1) / (n * (n - 1)), dtype=torch.float64)
    expected.fill_diagonal_(a / n)
    assert (pairs - expected).abs().max() < 4.5 * (0.25 / trials) ** 0.5


def test_union_subsample_and_topk():
    sdr = SDR.from_dense(torch.rand(2, 5, 40, generator=seeded()) < 0.3)
    dense = sdr.to_dense()
    for dim in (0, 1, -1):
        axis = dim if dim >= 0 else 1
        assert torch.equal(sdr.union(dim).to_dense(), dense.any(axis))
    few = sdr.subsample(4, seeded(1))
    assert (few.active == 4).all()
    assert (few.overlap(sdr) == 4).all()
    shares = SDR(40, torch.arange(8).expand(20_000, 8)).subsample(2, seeded()).to_dense()
    assert (shares.double().mean(0)[:8] - 0.25).abs().max() < 4 * (0.19 / 20_000) ** 0.5
    x = torch.tensor([[0.1, 3.0, -1.0, 2.0]])
    assert SDR.topk(x, 2).indices.tolist() == [[1, 3]]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: SDR(0, torch.zeros(0).long()), "n"),
        (lambda: SDR(5, torch.tensor([0.0])), "indices"),
        (lambda: SDR(5, torch.tensor([6])), "indices"),
        (lambda: SDR(5, torch.tensor([-1])), "indices"),
        (lambda: SDR(5, torch.tensor([2, 3, 2])), "indices"),
        (lambda: SDR.random(5, 6), "a"),
        (lambda: SDR.from_dense(torch.zeros(3)), "dense"),
        (lambda: SDR.topk(torch.rand(3), 4), "k"),
        (lambda: SDR.from_bits(5, torch.zeros(2, dtype=torch.int64)), "bits"),
        (lambda: SDR.from_bits(5, torch.tensor([32])), "bits"),
        (lambda: SDR.random(5, 2).overlap(SDR.random(6, 2)), "other"),
        (lambda: SDR.random(5, 2).noise(1.5), "eta"),
        (lambda: SDR.random(5, 4).noise(1.0), "eta"),
        (lambda: SDR(5, torch.tensor([[1, 2], [1, 5]])).noise(0.5), "eta"),
        (lambda: SDR(5, torch.tensor([[1, 2], [1, 5]])).subsample(2), "s"),
        (lambda: SDR.random(5, 2).union(0), "dim"),
    ],
)
def test_errors_of_patterns(call, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*got"):
        call()
