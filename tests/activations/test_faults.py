"""Bit flips: how many, where, in what format, and that they are undone to the last bit."""

import contextlib
import struct

import pytest
import torch
from torch import nn

from torchzoo.activations import HybridClippedReLU, fault_sweep, inject_bit_flips

FORMATS = ["float64", "float32", "bfloat16", "float16", "fixed", "int8"]
INTEGER = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}


def model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(6, 5), nn.BatchNorm1d(5), HybridClippedReLU([1.0] * 5), nn.Linear(5, 3)
    )
    net[0].weight = nn.Parameter(net[0].weight.detach().mT.contiguous().mT)  # not contiguous
    return net.to(dtype)


def bits_of(net):
    return {
        name: value.contiguous().view(INTEGER[value.dtype]).clone()
        for name, value in net.state_dict().items()
        if value.is_floating_point()
    }


def same_bits(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.claim(121, "With ber = 0 no bit changes", tolerance=0.0)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_flips(dtype):
    net = model(dtype)
    before = bits_of(net)
    with inject_bit_flips(net, 0.0, format=str(dtype).removeprefix("torch.")) as flips:
        assert same_bits(before, bits_of(net))
    assert flips.count == 0


@pytest.mark.claim(121, "With ber = 1 every bit is flipped", tolerance=0.0)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_all_flips(dtype):
    net = model(dtype)
    before = bits_of(net)
    with inject_bit_flips(net, 1.0, format=str(dtype).removeprefix("torch.")) as flips:
        after = bits_of(net)
        assert all(torch.equal(after[name], ~before[name]) for name in before)
    words = sum(value.numel() for value in before.values())
    assert flips.count == flips.bits == words * 8 * torch.finfo(dtype).bits // 8
    assert same_bits(before, bits_of(net))


@pytest.mark.claim(
    121,
    "The bits that differ are the ones reported, weights, biases, statistics and bounds alike",
    tolerance=0.0,
)
@pytest.mark.parametrize("ber", [1e-3, 0.05, 0.6])
def test_flips_are_where_they_are_said_to_be(ber):
    net = model()
    before = bits_of(net)
    with inject_bit_flips(net, ber, generator=torch.Generator().manual_seed(3)) as flips:
        after = bits_of(net)
    assert set(flips.positions) == set(before)
    for name, old in before.items():
        changed = (old ^ after[name]).flatten().long() & 0xFFFFFFFF
        found = [
            32 * w + b
            for w, word in enumerate(changed.tolist())
            for b in range(32)
            if word >> b & 1
        ]
        assert found == flips.positions[name].tolist()


@pytest.mark.claim(
    121,
    "The number of flips is Binomial(bits, ber), within 4 standard errors in mean, and every "
    "bit of a word is as likely",
    tolerance=None,
)
def test_flips_are_binomial():
    net = nn.Linear(99, 10)
    generator = torch.Generator().manual_seed(0)
    bits, ber, runs = 1000 * 32, 2e-3, 400
    counts, places = [], []
    for _ in range(runs):
        with inject_bit_flips(net, ber, generator=generator) as flips:
            counts.append(flips.count)
            places += list(flips.positions.values())
    assert flips.bits == bits
    mean, std = bits * ber, (bits * ber * (1 - ber)) ** 0.5
    found = torch.tensor(counts, dtype=torch.float64)
    assert abs(found.mean() - mean) < 4 * std / runs**0.5
    assert 0.8 < found.std() / std < 1.2
    of_word = torch.cat(places) % 32
    share = of_word.bincount(minlength=32).double() / (runs * 1000)
    assert ((share - ber).abs() < 4.5 * (ber / (runs * 1000)) ** 0.5).all()


@pytest.mark.claim(
    121, "All bits are as before after the context, by an exception too", tolerance=0.0
)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored(format, dtype):
    net = model(dtype)
    with torch.no_grad():
        net[0].bias[:2] = torch.tensor([torch.nan, -torch.inf])
    before = bits_of(net)
    with inject_bit_flips(net, 0.3, format=format):
        assert not same_bits(before, bits_of(net))
    assert same_bits(before, bits_of(net))
    with contextlib.suppress(RuntimeError), inject_bit_flips(net, 0.3, format=format):
        raise RuntimeError
    assert same_bits(before, bits_of(net))
    with inject_bit_flips(net, 0.01, format=format), inject_bit_flips(net, 0.5, format=format):
        pass
    assert same_bits(before, bits_of(net))


@pytest.mark.claim(121, "A fixed-point word is within half of its last place", tolerance=2.0**-17)
@pytest.mark.parametrize(("int_bits", "frac_bits"), [(15, 16), (3, 4), (7, 0)])
def test_fixed_point_round_trip(int_bits, frac_bits):
    net = nn.Linear(100, 10, dtype=torch.float64)
    with torch.no_grad():
        net.weight.mul_(20)
    exact = net.weight.detach().clone()
    options = {"format": "fixed", "int_bits": int_bits, "frac_bits": frac_bits}
    with inject_bit_flips(net, 0.0, **options):
        error = (net.weight - exact).abs().max().item()
        assert 0 < error <= 2.0 ** -(frac_bits + 1)
        assert torch.equal((net.weight * 2**frac_bits).round(), net.weight * 2**frac_bits)


def test_fixed_point_saturates_and_is_two_s_complement():
    net = nn.Linear(1, 4, bias=False, dtype=torch.float64)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[9.0], [-9.0], [0.0], [-0.25]]))
    options = {"format": "fixed", "int_bits": 2, "frac_bits": 2}
    with inject_bit_flips(net, 0.0, **options):
        assert net.weight.flatten().tolist() == [3.75, -4.0, 0.0, -0.25]
    with inject_bit_flips(net, 1.0, **options) as flips:  # ~w is -w less one last place
        assert net.weight.flatten().tolist() == [-4.0, 3.75, -0.25, 0.0]
    assert flips.count == flips.bits == 4 * 5


def test_int8_has_a_scale():
    net = nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[2.54], [-1.27], [0.0]]))
    with inject_bit_flips(net, 0.0, format="int8"):
        torch.testing.assert_close(net.weight.flatten(), torch.tensor([2.54, -1.28, 0.0]))
    with inject_bit_flips(net, 1.0, format="int8"):
        torch.testing.assert_close(net.weight.flatten(), torch.tensor([-2.56, 1.26, -0.02]))


def test_float_words_are_those_of_the_machine():
    net = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(0.3)
    word = ~struct.unpack("<I", struct.pack("<f", 0.3))[0] & 0xFFFFFFFF
    with inject_bit_flips(net, 1.0):
        assert net.weight.item() == struct.unpack("<f", struct.pack("<I", word))[0]


def test_targets():
    net = model()
    with inject_bit_flips(net, 1.0, targets="*.bound") as flips:
        assert set(flips.positions) == {"2.bound"}
    with inject_bit_flips(net, 1.0, targets=lambda name, t: t.ndim == 2) as flips:
        assert set(flips.positions) == {"0.weight", "3.weight"}
    shared = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    shared[1].weight = shared[0].weight
    with inject_bit_flips(shared, 1.0) as flips:
        assert set(flips.positions) == {"0.weight", "0.bias", "1.bias"}


def test_a_seed_fixes_the_flips():
    def places(seed):
        generator = torch.Generator().manual_seed(seed)
        with inject_bit_flips(model(), 0.02, generator=generator) as flips:
            return [value.tolist() for value in flips.positions.values()]

    assert places(1) == places(1)
    assert places(1) != places(2)


class Constant(nn.Module):
    """Logits that are weights, whatever the input."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        assert not self.training
        return self.logits.expand(len(x), -1)


@pytest.mark.claim(
    121, "Logits that are NaN or infinite count as wrong, and as a changed class", tolerance=0.0
)
def test_sweep_counts_bad_logits():
    x, y = torch.zeros(8, 1), torch.tensor([1] * 6 + [0] * 2)
    net = Constant([0.0, 1.0])
    clean = fault_sweep(net, [(x[:5], y[:5]), (x[5:], y[5:])], [0.0], 3)
    assert [part.tolist() for part in clean] == [[0.75], [0.0], [0.0]]
    assert net.training
    for bad in (torch.nan, torch.inf):
        broken = fault_sweep(Constant([0.0, bad]), [(x, y)], [0.0], 1)
        assert broken.mean.tolist() == [0.0]
    # all bits of 0.0 and 1.0 flipped: NaN and -3.99..
    flipped = fault_sweep(net, [(x, y)], [0.0, 1.0], 2)
    assert flipped.mean.tolist() == [0.75, 0.0]
    assert flipped.critical.tolist() == [0.0, 1.0]


def test_sweep_takes_means_over_trials():
    x, y = torch.zeros(4, 1), torch.ones(4, dtype=torch.long)
    net = Constant([0.5, 1.0])
    generator = torch.Generator().manual_seed(0)
    found = fault_sweep(net, [(x, y)], [0.01], 50, generator=generator)
    generator = torch.Generator().manual_seed(0)
    hits = []
    for _ in range(50):
        with inject_bit_flips(net, 0.01, generator=generator):
            a, b = net.logits.tolist()
        hits.append(float(b > a and abs(a) < torch.inf and abs(b) < torch.inf))
    hits = torch.tensor(hits, dtype=torch.float64)
    assert 0 < hits.mean() < 1
    torch.testing.assert_close(found.mean, hits.mean()[None])
    torch.testing.assert_close(found.std, hits.std()[None])
    torch.testing.assert_close(found.critical, 1 - hits.mean()[None])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ber": 1.5}, r"ber: expected a probability in \[0, 1\], got 1.5"),
        ({"ber": -0.1}, r"ber: expected a probability in \[0, 1\], got -0.1"),
        ({"ber": float("nan")}, "ber: expected a probability"),
        ({"format": "float8"}, "format: expected one of float64.*, got 'float8'"),
        ({"format": "fixed", "int_bits": 40, "frac_bits": 40}, "int_bits: expected .* got 40"),
        ({"targets": "nothing"}, "targets: expected a rule that selects"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        inject_bit_flips(model(), **{"ber": 0.1, **options})


def test_bad_sweeps():
    with pytest.raises(ValueError, match="trials: expected 1 or more, got 0"):
        fault_sweep(model(), [], [0.1], 0)
    with pytest.raises(ValueError, match="loader: expected at least one batch"):
        fault_sweep(model(), [], [0.1], 1)
