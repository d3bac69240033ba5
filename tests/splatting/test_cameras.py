"""Cameras: conventions, and where points of the world come to lie in the image."""

import math

import pytest
import torch
from scipy.spatial.transform import Rotation

from torchzoo.splatting import Cameras


def project(cameras, points):
    """Pixels `(C, P, 2)` and depths of points, by the pinhole equations."""
    ones = torch.ones(len(points), 1, dtype=points.dtype)
    seen = torch.cat([points, ones], 1) @ cameras.viewmats.mT
    image = seen[..., :3] @ cameras.Ks.mT
    return image[..., :2] / image[..., 2:], seen[..., 2]


def test_look_at():
    """The target is in the middle, what is up is up, and the field of view is as wide as asked."""
    eyes = torch.tensor([[3.0, 1.0, 0.5], [-2.0, 2.0, 4.0]], dtype=torch.float64)
    target = torch.tensor([0.2, -0.1, 0.3], dtype=torch.float64)
    cameras = Cameras.look_at(eyes, target, width=40, height=30, fov=60)
    torch.testing.assert_close(cameras.centers, eyes)
    pixels, depths = project(cameras, torch.stack([target, target + torch.tensor([0, 0, 0.1])]))
    torch.testing.assert_close(pixels[:, 0], torch.tensor([[20.0, 15.0]] * 2).double())
    torch.testing.assert_close(depths[:, 0], (eyes - target).norm(dim=-1))
    torch.testing.assert_close(pixels[:, 1, 0], torch.tensor([20.0, 20.0]).double())
    assert (pixels[:, 1, 1] < 15).all()
    right = cameras.camera_to_world()[0, :3, 0]
    edge = target + right * depths[0, 0] * math.tan(math.radians(30))
    torch.testing.assert_close(project(cameras[0], edge[None])[0][0, 0, 0].item(), 40.0)
    R = cameras.viewmats[:, :3, :3]
    torch.testing.assert_close(R @ R.mT, torch.eye(3).double().expand(2, 3, 3))
    torch.testing.assert_close(torch.linalg.det(R), torch.ones(2).double())


def test_looking_along_up_is_a_rotation_too():
    cameras = Cameras.look_at(torch.tensor([[0.0, 0, 2], [0, 0, -2]]), width=4, height=4)
    R = cameras.viewmats[:, :3, :3]
    torch.testing.assert_close(R @ R.mT, torch.eye(3).expand(2, 3, 3))
    torch.testing.assert_close(R[:, 2], torch.tensor([[0.0, 0, -1], [0, 0, 1]]))


def test_orbit():
    target = (1.0, 2.0, 3.0)
    cameras = Cameras.orbit(6, radius=2.0, elevation=30.0, target=target, width=8, height=6)
    away = cameras.centers - torch.tensor(target)
    torch.testing.assert_close(away.norm(dim=-1), torch.full((6,), 2.0))
    torch.testing.assert_close(away[:, 2], torch.full((6,), 1.0))
    angle = torch.atan2(away[:, 1], away[:, 0]).diff().remainder(2 * math.pi)
    torch.testing.assert_close(angle, torch.full((5,), math.pi / 3))
    assert cameras.scene_scale == pytest.approx(1.1 * math.sqrt(3))
    assert cameras[0].scene_scale == 1.0


def test_conventions():
    """An OpenGL camera at rest looks down its negative z with y up."""
    K = torch.tensor([[[10.0, 0, 4], [0, 10, 4], [0, 0, 1]]])
    rest = Cameras.from_camera_to_world(torch.eye(4)[None], K, 8, 8, convention="opengl")
    pixels, depths = project(rest, torch.tensor([[0.2, 0.1, -1.0]]))
    torch.testing.assert_close(pixels[0, 0], torch.tensor([6.0, 3.0]))
    assert depths.item() == 1
    pose = Cameras.orbit(3, radius=2.0, width=8, height=8)
    for convention in ("opencv", "opengl"):
        c2w = pose.camera_to_world(convention)
        torch.testing.assert_close(c2w[:, :3, 3], pose.centers)
        for given in (c2w, c2w[:, :3]):
            again = Cameras.from_camera_to_world(given, pose.Ks, 8, 8, convention=convention)
            torch.testing.assert_close(again.viewmats, pose.viewmats)
    torch.testing.assert_close(
        pose.camera_to_world() @ pose.viewmats, torch.eye(4).expand(3, 4, 4), atol=1e-6, rtol=0
    )


def test_colmap_poses():
    qvecs = torch.randn(5, 4, dtype=torch.float64)
    tvecs = torch.randn(5, 3, dtype=torch.float64)
    cameras = Cameras.from_colmap(qvecs, tvecs, torch.eye(3).double().expand(5, 3, 3), 9, 7)
    turned = torch.from_numpy(Rotation.from_quat(qvecs.roll(-1, -1)).as_matrix())
    point = torch.randn(3, dtype=torch.float64)
    seen = (cameras.viewmats[:, :3] @ torch.cat([point, torch.ones(1)])[:, None]).squeeze(-1)
    torch.testing.assert_close(seen, turned @ point + tvecs)


def test_resized_cameras_see_the_same():
    cameras = Cameras.orbit(2, radius=3.0, width=40, height=20)
    small = cameras.resized(10, 10)
    points = torch.randn(7, 3) * 0.3
    factor = torch.tensor([0.25, 0.5])
    torch.testing.assert_close(project(small, points)[0], project(cameras, points)[0] * factor)
    assert (small.width, small.height) == (10, 10)


def test_camera_of_an_image():
    """The corners of the picture are at the ends of the longer side's -1 to 1."""
    camera = Cameras.for_image(20, 40)
    assert camera.camera_model == "orthographic"
    corners = torch.tensor([[-1.0, -0.5, 0.0], [1.0, 0.5, 0.0]])
    pixels = project(camera, corners)[0][0]  # at depth 1, where a pinhole sees the same
    torch.testing.assert_close(pixels, torch.tensor([[0.0, 0.0], [40.0, 20.0]]))


def test_indexing():
    cameras = Cameras.orbit(5, radius=2.0, width=8, height=6)
    assert [len(c) for c in cameras] == [1] * 5
    assert torch.equal(cameras[-1].viewmats, cameras.viewmats[4:])
    assert torch.equal(cameras[1:4:2].Ks, cameras.Ks[[1, 3]])
    assert torch.equal(cameras[torch.tensor([3, 0])].viewmats, cameras.viewmats[[3, 0]])
    assert len(cameras[[0, 2, 4]]) == 3
    with pytest.raises(IndexError):
        cameras[5]
    double = cameras.to(dtype=torch.float64)
    assert double.viewmats.dtype == double.Ks.dtype == torch.float64
    assert double.width == 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"viewmats": torch.zeros(2, 3, 4)}, r"viewmats: got \(2, 3, 4\), expected \(C, 4, 4\)"),
        ({"Ks": torch.zeros(3, 3, 3)}, r"Ks: got \(3, 3, 3\), expected \(C, 3, 3\) with C=2"),
        ({"Ks": torch.zeros(2, 3, 3, dtype=torch.int64)}, "Ks: got torch.int64"),
        ({"width": 0}, "width: got 0"),
        ({"height": -1}, "height: got -1"),
        ({"camera_model": "panorama"}, "camera_model: got 'panorama'"),
    ],
)
def test_bad_cameras_are_refused(change, words):
    given = {"viewmats": torch.zeros(2, 4, 4), "Ks": torch.zeros(2, 3, 3), "width": 4, "height": 4}
    with pytest.raises(ValueError, match=words):
        Cameras(**given | change)


def test_bad_poses_are_refused():
    with pytest.raises(ValueError, match="convention: got 'blender'"):
        Cameras.orbit(1, radius=1.0, width=1, height=1).camera_to_world("blender")
    with pytest.raises(ValueError, match="fov: got 180"):
        Cameras.look_at(torch.ones(1, 3), width=1, height=1, fov=180)
    with pytest.raises(ValueError, match=r"eyes: got \(3,\)"):
        Cameras.look_at(torch.ones(3), width=1, height=1)
    with pytest.raises(ValueError, match=r"poses: got \(4, 4\)"):
        Cameras.from_camera_to_world(torch.eye(4), torch.eye(3)[None], 1, 1)
