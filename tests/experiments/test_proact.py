"""The experiment on bit flips runs, and its criteria can fail."""

import pytest
import torch
from matplotlib.figure import Figure

from torchzoo.experiment import Measurement, reproduce
from torchzoo.experiments.activations import proact as unit


def test_smoke_run():
    result = reproduce(unit.EXPERIMENT, budget="smoke")
    measured = result.measured()
    assert len(result.criteria) == 4
    assert len(measured) == len(unit.METHODS) * (len(unit.BERS) + 3)
    assert measured[unit.extra(unit.PROACT)].mean == 3 + 48
    assert measured[unit.extra(unit.FITACT)].mean == 1024 + 512 + 512 + 48
    assert measured[unit.extra(unit.RANGER)].mean == 4
    unit.plot(measured, Figure())


def test_the_network_has_the_size_that_is_said():
    assert sum(p.numel() for p in unit.classifier().parameters()) == 20_730


def test_all_methods_suffer_the_same_flips():
    torch.manual_seed(0)
    net, x = unit.classifier(), torch.rand(8, 1, 8, 8)
    y = net(x).argmax(-1)
    data = [(x, y)]
    hits = []
    for method in (unit.NONE, unit.CLIPACT, unit.FITACT):
        model = unit.protected(net, method, data, data, {"decays": 0, "bound_epochs": 1})
        seen = []
        model[0].register_forward_hook(
            lambda module, inputs, output, seen=seen: seen.append(module.weight.detach().clone())
        )
        accuracies, on_bounds = unit.under_faults(model, 1e-3, range(3), data)
        assert len(accuracies) == len(on_bounds) == 3
        assert (sum(on_bounds) > 0) == (method == unit.FITACT) or method == unit.CLIPACT
        hits.append(torch.stack(seen))
    assert all(torch.equal(hits[0], other) for other in hits[1:])
    assert not torch.equal(hits[0][0], hits[0][1])


def synthetic(drop=0.2, extra=51, **accuracy):
    """Measurements of three seeds; mean accuracies under faults by method."""
    way = (0.3, -0.3, 0.0)
    measured = {}
    means = {
        unit.NONE: 40.0,
        unit.RANGER: 60.0,
        unit.CLIPACT: 65.0,
        unit.FITACT: accuracy.get("fitact", 70.0),
        unit.JOINT: accuracy.get("joint", 68.0),
        unit.PROACT: accuracy.get("proact", 70.0),
    }
    for method, mean in means.items():
        sign = -1 if method == unit.PROACT else 1
        for ber in unit.BERS:
            name = unit.faulty(method, ber)
            measured[name] = Measurement(name, tuple(mean + sign * w for w in way))
        figures = {
            unit.clean(method): 97.0 - (drop if method == unit.PROACT else 0),
            unit.extra(method): extra if method == unit.PROACT else 2096,
            unit.on_bounds(method): 1.0,
        }
        measured |= {name: Measurement(name, (value,) * 3) for name, value in figures.items()}
    return measured


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True] * 4),
        (synthetic(joint=69.8), [False, True, True, True]),
        (synthetic(proact=60.0), [False, False, True, True]),
        (synthetic(fitact=71.0), [True, False, True, True]),
        (synthetic(drop=0.6), [True, True, False, True]),
        (synthetic(extra=800), [True, True, True, False]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected
    unit.plot(measured, Figure())
