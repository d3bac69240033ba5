"""The experiment on fewer steps and pixels runs, and its criteria can fail."""

import pytest
from matplotlib.figure import Figure

from torchzoo.experiment import Measurement, reproduce
from torchzoo.experiments.splatting import turbo as unit
from torchzoo.splatting import DefaultStrategy, TurboStrategy


def test_smoke_run():
    result = reproduce(unit.EXPERIMENT, budget="smoke")
    assert len(result.criteria) == 4
    measured = result.measured()
    assert len(measured) == 3 * 5 + 3 * 3
    views = {arm: measured[f"texture, {arm}: views"].mean for arm in unit.ARMS}
    assert views == {unit.PLAIN: 30, unit.TURBO: 10, unit.CONTROL: 10}
    unit.plot(measured, Figure())


def test_schedules_are_thirds():
    assert unit.schedule(600, 1) == {"refine_start": 25, "refine_stop": 300, "refine_every": 25}
    assert unit.schedule(600, 3) == {"refine_start": 8, "refine_stop": 100, "refine_every": 8}
    arms = {arm: unit.strategy(arm, 600, 50, 20) for arm in (*unit.ARMS, *unit.ABLATIONS)}
    for arm, found in arms.items():
        plain = arm in (unit.PLAIN, unit.CONTROL)
        assert type(found) is (DefaultStrategy if plain else TurboStrategy)
        assert found.refine_stop == (300 if arm == unit.PLAIN else 100)
        assert (found.cap_max, found.reset_every) == (50, 0)
    without_colors, linear, rarely, _ = (arms[arm] for arm in unit.ABLATIONS)
    assert without_colors.color_prob == rarely.visit_quantile == linear.budget.lam == 0
    assert (linear.budget.n0, linear.budget.cap) == (20, 50)


def synthetic(psnr=(25.0, 24.8, 24.0), times=(100.0, 40.0), dilated=(20.0, 19.9, 20.3)):
    """Three seeds: PSNR of three arms; milliseconds and PSNR of whole and dilated pictures."""
    figures = {}
    for arm, values in zip(unit.ARMS, psnr, strict=True):
        values = values if isinstance(values, tuple) else (values,) * 3
        figures[f"texture, {arm}: PSNR"] = values
        figures[f"texture, {arm}: views"] = (600.0 if arm == unit.PLAIN else 200.0,) * 3
    arms = (unit.FULL_PIXELS, unit.DILATED, unit.SAME_TIME)
    for arm, time, quality in zip(arms, (*times, times[1]), dilated, strict=True):
        figures |= {f"{arm}: steps": (40.0,) * 3, f"{arm}: ms a step": (time,) * 3}
        figures[f"{arm}: PSNR"] = (quality,) * 3
    return {name: Measurement(name, tuple(values)) for name, values in figures.items()}


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True, True, True, True]),
        (synthetic((25.0, 24.65, 24.0)), [False, True, True, True]),
        (synthetic((25.0, (25.5, 23.9, 26.0), 24.0)), [True, False, True, True]),
        (synthetic((25.0, 25.2, 24.75)), [None, None, True, True]),
        (synthetic(times=(100.0, 61.0)), [True, True, False, True]),
        (synthetic(dilated=(20.0, 21.0, 20.15)), [True, True, True, False]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected
    unit.plot(measured, Figure())
