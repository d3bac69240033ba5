"""Scenes decoded from points: splats by hand, pictures of these, files and training."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from torchzoo import ops
from torchzoo.splatting import (
    Cameras,
    GaussianScene,
    SAGSLite,
    SAGSScene,
    SplatTrainer,
    StructureAwareEncoder,
    curvature_densify,
)
from torchzoo.splatting.sags import SAGS_RATES
from torchzoo.splatting.sags_points import voxel_means

DOUBLE = torch.float64


def points_of(count=40, *, seed=0, dtype=DOUBLE):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def scene_of(kind=SAGSScene, count=40, *, seed=0, dtype=DOUBLE, **options):
    """A scene as after training, at given points."""
    torch.manual_seed(seed)
    encoder = StructureAwareEncoder(6, k=4, levels=2, log2_table=8, dtype=dtype)
    scene = kind(count, encoder=encoder, feature_std=1.0, dtype=dtype, **options)
    scene.start(points_of(count, dtype=dtype))
    for parameter in (encoder.grid.table, encoder.alpha, scene.log_scales):
        nn.init.normal_(parameter, -0.5)
    for layer in (*scene.opacity, *scene.color, *scene.covariance):
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, 0.5)
    return scene


def cameras(count=3, dtype=DOUBLE, size=14):
    return Cameras.orbit(count, radius=4.0, width=size, height=size, dtype=dtype)


@pytest.mark.claim(
    134,
    "Splats are what the networks decode from code, direction and distance: mu = p + exp(l) D(c), "
    "o = max(0, tanh O), colour = sigmoid(C), s = exp(l') sigmoid(S), q = Q / abs(Q)",
    tolerance=1e-10,
)
def test_decoded_splats():
    scene, seen = scene_of(), cameras()
    view, codes = scene.decode(seen), scene.encoder(scene.means, scene.features)
    for c, center in enumerate(seen.centers):
        for i in range(0, 40, 7):
            way = scene.means[i] - center
            length = way.square().sum().sqrt()
            e = torch.cat([codes[i], way / length, length[None]])
            shape = scene.covariance(e)
            near = {"atol": 1e-10, "rtol": 0}
            torch.testing.assert_close(
                view.scales[c, i], scene.log_scales[i, 3:].exp() / (1 + (-shape[:3]).exp()), **near
            )
            torch.testing.assert_close(
                view.quats[c, i], shape[3:] / shape[3:].square().sum().sqrt(), **near
            )
            opacity = torch.tanh(scene.opacity(e)[0])
            torch.testing.assert_close(view.opacities[c, i], opacity.relu(), **near)
            color = 1 / (1 + (-scene.color(e)).exp())
            torch.testing.assert_close(view.colors[c, i], color, **near)
    assert (view.opacities == 0).any()
    assert (view.opacities > 0).any()
    for network, widths in (
        (scene.opacity, [20, 6, 6, 1]),
        (scene.color, [20, 6, 6, 3]),
        (scene.covariance, [20, 6, 6, 7]),
        (scene.displacement, [16, 12, 3]),
    ):
        linear = [layer for layer in network if isinstance(layer, nn.Linear)]
        assert [layer.in_features for layer in linear] + [linear[-1].out_features] == widths
        between = 0 if network is scene.displacement else len(linear) - 1
        assert sum(isinstance(layer, nn.ReLU) for layer in network) == between


@pytest.mark.claim(
    134,
    "Points have no gradient; splats are off them by exp(l) times the network's output, and on "
    "them where that is 0; scales never exceed exp(l')",
    tolerance=1e-12,
)
def test_points_stay():
    scene, seen = scene_of(), cameras()
    view = scene.decode(seen)
    delta = scene.displacement(scene.encoder(scene.means, scene.features))
    assert delta.abs().max() > 0.1
    offset = scene.log_scales[:, :3].exp() * delta
    torch.testing.assert_close(view.means - scene.means, offset, atol=1e-12, rtol=0)
    assert (view.scales <= scene.log_scales[:, 3:].exp()).all()
    scene.render(seen).image.sum().backward()
    assert scene.means.grad is None
    learns = {name for name, p in scene.named_parameters() if p.grad is not None and p.grad.any()}
    assert learns == {name for name, _ in scene.named_parameters()} - {"means"}
    for parameter in scene.displacement.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(scene.decode(seen).means, scene.means)


@pytest.mark.claim(
    134,
    "Displacements are the same for all cameras; opacities, colours and covariances are not",
    tolerance=0,
)
def test_what_cameras_change():
    scene = scene_of()
    one, other = (scene.decode(camera) for camera in cameras(2))
    assert torch.equal(one.means, other.means)
    for name in ("opacities", "colors", "scales", "quats"):
        assert (getattr(one, name) - getattr(other, name)).abs().max() > 0.01, name


def test_pictures_are_of_the_decoded_splats():
    scene, seen = scene_of(), cameras()
    view, found = scene.decode(seen), scene.render(seen, backgrounds=torch.ones(3, dtype=DOUBLE))
    for c, camera in enumerate(seen):
        image = ops.rasterize(
            view.means,
            view.quats[c],
            view.scales[c],
            view.opacities[c],
            view.colors[c],
            camera.viewmats,
            camera.Ks,
            14,
            14,
            backgrounds=torch.ones(3, dtype=DOUBLE),
        ).image
        torch.testing.assert_close(found.image[c], image[0], atol=1e-12, rtol=0)
    assert found.info["radii"].shape[0] == 3
    assert scene.render(seen[:0]).image.shape == (0, 14, 14, 3)


def test_baked_for_one_camera():
    """The plain scene looks the same to the camera it is baked for, and leaves out the unseen."""
    scene, (camera,) = scene_of(), cameras(1)
    baked = scene.bake(camera)
    assert type(baked) is GaussianScene
    assert baked.num_gaussians == (scene.decode(camera).opacities > 0).sum() < 40
    torch.testing.assert_close(
        baked.render(camera).image, scene.render(camera).image, atol=1e-5, rtol=0
    )
    twice = scene.bake(cameras(2)[[0, 0]])
    torch.testing.assert_close(twice.covariances(), scene.bake(cameras(2)[0]).covariances())
    with pytest.raises(ValueError, match="cameras: got none"):
        scene.bake(camera[:0])


@pytest.mark.claim(
    134,
    "Lite: a midpoint has the mean place and the mean code of its two parents, after the encoder",
    tolerance=1e-12,
)
def test_midpoints_of_lite():
    scene = scene_of(SAGSLite)
    places, parents = curvature_densify(scene.means)
    codes = scene.encoder(scene.means, scene.features)
    middle = (codes[parents[:, 0]] + codes[parents[:, 1]]) / 2
    logs = scene.log_scales[parents].mean(1)
    torch.testing.assert_close(
        scene.decode(cameras()).means,
        places + logs[:, :3].exp() * scene.displacement(middle),
        atol=1e-12,
        rtol=0,
    )
    assert len(places) > 2 * scene.num_gaussians
    stored = scene_of()  # the same points and networks, whose codes are those of the first rows
    torch.testing.assert_close(
        scene.decode(cameras()).colors[:, :40], stored.decode(cameras()).colors
    )


@pytest.mark.claim(
    134,
    "Files hold key points and networks alone, and a scene that is read renders the same",
    tolerance=0,
)
@pytest.mark.parametrize("kind", [SAGSScene, SAGSLite])
def test_files(tmp_path, kind):
    scene = scene_of(kind, dtype=torch.float32, image_size=(9, 7))
    seen, path = cameras(dtype=torch.float32), tmp_path / "scene"
    size = scene.save(path, dtype=torch.float32)
    again = SAGSScene.load(path)
    assert type(again) is kind
    assert again.image_size == (9, 7)
    assert torch.equal(again.render(seen).image, scene.render(seen).image)
    rows = {name: len(value) for name, value in load_file(path).items() if "." not in name}
    assert rows == {"means": 40, "features": 40, "log_scales": 40}
    numbers = sum(parameter.numel() for parameter in scene.parameters())
    half = scene.save(path)
    assert half == path.stat().st_size
    assert size - half == pytest.approx(2 * numbers, abs=200)  # the headers differ a little
    rounded = SAGSScene.load(path)
    assert torch.equal(rounded.means, scene.means.half().float())
    torch.testing.assert_close(rounded.features, scene.features, atol=2e-3, rtol=0)


def test_damaged_files(tmp_path):
    path = tmp_path / "scene"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="expected a file of SAGSScene"):
        SAGSScene.load(path)
    save_file({"means": torch.zeros(3, 3)}, path)
    with pytest.raises(ValueError, match="expected a file of SAGSScene"):
        SAGSScene.load(path)
    with pytest.raises(OSError, match="none"):
        SAGSScene.load(tmp_path / "none")


@pytest.mark.parametrize("kind", [SAGSScene, SAGSLite])
def test_graph_follows_edits(kind):
    scene = scene_of(kind)
    rows = torch.arange(38, 8, -1)
    scene.keep(rows)
    other = scene_of(kind, count=12)
    other.load_state_dict(scene.state_dict())
    assert other.num_gaussians == 30
    expected = other.encoder(scene.means, scene.features)
    assert torch.equal(scene._nodes()[1][:30], expected)
    torch.testing.assert_close(other.render(cameras()).image, scene.render(cameras()).image)


def test_beginning_at_points():
    points = torch.cat([points_of(60), points_of(60)[:1]])  # one of them is there twice
    small = {"levels": 2, "log2_table": 6}
    scene = SAGSScene.from_points(points, feat_dim=8, voxel_size=0.3, encoder=small)
    keys = voxel_means(points, 0.3)
    assert torch.equal(scene.means, curvature_densify(keys)[0])
    apart = torch.cdist(scene.means, scene.means).fill_diagonal_(torch.inf).amin(1).log()
    torch.testing.assert_close(scene.log_scales, apart[:, None].expand(-1, 6))
    assert scene.features.shape[1] == scene.encoder.dim == 8
    assert scene.features.eq(0).all()
    opacities = scene.decode(cameras()).opacities
    torch.testing.assert_close(opacities, torch.full_like(opacities, 0.1))
    lite = SAGSScene.from_points(points, feat_dim=8, voxel_size=0.3, lite=True)
    assert isinstance(lite, SAGSLite)
    assert torch.equal(lite.means, keys)
    assert torch.equal(lite._nodes()[0], scene.means)
    assert type(SAGSLite.from_points(points, encoder=small)) is SAGSLite
    plain = SAGSScene.from_points(points, densify=False)
    assert torch.equal(plain.means, voxel_means(points))
    for options, given, message in (
        ({}, points[:5], "points: got 5"),
        ({}, points * torch.nan, "points: got some that are NaN"),
        ({"lite": True, "densify": False}, points, "densify: got False"),
    ):
        with pytest.raises(ValueError, match=message):
            SAGSScene.from_points(given, **options)


@pytest.mark.parametrize("lite", [False, True])
def test_training(lite):
    torch.manual_seed(0)
    points = 0.6 * points_of(60, dtype=torch.float32)
    truth = GaussianScene.from_points(points, points.sigmoid(), init_opacity=0.8)
    seen = cameras(4, torch.float32, 24)
    images = truth.render(seen).image.detach()
    scene = SAGSScene.from_points(points, lite=lite, feat_dim=8, encoder={"log2_table": 8})
    start, count = scene.means.clone(), scene.num_gaussians
    trainer = SplatTrainer(scene, seen, images, steps=40, rates=SAGS_RATES)
    before = trainer.evaluate(seen, images)["psnr"]
    trainer.fit()
    assert trainer.evaluate(seen, images)["psnr"] > before + 2
    assert torch.equal(scene.means, start)
    assert scene.num_gaussians == count
    assert scene.features.abs().max() > 0.01
