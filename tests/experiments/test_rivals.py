"""The codecs that circuits are compared with: lossless, and as good as they should be."""

import math
import sys
import types

import pytest
import torch

from torchzoo.experiments.circuits import rivals
from torchzoo.experiments.circuits.idf import IntegerFlow, checkers, log_mass


def flow_of(seed=0, categories=17):
    """A flow whose shifts and prior are not those of the start."""
    torch.manual_seed(seed)
    flow = IntegerFlow(checkers(4), categories, 8)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return flow.eval()


def test_a_flow_comes_back_bit_by_bit():
    flow = flow_of()
    for x in (torch.randint(17, (30, 16)), torch.zeros(3, 16).long(), torch.full((1, 16), 999)):
        z = flow.latents(x)
        assert not torch.equal(z, x)
        assert torch.equal(flow.inverse(z), x)
        assert torch.equal(flow.decode(flow.encode(x), len(x)), x)
    data = flow.encode(x)
    with pytest.raises(ValueError, match="data: expected what this flow coded"):
        flow.decode(data + bytes(4), len(x))


def test_a_coupling_reads_some_and_moves_the_others():
    flow = flow_of()
    x = torch.randint(17, (20, 16)).float()
    for layer, read in enumerate(flow.read[:-1]):
        shift = flow._shift(layer, x)
        assert (shift[:, read] == 0).all()
        assert torch.equal(shift, shift.round())
        assert torch.equal(shift, flow._shift(layer, torch.where(read, x, 5.0)))
        assert shift.abs().max() > 0
    first = flow.read[-1]
    found, same = flow.mixtures(x), flow.mixtures(torch.where(first, x, 5.0))
    for one, two in zip(found, same, strict=True):
        assert torch.equal(one, two)
    assert torch.equal(found[1][:, first], flow.mean[first].expand(20, -1, -1))
    assert not torch.equal(found[1][0, ~first], found[1][1, ~first])


def test_logistic_masses_are_differences_of_the_distribution_function():
    z = torch.arange(-400, 401).double()
    weight, mean, width = (
        torch.tensor(own).double() for own in ((0.3, 0.7), (0.3, -4.0), (7.0, 2.0))
    )
    mass = log_mass(z, weight.log(), mean, width).exp()
    upper, lower = (((z[:, None] + h - mean) / width).sigmoid() for h in (0.5, -0.5))
    torch.testing.assert_close(mass, (upper - lower) @ weight, atol=1e-15, rtol=1e-9)
    assert mass.sum().item() == pytest.approx(1)


def test_bytes_are_near_the_likelihood_and_training_lowers_it():
    torch.manual_seed(0)
    level = torch.randint(3, 14, (300, 1))
    x = (level + torch.randint(-1, 2, (300, 16))).long()
    flow = IntegerFlow(checkers(4), 17, 16)
    with torch.no_grad():
        before = flow.nats(x).item()
    flow.fit(x[:200], 8)
    with torch.no_grad():
        after = flow.nats(x[200:]).item()
    assert after < before - 0.1
    x = x[200:]
    data, z = flow.encode(x), flow.latents(x)
    values = torch.arange(int(z.min()), int(z.max()) + 1)
    with torch.no_grad():
        mixtures = [parameter[:, :, None] for parameter in flow.mixtures(z)]
        # what is outside of the range that the head names has no share of the tables
        shares = log_mass(values.expand(*x.shape, -1), *mixtures).log_softmax(-1)
    ideal = -shares.gather(2, (z - values[0])[..., None]).sum().item() / math.log(2)
    assert 64 <= 8 * len(data) - ideal <= 64 + 64 + 8
    slope = torch.autograd.grad(flow.train().nats(x), flow.shifts[0][-1].bias)[0]
    assert slope.abs().max() > 0


def test_zstd_has_a_row_where_python_has_it(monkeypatch):
    x = torch.randint(17, (8, 64))
    for name in ("compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "zstd" not in rivals.generic(x)

    class Compressor:
        def __init__(self, level):
            assert level == 22

        def compress(self, data):
            return data[: len(data) // 2]

    fake = types.SimpleNamespace(ZstdCompressor=Compressor)
    monkeypatch.setitem(sys.modules, "zstandard", fake)
    assert rivals.generic(x)["zstd"] == 4
    newer = types.SimpleNamespace(compress=lambda data, level: bytearray(len(data) // 4))
    monkeypatch.setitem(sys.modules, "compression", types.ModuleType("compression"))
    monkeypatch.setitem(sys.modules, "compression.zstd", newer)
    assert rivals.generic(x)["zstd"] == 2
