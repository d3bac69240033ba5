"""The experiment on EvoNorm runs, and its criterion can fail."""

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from torchzoo.experiment import Measurement, reproduce
from torchzoo.experiments.activations import evonorm as unit


def test_smoke_run():
    result = reproduce(unit.EXPERIMENT, budget="smoke")
    measured = result.measured()
    assert len(measured) == 3 * len(unit.ARMS) + 1
    unit.plot(measured, Figure())


def test_arms_share_all_that_is_no_norm():
    kernels = []
    for arm in unit.ARMS:
        model = unit.build(arm, 3)
        kernels.append([m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))])
    assert len(kernels[0]) == 1 + 6 + 2 + 1
    for other in kernels[1:]:
        assert all(map(torch.equal, kernels[0], other))


def measurements(gains):
    """All arms at 90 % but for the gains, by arm and batch, over the seeds."""
    figures = {
        f"{arm}, batch {batch}": (90.0, 90.5, 89.5) for arm in unit.ARMS for batch in unit.BATCHES
    }
    for name, gain in gains.items():
        figures[name] = tuple(
            v + gain + e for v, e in zip(figures[name], (0.1, 0, -0.1), strict=True)
        )
    figures["mean of S0's features over their deviation"] = (0.5,) * 3
    return {name: Measurement(name, values) for name, values in figures.items()}


@pytest.mark.parametrize(
    ("gains", "holds"),
    [
        ({}, False),
        ({"EvoNorm-B0, batch 128": 1.0}, True),
        ({"EvoNorm-B0, batch 128": 0.05}, False),
        ({"EvoNorm-S0, batch 8": 1.0}, True),
        ({"EvoNorm-S0, batch 8": 1.0, "EvoNorm-S0, batch 128": -1.0}, False),
        ({"EvoNorm-S0, batch 8": 1.0, "EvoNorm-B0, batch 128": -1.0}, False),
        ({"EvoNorm-S0, batch 8": 1.0, "BN+ReLU, batch 8": 1.0}, False),
        ({"BN+SiLU, batch 8": 5.0, "EvoNorm-B0, batch 8": 1.0}, True),
    ],
)
def test_criterion_can_fail(gains, holds):
    measured = measurements(gains)
    (criterion,) = unit.EXPERIMENT.criteria
    assert criterion.test(measured)[0] is holds
    unit.plot(measured, Figure())
