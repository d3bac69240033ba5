"""The experiment on opacities by direction runs, and its criteria can fail."""

import pytest
import torch
from matplotlib.figure import Figure

from torchzoo.experiment import Measurement, reproduce
from torchzoo.experiments.splatting import vdgs as unit
from torchzoo.splatting import VDGSScene

FULL = unit.EXPERIMENT.budgets["full"]


def test_smoke_run():
    result = reproduce(unit.EXPERIMENT, budget="smoke")
    assert len(result.criteria) == 3
    measured = result.measured()
    assert len(measured) == 2 * 3 * 4 + 2 * 3
    unit.plot(measured, Figure())


def test_arms_are_alike():
    """Numbers of the arms at full size, and that all are drawn alike at first."""
    options = {**FULL, "views": 8, "size": 16, "steps": 1}
    data = unit.make_data("glass", options, 0)
    assert data.held.nonzero().flatten().tolist() == [2, 6]
    scenes = {arm: unit.start(arm, data, options, 0) for arm in (unit.PLAIN, *unit.TARGETS)}
    sizes = {
        arm: sum(p.numel() for p in unit.start(arm, data, options, 0).parameters())
        for arm in (unit.PLAIN, unit.MATCHED, unit.OURS)
    }
    assert sizes[unit.PLAIN] == 59_000
    assert sizes[unit.OURS] == pytest.approx(sizes[unit.MATCHED], abs=30)
    for arm, target in unit.TARGETS.items():
        scene = scenes[arm]
        assert isinstance(scene, VDGSScene)
        assert scene.field.target == target
        assert torch.equal(scene.means, scenes[unit.PLAIN].means)
        opacities, _ = scene.appearance(data.cameras)
        assert opacities.mean().item() == pytest.approx(0.1, abs=0.03)


def test_glints_are_told_apart():
    options = {**FULL, "views": 8, "size": 16}
    data = unit.make_data("glass", options, 0)
    scene = unit.start(unit.PLAIN, data, options, 0)
    scene.opacity_logits.data.fill_(-20.0)  # black
    data.images[data.held] = torch.where(data.glint[data.held][..., None] > 0, 0.1, 0.01)
    found = unit.quality(scene, data)
    assert found["PSNR of glints"] == pytest.approx(20.0, abs=1e-3)
    assert 20 < found["PSNR"] < 40


def synthetic(ours=(21.0, 21.0, 21.0), matched=20.5, whole=25.0, control=25.0):
    """Figures of three seeds in which plain splats have 20 dB in glints and 25 dB overall."""
    glints = {unit.PLAIN: (20.0,) * 3, unit.MATCHED: (matched,) * 3, unit.OURS: ours}
    figures = {}
    for name in unit.SCENES:
        for arm, values in glints.items():
            if name in unit.SHINING:
                shift = 1.0 if name == "glass" else -1.0
                figures[f"{name}, {arm}: PSNR of glints"] = tuple(v + shift for v in values)
            if (name, arm) == (unit.CONTROL, unit.MATCHED):
                continue
            changed = control if name == unit.CONTROL else whole
            figures[f"{name}, {arm}: PSNR"] = (changed if arm == unit.OURS else 25.0,) * 3
            figures[f"{name}, {arm}: ms a picture"] = (3.0,) * 3
    return {name: Measurement(name, values) for name, values in figures.items()}


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True, True, True]),
        (synthetic(ours=(22.0, 20.4, 22.0)), [False, True, True]),  # below matched in one seed
        (synthetic(ours=(22.0, 19.9, 22.0), matched=19.0), [False, True, True]),
        (synthetic(ours=(20.6, 20.6, 20.6)), [False, True, True]),
        (synthetic(ours=(20.15, 20.15, 20.15), matched=19.0), [False, True, True]),
        (synthetic(whole=24.91), [True, True, True]),
        (synthetic(whole=24.89), [True, False, True]),
        (synthetic(control=25.29), [True, True, True]),
        (synthetic(control=25.31), [True, True, False]),
        (synthetic(control=24.69), [True, True, False]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected
    unit.plot(measured, Figure())
