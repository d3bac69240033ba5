"""What training must bring on a ray-traced scene: a better picture, and a pose that was lost."""

import math

import pytest
import torch

from torchzoo.data.splat_scenes import make_scene
from torchzoo.ops import library
from torchzoo.splatting.cameras import Cameras
from torchzoo.splatting.fitting import SplatTrainer
from torchzoo.splatting.losses import l1
from torchzoo.splatting.scene import GaussianScene

NATIVE = library.backend("splat_raster")[0] == "native"
needs_kernels = pytest.mark.skipif(not NATIVE, reason="minutes without the native kernels")


def gain(views, size, points, steps, seed):
    """By how many dB training raises the held-out PSNR of a scene."""
    scene = make_scene("checker", views, size, seed, n_points=points)
    splats = GaussianScene.from_points(scene.points, scene.colors)
    train, held = scene.train_ids, scene.test_ids
    run = SplatTrainer(splats, scene.cameras[train], scene.images[train], steps=steps, seed=seed)
    before = run.evaluate(scene.cameras[held], scene.images[held])
    run.fit()
    after = run.evaluate(scene.cameras[held], scene.images[held])
    return after["psnr"] - before["psnr"]


def test_a_small_run_gains_decibels():
    assert gain(12, 20, 300, 50, seed=0) > 3


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_short_runs_gain_six_decibels(seed):
    assert gain(24, 64, 2000, 400, seed) >= 6


def turned(cameras, degrees, shift):
    """The cameras turned about an oblique axis and shifted by lengths in the world."""
    axis = torch.tensor([1.0, 2.0, -1.0]) / math.sqrt(6) * math.radians(degrees)
    small = torch.zeros(4, 4)
    small[:3, :3] = torch.tensor(
        [[0.0, -axis[2], axis[1]], [axis[2], 0.0, -axis[0]], [-axis[1], axis[0], 0.0]]
    )
    small[:3, 3] = shift * torch.tensor([2.0, -1.0, 2.0]) / 3
    return Cameras(
        torch.linalg.matrix_exp(small) @ cameras.viewmats,
        cameras.Ks,
        cameras.width,
        cameras.height,
    )


def pose_errors(viewmat, truth):
    """Angle in degrees, and the distance of the camera's centres."""
    relative = viewmat[:3, :3] @ truth[:3, :3].T
    sine = torch.stack(
        [
            relative[2, 1] - relative[1, 2],
            relative[0, 2] - relative[2, 0],
            relative[1, 0] - relative[0, 1],
        ]
    )
    centers = [-m[:3, :3].T @ m[:3, 3] for m in (viewmat, truth)]
    return math.degrees(math.asin(min(1.0, sine.norm().item() / 2))), (
        centers[0] - centers[1]
    ).norm().item()


def recover(size, points, steps, seed=0):
    """Pose errors before and after Adam on a twist, from what the splats themselves look like."""
    scene = make_scene("checker", 8, size, seed, n_points=points)
    splats = GaussianScene.from_points(scene.points, scene.colors, init_opacity=0.9)
    splats.requires_grad_(False)
    true = scene.cameras[3]
    target = splats.render(true).image
    start = turned(true, 1.0, 0.01)
    twist = torch.zeros(6, requires_grad=True)
    optimizer = torch.optim.Adam([twist], lr=2e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * 0.01 ** (step / steps)
        image = splats.render(moved(start, twist)).image
        optimizer.zero_grad()
        l1(image, target).backward()
        optimizer.step()
    with torch.no_grad():
        found = moved(start, twist)
    return pose_errors(start.viewmats[0], true.viewmats[0]), pose_errors(
        found.viewmats[0], true.viewmats[0]
    )


def moved(camera, twist):
    """A camera moved by a twist: three of rotation, three of translation."""
    zero = twist.new_zeros(())
    a, b, c, x, y, z = twist
    generator = torch.stack(
        [
            torch.stack([zero, -c, b, x]),
            torch.stack([c, zero, -a, y]),
            torch.stack([-b, a, zero, z]),
            torch.zeros(4),
        ]
    )
    viewmats = torch.linalg.matrix_exp(generator) @ camera.viewmats
    return Cameras(viewmats, camera.Ks, camera.width, camera.height)


@pytest.mark.parametrize(
    ("size", "points"),
    [
        pytest.param(64, 2000, marks=[pytest.mark.slow, needs_kernels]),
        pytest.param(32, 400, marks=needs_kernels),
    ],
)
def test_a_perturbed_pose_is_recovered(size, points):
    """One degree and one centimetre, to a tenth of each, in 200 steps of Adam."""
    before, after = recover(size, points, 200)
    assert before[0] == pytest.approx(1.0, rel=1e-3)
    assert after[0] <= 0.1 * before[0]
    assert after[1] <= 0.1 * before[1]
