"""The codec: exact round trips, code lengths near the ideal, containers that notice damage."""

import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchzoo.circuits import (
    CategoricalLeaf,
    Circuit,
    CircuitCodec,
    CircuitPrior,
    GaussianLeaf,
    balanced,
    hclt,
    linear,
    rat_spn,
)
from torchzoo.circuits.learning import em_fit, init_from_data
from torchzoo.ops import _rans, ordered_matmul


def circuit(num_variables=6, categories=5, units=4, seed=0, **options):
    torch.manual_seed(seed)
    parents = [-1, *((i - 1) // 2 for i in range(1, num_variables))]
    return Circuit(hclt(parents), CategoricalLeaf(categories), num_units=units, **options)


@pytest.fixture(scope="module")
def trained():
    """A circuit fitted to samples of two clusters, and samples of the same."""
    generator = torch.Generator().manual_seed(0)
    cluster = torch.randint(0, 2, (700, 1), generator=generator)
    noise = torch.randint(0, 3, (700, 24), generator=generator)
    x = (cluster * 9 + noise * torch.randint(0, 2, (700, 24), generator=generator)).clamp(0, 15)
    made = circuit(24, 16, 4)
    init_from_data(made, x[:500], generator=generator)
    em_fit(made, x[:500], epochs=5, pseudocount=0.05, leaf_pseudocount=0.02)
    return made, x[500:]


CASES = {
    "random": lambda n, d, c: torch.randint(0, c, (n, d)),
    "constant": lambda n, d, c: torch.full((n, d), c - 1),
    "strided": lambda n, d, c: torch.randint(0, c, (2 * d, n)).T[:, ::2],
}


@pytest.mark.claim(82, "Every integer sample comes back bit for bit", tolerance=0)
@settings(max_examples=25, deadline=None)
@given(
    n=st.sampled_from([0, 1, 2, 9]),
    d=st.sampled_from([1, 2, 7]),
    c=st.sampled_from([2, 5, 256]),
    case=st.sampled_from(list(CASES)),
    block_size=st.sampled_from([1, 4, 256]),
    dtype=st.sampled_from([torch.uint8, torch.int16, torch.int64]),
    seed=st.integers(0, 9),
)
def test_round_trip(n, d, c, case, block_size, dtype, seed):
    torch.manual_seed(seed)
    x = CASES[case](n, d, c).to(dtype)
    codec = CircuitCodec(circuit(d, c, 3, seed), block_size=block_size)
    found = codec.decode(codec.encode(x))
    assert found.dtype == dtype
    assert torch.equal(found, x)


@pytest.mark.parametrize("schedule", ["tour", "paper"])
@pytest.mark.parametrize(
    ("graph", "options"),
    [
        (balanced(6), {}),
        (linear(6), {"num_leaf_units": 2}),
        (rat_spn(6, depth=2), {}),
        (balanced(6, [5, 0, 3, 1, 2, 4]), {"sum": "tucker"}),
        (linear(6), {"sum": "tucker", "num_leaf_units": 5}),
        (hclt([1, 2, -1, 2, 2, 4]), {"tie": "all"}),
    ],
)
def test_round_trip_of_every_structure(graph, options, schedule):
    torch.manual_seed(0)
    made = Circuit(graph, CategoricalLeaf(4), num_units=3, **options)
    codec = CircuitCodec(made, block_size=4, schedule=schedule)
    x = torch.randint(0, 4, (10, 6))
    assert torch.equal(codec.decode(codec.encode(x)), x)


@pytest.mark.claim(
    82, "Bytes don't depend on how samples are batched, and blocks of any size decode", tolerance=0
)
def test_batches_don_t_matter(trained):
    made, x = trained
    codec = CircuitCodec(made, block_size=16)
    whole = codec.encode(x)
    for size in (1, 7, 64):
        assert b"".join(codec.encode_iter(x.split(size))) == whole
    for block_size in (1, 256):
        assert torch.equal(codec.decode(CircuitCodec(made, block_size=block_size).encode(x)), x)


def test_samples_that_the_circuit_rules_out(trained):
    """Values of probability 0 cost bits but come back; so does what follows them."""
    made = circuit(6, 5, 3)
    with torch.no_grad():
        made.leaf.logits[:, 2:] = -torch.inf
    x = torch.randint(0, 5, (20, 6))
    codec = CircuitCodec(made)
    assert torch.equal(codec.decode(codec.encode(x)), x)


@pytest.mark.claim(
    82,
    "A block of B samples takes at most its ideal bits + 64 + 0.012 B D at precision 24, and is "
    "within 72 bits of what its integer tables say",
)
@pytest.mark.parametrize("adversarial", [False, True])
def test_code_length(trained, adversarial):
    made, x = trained
    if adversarial:
        x = torch.randint(0, 16, x.shape, generator=torch.Generator().manual_seed(1))
    length = CircuitCodec(made, precision=24, block_size=len(x)).measure(x)
    assert length.payload <= length.ideal + 64 + 0.012 * length.variables
    assert abs(length.payload - length.tables) <= 72
    assert length.ideal == pytest.approx(-made(x).detach().double().sum().item() / math.log(2))


def test_code_length_of_a_large_block_is_within_a_thousandth(trained):
    made, x = trained
    x = x.repeat(20, 1)
    length = CircuitCodec(made, precision=20, block_size=len(x)).measure(x)
    assert length.ideal - 1 <= length.payload <= 1.001 * length.ideal
    assert length.container - length.payload <= 8 * 90


def test_bits_per_dim(trained):
    made, x = trained
    codec = CircuitCodec(made, block_size=64)
    length = codec.measure(x)
    assert codec.bits_per_dim(x) == length.payload / x.numel()
    assert codec.theoretical_bits_per_dim(x) == pytest.approx(length.ideal / x.numel())
    assert codec.bits_per_dim(x[:0]) == codec.theoretical_bits_per_dim(x[:0]) == 0
    assert codec.measure(x[:0]).payload == 0


@pytest.mark.claim(
    82, "The kernels and the fallback make the same bytes, and so do 1 and 2 threads", tolerance=0
)
def test_bytes_on_every_backend(trained, monkeypatch):
    made, x = trained
    before, found = torch.get_num_threads(), []
    codec = CircuitCodec(made, block_size=50)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(codec.encode(x))
    finally:
        torch.set_num_threads(before)
    from torchzoo.circuits import blocks

    for name in ("rans_encode", "rans_decode", "rans_tables"):
        monkeypatch.setattr(_rans, name, getattr(_rans, name)._init_fn)
    import sys

    reference = sys.modules[ordered_matmul.__module__]._ordered_matmul._init_fn
    monkeypatch.setattr(
        blocks, "ordered_matmul", lambda a, b: reference(a.contiguous(), b.contiguous())
    )
    found.append(codec.encode(x))
    assert found[0] == found[1] == found[2]
    assert torch.equal(codec.decode(found[0]), x)


@pytest.mark.claim(82, "A container with any byte changed, or cut anywhere, raises ValueError")
def test_damage_is_noticed():
    made = circuit(5, 4, 2)
    codec = CircuitCodec(made, block_size=4)
    data = codec.encode(torch.randint(0, 4, (10, 5)))
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(ValueError, match="data: "):
            codec.decode(bytes(damaged))
    for length in range(len(data)):
        with pytest.raises(ValueError, match="data: "):
            codec.decode(data[:length])
    with pytest.raises(ValueError, match="data: "):
        codec.decode(data + b"\0")


def test_any_sample_by_itself(trained):
    made, x = trained
    for block_size in (1, 16):
        codec = CircuitCodec(made, block_size=block_size)
        data = codec.encode(x)
        at = [17, 3, 199, 3]
        assert torch.equal(codec.decode(data, indices=at), x[at])
        assert torch.equal(codec.decode(data, indices=torch.tensor([0])), x[:1])
        assert codec.decode(data, indices=[]).shape == (0, 24)
        with pytest.raises(ValueError, match=r"indices: expected \(n,\) in \[0, 200\)"):
            codec.decode(data, indices=[200])


def test_damage_elsewhere_leaves_a_block_readable(trained):
    made, x = trained
    codec = CircuitCodec(made, block_size=16)
    data = bytearray(codec.encode(x))
    data[len(data) // 2] ^= 1
    assert torch.equal(codec.decode(bytes(data), indices=[0, 199]), x[[0, 199]])
    with pytest.raises(ValueError, match=r"block \d+ is damaged"):
        codec.decode(bytes(data))


def test_streaming(trained):
    made, x = trained
    codec = CircuitCodec(made, block_size=32)
    pieces = list(codec.encode_iter(iter(x.split(10))))
    assert len(pieces) > 3
    parts = list(codec.decode_iter(io.BytesIO(b"".join(pieces))))
    assert torch.equal(torch.cat(parts), x)
    assert codec.decode(b"".join(codec.encode_iter([]))).shape == (0, 24)


def test_shapes_of_images(trained):
    made, x = trained
    codec = CircuitCodec(made)
    images = x[:5].view(5, 4, 3, 2).to(torch.uint8)
    assert torch.equal(codec.decode(codec.encode(images)), images)
    data = codec.encode(x[:5], shape=(4, 6))
    assert torch.equal(codec.decode(data), x[:5].view(5, 4, 6))


def test_other_models_and_options_are_refused(trained):
    made, x = trained
    data = CircuitCodec(made).encode(x[:3])
    other = circuit(24, 16, 4, seed=1)
    with pytest.raises(ValueError, match="coded with another model"):
        CircuitCodec(other).decode(data)
    for options in ({"precision": 20}, {"schedule": "paper"}, {"deterministic": False}):
        with pytest.raises(ValueError, match="data: coded with precision 16"):
            CircuitCodec(made, **options).decode(data)
    fast = CircuitCodec(made, deterministic=False)
    assert torch.equal(fast.decode(fast.encode(x)), x)


def test_a_block_can_t_ask_for_more_than_it_can_hold(trained, monkeypatch):
    made, x = trained
    codec = CircuitCodec(made, block_size=10**12)
    from torchzoo.circuits import compression

    honest = compression.pack_index
    monkeypatch.setattr(
        compression,
        "pack_index",
        lambda blocks: honest([block._replace(samples=10**9) for block in blocks]),
    )
    data = codec.encode(x[:2])
    with pytest.raises(ValueError, match="block 0 is too short for 1000000000 samples"):
        codec.decode(data)


@pytest.mark.claim(
    82,
    "Behind an integer map z = g(x) the ideal length is -log2 p(g(x)), with no Jacobian term, and "
    "the code is exact",
    tolerance=1e-9,
)
def test_a_circuit_as_prior_of_a_flow():
    """z_1 = x_1 - x_2, z_2 = x_2 + floor(z_1 / 2): two additive coupling steps, bijective."""

    def forward(x):
        first = x[:, :3] - x[:, 3:]
        return torch.cat([first, x[:, 3:] + first.div(2, rounding_mode="floor")], 1)

    def inverse(z):
        second = z[:, 3:] - z[:, :3].div(2, rounding_mode="floor")
        return torch.cat([z[:, :3] + second, second], 1)

    made = circuit(6, 33, 3, dtype=torch.float64)
    prior = CircuitPrior(made, forward=forward, inverse=inverse, low=-16)
    x = torch.randint(-5, 6, (50, 6))
    ideal = -prior.log_prob(x).detach().sum() / torch.tensor(2.0, dtype=torch.float64).log()
    oracle = prior.codec.theoretical_bits_per_dim(forward(x) + 16) * x.numel()
    assert float(ideal) == pytest.approx(oracle, abs=1e-9)
    data = prior.encode(x)
    assert torch.equal(prior.decode(data), x)
    assert torch.equal(prior.decode(data, indices=[7]), x[7:8])
    # no volume term: two maps that only relabel give one length
    plain = CircuitPrior(made, low=-16)
    assert float(plain.log_prob(forward(x)).sum()) == pytest.approx(float(prior.log_prob(x).sum()))
    with pytest.raises(ValueError, match="latents in -16 to 16"):
        prior.encode(x + 30 * torch.arange(6))
    with pytest.raises(ValueError, match="forward, inverse"):
        CircuitPrior(made, forward=forward)


def test_the_codec_keeps_the_parameters_it_was_made_with():
    made = circuit()
    codec = CircuitCodec(made)
    x = torch.randint(0, 5, (4, 6))
    data = codec.encode(x)
    with torch.no_grad():
        made.leaf.logits.zero_()
    assert torch.equal(codec.decode(data), x)


def test_rare_values_keep_their_probability():
    """Each of the rare values has f = 1 + floor(1e-7 (2^28 - 2)) = 27 of 2^28."""
    made = Circuit(balanced(1), CategoricalLeaf(2), num_units=1)
    with torch.no_grad():
        made.leaf.logits.copy_(torch.tensor([1.0, 1e-7]).log()[None, :, None])
    length = CircuitCodec(made, precision=28).measure(torch.ones(10, 1).long())
    assert length.tables == pytest.approx(10 * (28 - math.log2(27)))


def test_a_stream_with_something_left_over(trained, monkeypatch):
    """A payload whose checksum fits, but that no encoder made."""
    made, x = trained
    codec = CircuitCodec(made, block_size=100)
    from torchzoo.circuits import blocks

    honest = blocks.encode_streams

    def longer(*args):
        streams, counts = honest(*args)
        return [streams[0], streams[1] + bytes(4)], counts

    monkeypatch.setattr(blocks, "encode_streams", longer)
    with pytest.raises(ValueError, match="block 1 does not decode with this model"):
        codec.decode(codec.encode(x))


def test_save_and_load(trained, tmp_path):
    made, x = trained
    codec = CircuitCodec(made, precision=20, block_size=32)
    again = CircuitCodec.load(codec.save(tmp_path / "codec"))
    assert repr(again) == repr(codec)
    assert torch.equal(again.decode(codec.encode(x)), x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CircuitCodec(circuit(), schedule="naive"), "schedule: expected one of"),
        (lambda: CircuitCodec(circuit(), block_size=0), "block_size: expected at least 1"),
        (lambda: CircuitCodec(circuit(), precision=29), "precision: expected at most 28"),
        (lambda: CircuitCodec(circuit(), precision=3), "at least 4 for 5 categories, got 3"),
        (lambda: CircuitCodec(circuit(num_classes=2)), "circuit: expected num_classes 1, got 2"),
        (
            lambda: CircuitCodec(
                Circuit(rat_spn(4, depth=1, num_repetitions=2), CategoricalLeaf(3))
            ),
            "one partition a region, got 2 at region",
        ),
        (lambda: CircuitCodec(Circuit(balanced(3), GaussianLeaf())), "finitely many values"),
        (lambda: CircuitCodec(circuit()).encode(torch.ones(2, 6)), "x: expected integers"),
        (lambda: CircuitCodec(circuit()).encode(torch.zeros(2, 5).int()), r"expected \(\*, 6\)"),
        (lambda: CircuitCodec(circuit()).encode(torch.full((2, 6), 5)), "variable 0 got a value"),
        (lambda: CircuitCodec(circuit()).encode(-torch.eye(6).int()), "outside 0 to 4"),
        (
            lambda: CircuitCodec(circuit()).encode(torch.zeros(1, 6).int(), shape=(5,)),
            "shape: expected 6 entries",
        ),
        (
            lambda: list(
                CircuitCodec(circuit()).encode_iter(
                    [torch.zeros(1, 6).int(), torch.zeros(1, 6).long()]
                )
            ),
            "batches: expected torch.int32",
        ),
        (lambda: CircuitCodec(circuit()).decode(b"PNG..............."), "expected a container"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
