"""The experiment on compact scenes runs, and its criteria can fail."""

import pytest
import torch
from matplotlib.figure import Figure

from torchzoo.experiment import Measurement, reproduce
from torchzoo.experiments.splatting import compact as unit
from torchzoo.splatting import GaussianScene

NAMES = (unit.PLAIN, unit.PRUNED, unit.COMPACT, f"{unit.COMPACT}, entropy-coded")


def test_smoke_run():
    result = reproduce(unit.EXPERIMENT, budget="smoke")
    assert len(result.criteria) == 5
    assert result.verdict == "not reproduced"  # so few splats say nothing
    measured = result.measured()
    assert len(measured) == 4 * len(NAMES) + 2 + 2 + 1
    splats = measured[f"{unit.PLAIN}: splats"].values[0]
    assert measured[f"{unit.PLAIN}: bytes"].values[0] == 236 * splats
    unit.plot(measured, Figure())


def test_cut_keeps_the_most_opaque():
    scene = GaussianScene(5, sh_degree=1)
    scene.opacity_logits.data = torch.tensor([0.0, 3.0, -1.0, 2.0, 1.0])
    small = unit.cut(scene, 2)
    assert small.opacity_logits.tolist() == [3.0, 2.0]
    assert torch.equal(small.means, scene.means[[1, 3]].half().float())


def synthetic(splats=4000, kept=2500, size=80_000, psnr=(25.0, 24.8, 24.0), ms=(2.0, 1.5)):
    """Measurements of three seeds: PSNR of 3DGS, of the compact scene and of the cut one."""
    values = {
        f"{unit.PLAIN}: splats": splats,
        f"{unit.COMPACT}: splats": kept,
        f"{unit.PLAIN}: bytes": 236 * splats,
        f"{unit.COMPACT}: bytes": size,
        f"{unit.PRUNED}: bytes": 118 * kept,
        f"{NAMES[3]}: bytes": 0.8 * size,
        f"{unit.PLAIN}: PSNR": psnr[0],
        f"{unit.COMPACT}: PSNR": psnr[1],
        f"{unit.PRUNED}: PSNR": psnr[2],
        f"{NAMES[3]}: PSNR": psnr[1] - 0.1,
        f"{unit.PLAIN}: ms a picture": ms[0],
        f"{unit.COMPACT}: ms a picture": ms[1],
        "ms for the field's colours": 1.0,
    }
    return {name: Measurement(name, (float(v),) * 3) for name, v in values.items()}


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True] * 5),
        (synthetic(size=95_000), [False, True, True, True, True]),
        (synthetic(size=119_000), [False, False, True, True, True]),
        (synthetic(psnr=(25.0, 24.1, 24.0)), [False, True, True, True, True]),
        (synthetic(psnr=(25.0, 24.8, 24.9)), [True, True, True, False, True]),
        (synthetic(kept=3100), [True, True, False, True, True]),
        (synthetic(ms=(2.0, 2.1)), [True, True, True, True, False]),
        (synthetic(splats=3700), [None, None, True, True, True]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected
    unit.plot(measured, Figure())


def test_one_seed_below_the_cut_scene_fails():
    measured = synthetic()
    name = f"{unit.COMPACT}: PSNR"
    measured[name] = Measurement(name, (25.0, 25.0, 23.9))
    assert unit.EXPERIMENT.criteria[3].test(measured)[0] is False
