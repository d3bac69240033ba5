"""The experiment on compression runs, its parts are right, and its criteria can fail."""

import math

import pytest
import torch
from matplotlib.figure import Figure

from torchzoo.circuits import CategoricalLeaf, Circuit, CircuitCodec, factorised
from torchzoo.experiment import Measurement, reproduce
from torchzoo.experiments.circuits import compression as unit
from torchzoo.experiments.circuits.made import MADE


def test_smoke_run():
    result = reproduce(unit.EXPERIMENT, budget="smoke")
    assert result.criteria[0]["holds"]
    assert len(result.criteria) == 4
    unit.plot(result.measured(), Figure())


def test_data_are_integers_and_split():
    train, test = unit.digit_levels(0)
    assert (tuple(train.shape), tuple(test.shape)) == ((1300, 64), (497, 64))
    assert (int(train.min()), int(train.max())) == (0, 16)
    left, right = unit.grey_patches()
    assert left.shape == right.shape == (2 * 53 * 40, 64)
    assert not torch.equal(left, right)


def test_independent_pixels_have_their_entropy():
    x = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 0]]).repeat(50, 1)
    made = unit.independent(x, 4)
    bits = CircuitCodec(made).theoretical_bits_per_dim(x)
    assert 2 * bits == pytest.approx(2 + 2 - 0.75 * math.log2(3), abs=0.02)


def test_made_sees_only_what_came_before():
    torch.manual_seed(0)
    net = MADE(5, 3, 16)
    x = torch.randint(0, 3, (1, 5))
    for i in range(5):
        y = x.clone()
        y[0, i] = (y[0, i] + 1) % 3
        same = (net(x) == net(y)).all(2)[0]
        assert same[: i + 1].all()
        assert not same[i + 1 :].any()


def test_made_code_comes_back():
    torch.manual_seed(0)
    net, x = MADE(5, 3, 16), torch.randint(0, 3, (40, 5))
    decode, bits = unit.made_code(net, x)
    assert torch.equal(decode(), x)
    assert bits >= net.nats(x).item() / math.log(2)


def test_exponent_and_edges():
    assert unit.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)
    circuit = Circuit(factorised(3), CategoricalLeaf(4), num_units=2)
    found = unit.edges(circuit)
    size = 3 * 4 * 2 + 2
    assert found["naive"] == 3 * size
    assert found["tour"] == size + 2  # the root's weights down and up


GOOD = {
    "digits: HCLT, payload": 2.03,
    "digits: HCLT, ideal": 2.02,
    "digits: HCLT, file": 2.05,
    "digits: Chow-Liu tree": 2.2,
    "digits: independent": 2.4,
    "digits: lzma": 2.8,
    "exponent of operations, tour": 1.0,
    "exponent of operations, paper": 1.2,
    "exponent of operations, naive": 2.0,
    "exponent of seconds, tour": 1.1,
    "seconds to decode the largest, tour": 0.5,
    "seconds to decode the largest, naive": 50.0,
    "digits: MADE": 2.1,
    "seconds to decode, HCLT": 0.03,
    "seconds to decode, MADE": 0.3,
    "seconds to decode one, HCLT": 0.01,
    "seconds to decode one, MADE": 0.02,
}


@pytest.mark.parametrize(
    ("name", "values", "failing"),
    [
        ("digits: HCLT, payload", (2.03, 2.05), 0),
        ("digits: HCLT, payload", (2.03, 2.21), 1),
        ("digits: independent", (2.19, 2.4), 1),
        ("digits: lzma", (2.8, 2.02), 1),
        ("exponent of operations, tour", (1.06, 1.06), 2),
        ("exponent of operations, paper", (1.31, 1.31), 2),
        ("exponent of operations, naive", (1.9, 1.9), 2),
        ("exponent of seconds, tour", (1.3, 1.3), 2),
        ("seconds to decode the largest, naive", (4.9, 4.9), 2),
        ("seconds to decode, MADE", (0.14, 0.14), 3),
    ],
)
def test_criteria_can_fail(name, values, failing):
    measured = {n: Measurement(n, (v, v)) for n, v in GOOD.items()}
    assert all(criterion.test(measured)[0] for criterion in unit.EXPERIMENT.criteria)
    measured[name] = Measurement(name, values)
    assert not unit.EXPERIMENT.criteria[failing].test(measured)[0]
