"""The experiment on grids of Gaussians runs, and its criteria can fail."""

import pytest
from matplotlib.figure import Figure

from torchzoo.experiment import Measurement, reproduce
from torchzoo.experiments.splatting import sog as unit


def test_smoke_run():
    result = reproduce(unit.EXPERIMENT, budget="smoke")
    assert len(result.criteria) == 5
    measured = result.measured()
    assert {f"{arm}: bytes" for arm in unit.ARMS} < measured.keys()
    unit.plot(measured, Figure())


def synthetic(full=(60e3,) * 3, late=(65e3,) * 3, between=(66e3,) * 3, psnr=24.8, seconds=11.0):
    figures = {"uncompressed: PSNR": (25.0,) * 3, "uncompressed: Gaussians": (2500.0,) * 3}
    sizes = dict(zip(unit.ARMS, ((70e3,) * 3, late, between, full), strict=True))
    for arm, size in sizes.items():
        figures[f"{arm}: bytes"] = size
        figures[f"{arm}: bytes, degree 0"] = (2e4,) * 3
        figures[f"{arm}: PSNR"] = (psnr,) * 3
        figures[f"{arm}: seconds"] = (seconds if arm == unit.FULL else 10.0,) * 3
    return {name: Measurement(name, values) for name, values in figures.items()}


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True] * 5),
        (synthetic(full=(60e3, 60e3, 74e3)), [False, False, False, True, True]),
        (synthetic(between=(66e3, 66e3, 59e3)), [True, False, True, True, True]),
        (synthetic(between=(66e3, 71e3, 66e3)), [True, False, True, True, True]),
        (synthetic(late=(65e3, 59e3, 65e3)), [True, True, False, True, True]),
        (synthetic(psnr=24.4), [True, True, True, False, True]),
        (synthetic(seconds=12.6), [True, True, True, True, False]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected
    unit.plot(measured, Figure())
