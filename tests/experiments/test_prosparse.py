"""The experiment on ProSparse runs, and its criteria can fail."""

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from torchzoo.experiment import Measurement, reproduce
from torchzoo.experiments.sparsity import prosparse as unit
from torchzoo.sparsity import SparseFFN


def test_smoke_run():
    result = reproduce(unit.EXPERIMENT, budget="smoke")
    assert len(result.criteria) == 3
    measured = result.measured()
    assert {f"sparsity, {arm}" for arm in unit.ARMS} < set(measured)
    unit.plot(measured, Figure())


def test_the_schedule_is_the_papers_shortened():
    schedule = unit.schedule(2.0, 165)
    assert schedule.value_at(50) == 0.0
    assert schedule.value_at(60) == pytest.approx(2.0 * 5e-3 / 0.2)
    assert schedule.value_at(110) == pytest.approx(0.5)
    assert schedule.value_at(165) == pytest.approx(2.0)


def test_arms_differ_in_what_they_should():
    options = unit.EXPERIMENT.budgets["smoke"]
    torch.manual_seed(0)
    text = unit.Text(0, options)
    parent = unit.pretrained(text, options)
    before = [parameter.clone() for parameter in parent.parameters()]
    first, again, other = (
        unit.go_on(parent, text, options, lambda t, w=weight: w) for weight in (0.0, 0.0, 50.0)
    )
    for a, b, c in zip(before, parent.parameters(), first.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def test_sparsity_counts_zeros_of_the_product():
    model = nn.Sequential(SparseFFN(4, 6), SparseFFN(4, 8, gated=False))
    x = torch.randn(10, 5)
    shown = [model[0].hidden(x[:, :-1]), model[1].hidden(model[0](x[:, :-1]))]
    expected = sum((h == 0).double().mean().item() for h in shown) / 2
    assert unit.sparsity(model, x) == pytest.approx(expected)
    assert 0.2 < expected < 0.8


def test_the_timed_layer_is_as_sparse_as_asked(monkeypatch):
    seen = []
    real = SparseFFN.forward

    def forward(layer, x):
        seen.append((layer.hidden(x) != 0).double().mean().item())
        return real(layer, x)

    monkeypatch.setattr(SparseFFN, "forward", forward)
    for share in (0.0, 0.1, 0.5, 1.0):
        seen.clear()
        assert unit.speed(share, 0, (32, 400), 1) > 0
        assert seen[0] == pytest.approx(share, abs=0.005)


def synthetic(gain=0.3, over=0.01, gap=0.02, less=0.01, ratio=2.0, native=1.0):
    """Measurements of three seeds."""
    way = (-0.001, 0.0, 0.001)
    figures = dict.fromkeys((f"sparsity, {arm}" for arm in unit.ARMS), 0.9)
    figures |= dict.fromkeys((f"loss, {arm}" for arm in unit.ARMS), 1.0)
    figures["sparsity, with FATReLU"] = figures["sparsity, relu"] + gain - 0.3
    figures["sparsity, relu"] -= 0.3
    figures["loss, with FATReLU"] += over
    figures["loss, constant penalty"] += gap
    figures["sparsity, constant penalty"] += less
    figures |= {"native": native, "time, dense / sparse": ratio}
    measured = {}
    for i, (name, value) in enumerate(figures.items()):
        spread = way if i % 2 else way[::-1]
        constant = name == "native"
        measured[name] = Measurement(name, tuple(value + (0 if constant else w) for w in spread))
    return measured


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True, True, True]),
        (synthetic(gain=0.19), [False, True, True]),
        (synthetic(over=0.021), [False, True, True]),
        (synthetic(gap=0.0), [True, False, True]),
        (synthetic(gap=-0.02), [True, False, True]),
        (synthetic(less=0.032), [True, False, True]),
        (synthetic(ratio=1.4), [True, True, False]),
        (synthetic(ratio=1.4, native=0.0), [True, True, None]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected
    unit.plot(measured, Figure())
