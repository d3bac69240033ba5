"""The experiment on S3IM runs, and its criteria can fail."""

import pytest
import torch
from matplotlib.figure import Figure

from torchzoo.data.splat_scenes import make_scene
from torchzoo.experiment import Measurement, reproduce
from torchzoo.experiments.splatting import s3im_loss as unit


def test_smoke_run():
    result = reproduce(unit.EXPERIMENT, budget="smoke")
    assert len(result.criteria) == 3
    measured = result.measured()
    assert len(measured) == 2 * 2 + 2 + 1
    unit.plot(measured, Figure())


def test_training_rays():
    scene = make_scene("texture", unit.VIEWS, 8, 0)
    assert len(scene.test_ids) == 3
    sparse = unit.training_rays(scene, "sparse", 0)
    assert sparse.colors.shape == (6 * 64, 3)
    views = scene.train_ids[:: unit.EVERY]
    assert torch.equal(sparse.colors, scene.images[views].reshape(-1, 3))
    noisy = unit.training_rays(scene, "corrupted", 0)
    assert noisy.colors.shape == (24 * 64, 3)
    noise = noisy.colors - scene.images[scene.train_ids].reshape(-1, 3)
    assert noise.std().item() == pytest.approx(0.2, rel=0.05)
    for k, view in enumerate(views):
        pixel = 64 * k + 8 * 5 + 2  # row 5, column 2
        p = sparse.origins[pixel] + 3 * sparse.directions[pixel]
        camera = scene.cameras
        local = camera.viewmats[view, :3, :3] @ p + camera.viewmats[view, :3, 3]
        place = (camera.Ks[view] @ local / local[2])[:2]
        torch.testing.assert_close(place, torch.tensor([2.5, 5.5]), atol=1e-3, rtol=0)


def synthetic(sparse=(0.8, 0.9, 1.05), corrupted=(0.9, 0.9, 0.9), overhead=0.1):
    """Measurements of three seeds with these ratios of errors."""
    figures = {}
    for setting, ratios in zip(unit.SETTINGS, (sparse, corrupted), strict=True):
        figures[f"{setting}, {unit.ARMS[0]}: test MSE"] = (0.02, 0.03, 0.01)
        figures[f"{setting}, {unit.ARMS[1]}: test MSE"] = tuple(
            r * e for r, e in zip(ratios, (0.02, 0.03, 0.01), strict=True)
        )
    figures |= {f"{arm}: ms a step": (10.0, 11.0, 10.0) for arm in unit.ARMS}
    figures["overhead"] = (overhead,) * 3
    return {name: Measurement(name, values) for name, values in figures.items()}


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True, True, True]),
        (synthetic(sparse=(0.9, 0.99, 1.2)), [False, True, True]),
        (synthetic(sparse=(0.5, 1.01, 1.02)), [False, True, True]),
        (synthetic(corrupted=(1.0, 1.01, 0.99)), [True, False, True]),
        (synthetic(overhead=0.16), [True, True, False]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected
    unit.plot(measured, Figure())
