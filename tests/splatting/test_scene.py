"""The scene: what its parameters stand for, how it starts, is saved and is seen."""

import math

import pytest
import torch
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

import torchzoo
from torchzoo.splatting import Cameras, GaussianScene, matrix_to_quat, quat_to_matrix


def scene_of(count=6, degree=2, **options):
    torch.manual_seed(0)
    scene = GaussianScene(count, sh_degree=degree, **options)
    with torch.no_grad():
        for parameter in scene.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return scene


def test_quaternions_equal_scipys():
    quats = torch.randn(200, 4, dtype=torch.float64)
    expected = Rotation.from_quat(quats.roll(-1, -1)).as_matrix()
    matrices = quat_to_matrix(quats)
    torch.testing.assert_close(matrices, torch.from_numpy(expected), rtol=0, atol=1e-13)
    again = matrix_to_quat(matrices)
    assert (again[:, 0] >= 0).all()
    torch.testing.assert_close(again.norm(dim=-1), torch.ones(200, dtype=torch.float64))
    torch.testing.assert_close(quat_to_matrix(again), matrices, rtol=0, atol=1e-13)


@pytest.mark.parametrize("axis", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.6, 0, 0.8), (0, 0.6, -0.8)])
def test_half_turns_have_a_quaternion(axis):
    axis = torch.tensor(axis, dtype=torch.float64)
    half_turn = 2 * axis[:, None] * axis - torch.eye(3)
    quat = matrix_to_quat(half_turn)
    assert torch.allclose(quat[1:].abs(), axis.abs(), atol=1e-12)
    assert torch.allclose(quat_to_matrix(quat), half_turn, atol=1e-12)


def test_a_zero_quaternion_turns_nothing():
    assert torch.equal(quat_to_matrix(torch.zeros(4)), torch.eye(3))


def test_activated_values():
    scene = scene_of().double()
    torch.testing.assert_close(scene.scales, scene.log_scales.exp())
    torch.testing.assert_close(scene.opacities, 1 / (1 + (-scene.opacity_logits).exp()))
    torch.testing.assert_close(scene.unit_quats * scene.quats.norm(dim=-1)[:, None], scene.quats)
    turned = Rotation.from_quat(scene.quats.detach().roll(-1, -1)).as_matrix()
    for row in range(6):
        R = torch.from_numpy(turned[row])
        expected = R @ scene.log_scales[row].mul(2).exp().diag() @ R.T
        torch.testing.assert_close(scene.covariances()[row], expected)
    assert torch.equal(scene.sh[:, :1], scene.sh0)
    assert torch.equal(scene.sh[:, 1:], scene.shN)


def test_scales_from_points_are_rms_distances_to_three_neighbours():
    torch.manual_seed(0)
    xyz, rgb = torch.randn(40, 3, dtype=torch.float64), torch.rand(40, 3, dtype=torch.float64)
    scene = GaussianScene.from_points(xyz, rgb, init_scale=0.7, init_opacity=0.3)
    distances, _ = cKDTree(xyz.numpy()).query(xyz.numpy(), 4)
    rms = torch.from_numpy((distances[:, 1:] ** 2).mean(-1)).sqrt()
    torch.testing.assert_close(scene.scales, 0.7 * rms[:, None].expand(40, 3))
    torch.testing.assert_close(scene.opacities, torch.full((40,), 0.3, dtype=torch.float64))
    torch.testing.assert_close(0.5 + scene.sh0[:, 0] / (2 * math.sqrt(math.pi)), rgb)
    assert not scene.shN.any()
    assert scene.shN.shape == (40, 15, 3)
    assert torch.equal(quat_to_matrix(scene.quats)[7], torch.eye(3, dtype=torch.float64))
    assert torch.equal(scene.means, xyz)


@pytest.mark.parametrize(
    ("count", "scale"), [(0, []), (1, [1.0]), (2, [5.0, 5.0]), (3, [5.0, 5.0, 5.0])]
)
def test_scales_of_few_points(count, scale):
    xyz = torch.tensor([[0.0, 0, 0], [3, 4, 0], [0, 0, 5]])[:count]
    scene = GaussianScene.from_points(xyz, xyz * 0 + 0.5, sh_degree=0)
    if count == 3:
        scale = [5.0, math.sqrt((25 + 50) / 2), math.sqrt((25 + 50) / 2)]
    torch.testing.assert_close(scene.scales[:, 0], torch.tensor(scale))


def test_equal_points_keep_a_scale():
    scene = GaussianScene.from_points(torch.zeros(5, 3), torch.zeros(5, 3))
    torch.testing.assert_close(scene.scales, torch.full((5, 3), 1e-7).sqrt())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"xyz": torch.zeros(4, 2)}, "xyz"),
        ({"rgb": torch.zeros(3, 3)}, "rgb"),
        ({"init_opacity": 1.0}, "init_opacity"),
        ({"init_scale": 0.0}, "init_scale"),
        ({"sh_degree": 4}, "sh"),
    ],
)
def test_bad_points_are_refused(change, name):
    with pytest.raises(ValueError, match=f"{name}.*got"):
        GaussianScene.from_points(**{"xyz": torch.zeros(4, 3), "rgb": torch.zeros(4, 3)} | change)


@pytest.mark.parametrize("name", ["means", "quats", "log_scales", "opacity_logits", "sh"])
def test_tensors_that_do_not_fit_are_refused(name):
    scene = scene_of()
    values = {n: getattr(scene, n) for n in ("means", "quats", "log_scales", "opacity_logits")}
    values["sh"] = scene.sh
    assert torch.equal(GaussianScene.from_tensors(**values).sh, scene.sh)
    broken = values["log_scales"][:5] if name == "means" else values[name][:5]
    name = "log_scales" if name == "means" else name
    with pytest.raises(ValueError, match=f"{name}: got"):
        GaussianScene.from_tensors(**values | {name: broken})


def test_a_state_dict_with_another_number_of_gaussians_loads():
    large, small = scene_of(9, num_features=2), scene_of(4, num_features=2)
    small.load_state_dict(large.state_dict())
    for name, value in large.state_dict().items():
        assert torch.equal(small.state_dict()[name], value)
    nested = torch.nn.ModuleDict({"scene": scene_of(3, num_features=2)})
    nested.load_state_dict({f"scene.{name}": value for name, value in large.state_dict().items()})
    assert nested["scene"].num_gaussians == 9


def test_a_state_dict_that_does_not_fit_leaves_the_scene_as_it_is():
    scene, other = scene_of(4), scene_of(9)
    before = {name: value.clone() for name, value in scene.state_dict().items()}
    broken = other.state_dict() | {"quats": torch.zeros(8, 4)}
    with pytest.raises(RuntimeError, match="size mismatch"):
        scene.load_state_dict(broken)
    with pytest.raises(RuntimeError, match="size mismatch"):
        scene.load_state_dict(scene_of(9, degree=1).state_dict())
    for name, value in scene.state_dict().items():
        assert torch.equal(value, before[name])


def test_saving_after_edits_keeps_the_number(tmp_path):
    scene = scene_of(8)
    scene.keep(torch.tensor([5, 1]))
    again = torchzoo.from_pretrained(scene.save_pretrained(tmp_path / "scene"))
    assert torch.equal(again.means, scene.means)
    assert again.num_gaussians == 2
    again.load_state_dict(scene_of(11).state_dict())
    assert GaussianScene.from_pretrained(again.save_pretrained(tmp_path / "b")).num_gaussians == 11


def test_render_sees_one_gaussian_where_it_is():
    """Its colour is o exp(-r^2 / (2 (s^2 f^2 / z^2 + 0.3))) times the colour that it came with."""
    xyz, rgb = torch.tensor([[0.0, 0.0, 4.0]]), torch.tensor([[0.9, 0.5, 0.1]])
    scene = GaussianScene.from_points(xyz, rgb, init_scale=0.5, init_opacity=0.8)
    K = torch.tensor([[[20.0, 0, 8], [0, 20, 8], [0, 0, 1]]])
    image = scene.render(Cameras(torch.eye(4)[None], K, 16, 16)).image[0]
    centre = torch.arange(16) + 0.5 - 8
    square = centre[:, None] ** 2 + centre**2
    alpha = 0.8 * torch.exp(-square / (2 * (0.5**2 * 20**2 / 16 + 0.3)))
    expected = torch.where(alpha[..., None] >= 1 / 255, alpha[..., None] * rgb, 0)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


def test_render_takes_other_values_and_features():
    scene = scene_of(num_features=5, image_size=(10, 12))
    cameras = Cameras.orbit(2, radius=4.0, width=12, height=10)
    plain = scene.render(cameras).image
    assert torch.equal(scene(cameras.viewmats, cameras.Ks), plain)
    assert scene.render(cameras, features=scene.features).image.shape == (2, 10, 12, 5)
    grey = scene.render(cameras, sh_degree=0).image
    flat = scene.render(cameras, features=(0.5 + scene.sh0[:, 0] / (2 * math.sqrt(math.pi))).relu())
    torch.testing.assert_close(grey, flat.image)
    assert not scene.render(cameras, opacities=torch.zeros(6)).image.any()


def test_an_image_is_fitted():
    """A picture's Gaussians lie on its plane, cover it, and learn it."""
    torch.manual_seed(0)
    scene, camera = GaussianScene.for_image(12, 16, 24), Cameras.for_image(12, 16)
    pixels = torch.einsum("ij,nj->ni", camera.Ks[0, :2], (scene.means + camera.viewmats[0, :3, 3]))
    assert (pixels >= 0).all()
    assert (pixels <= torch.tensor([16, 12])).all()
    assert scene.render(camera).alpha.mean() > 0.4
    columns = torch.linspace(0, 1, 16).expand(12, 16)
    target = torch.stack([columns, columns.flip(1), (columns > 0.5).float()], -1)
    optimizer = torch.optim.Adam(scene.parameters(), lr=0.05)
    losses = []
    for _ in range(25):
        loss = (scene.render(camera).image[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]
