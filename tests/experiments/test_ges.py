"""The experiment on generalised exponentials runs, and its criteria can fail."""

import pytest
import torch
from matplotlib.figure import Figure

from torchzoo.experiment import Measurement, reproduce
from torchzoo.experiments.splatting import ges as unit
from torchzoo.splatting import GaussianScene, GeneralizedExponentialScene


def test_smoke_run():
    result = reproduce(unit.EXPERIMENT, budget="smoke")
    assert len(result.criteria) == 4
    measured = result.measured()
    assert len(measured) == 4 * 3 * 3 + 5 * 6
    unit.plot(measured, Figure())


def test_signals():
    x = torch.tensor([-1.0, -0.6, -0.4, 0.0, 0.25, 0.5, 1.0])
    expected = {
        "square": [0, 0, 1, 1, 1, 0, 0],
        "triangle": [0, 0, 0.2, 1, 0.5, 0, 0],
        "parabola": [0, 0, 0.36, 1, 0.75, 0, 0],
        "half sine": [0, 0, 0, 0, 0.5**0.5, 1, 0],
    }
    for name, values in expected.items():
        torch.testing.assert_close(
            unit.SIGNALS[name](x), torch.tensor(values, dtype=torch.float32), atol=1e-6, rtol=0
        )


def test_arms_start_alike():
    scene = unit.make_scene("boxes", unit.VIEWS, 12, 0)
    scenes = {arm: unit.start_scene(arm, scene, 30, 1) for arm in unit.ARMS}
    for arm, splats in scenes.items():
        assert torch.equal(splats.means, scenes[unit.GAUSSIAN].means), arm
        assert torch.equal(splats.scales, scenes[unit.GAUSSIAN].scales), arm
    assert type(scenes[unit.TWICE]) is GaussianScene
    for arm, mode in ((unit.EXACT, "exact"), (unit.APPROX, "approx"), (unit.FREQUENCY, "exact")):
        assert isinstance(scenes[arm], GeneralizedExponentialScene)
        assert scenes[arm].mode == mode


def test_equal_parameters():
    """A third more Gaussians have as many parameters as generalised exponentials."""
    found = unit.fit_signals(unit.BUMPS[2], 10, 0, 1)
    assert next(iter(found)) == "square, N=10, Gaussian, equal parameters: MSE"
    assert [n + -(-n // 3) for n in unit.COUNTS] == [3, 7, 14]


def synthetic(psnr=(24.0, 22.0, 23.8), lost=0, square=0.5):
    """Three seeds: PSNR of three arms, cells that Gaussians win, the ratio for the square."""
    figures = {}
    for k, (signal, count) in enumerate((s, n) for s in unit.SIGNALS for n in unit.COUNTS):
        errors = (1e-3, 0.9e-3 if k >= 12 - lost else 2e-3, 1e-3 / square)
        for bump, error in zip(unit.BUMPS, errors, strict=True):
            figures[unit.cell(signal, count, bump)] = (0.0, error, 1.0)
    quality = dict(zip(unit.ARMS, (*psnr, 22.0, 23.0), strict=True))
    for arm in unit.ARMS:
        values = quality[arm] if isinstance(quality[arm], tuple) else (quality[arm],) * 3
        figures[f"{arm}: test PSNR"] = values
        size = 2e4 if arm == unit.TWICE else 1e4
        figures |= {f"{arm}: bytes": (size,) * 3, f"{arm}: ms a view": (1.0,) * 3}
    return {name: Measurement(name, tuple(values)) for name, values in figures.items()}


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True, True, True, True]),
        (synthetic(lost=2), [True, True, True, True]),
        (synthetic(lost=3), [True, True, False, True]),
        (synthetic(square=1.1), [True, True, True, False]),
        (synthetic((24.0, 22.0, 23.6)), [True, False, True, True]),
        (synthetic((24.0, 22.0, (24.0, 21.9, 26.0))), [False, True, True, True]),
        (synthetic((22.4, 22.0, 25.0)), [None, None, True, True]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected
    unit.plot(measured, Figure())
