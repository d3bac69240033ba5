"""Scenes with the analytic kernel, their 3-D filter, and smaller cameras and pictures."""

import math

import pytest
import torch
import torch.nn.functional as F

from torchzoo import ops
from torchzoo.splatting import (
    AnalyticScene,
    Cameras,
    GaussianScene,
    SplatTrainer,
    area_downsample,
    mip_filter_3d,
    multiscale_cameras,
)

CAMERAS = Cameras.orbit(3, radius=3.0, width=16, height=12)


def scene(count=20):
    random = torch.Generator().manual_seed(0)
    xyz, rgb = torch.rand(2, count, 3, generator=random)
    made = AnalyticScene.from_points(xyz - 0.5, rgb, sh_degree=1, init_opacity=0.6)
    made.log_scales.data += 0.5 * torch.randn(count, 3, generator=random)
    made.quats.data = torch.randn(count, 4, generator=random)
    return made


@pytest.mark.claim(17, "A scene is rendered with the analytic kernel unless told otherwise")
def test_pictures():
    made = scene()
    out = made.render(CAMERAS)
    expected = ops.rasterize(
        made.means,
        made.quats,
        made.scales,
        made.opacities,
        made.sh,
        CAMERAS.viewmats,
        CAMERAS.Ks,
        16,
        12,
        kernel="analytic",
        sh_degree=1,
    )
    assert torch.equal(out.image, expected.image)
    made.image_size = (12, 16)
    assert torch.equal(made(CAMERAS.viewmats, CAMERAS.Ks), out.image)
    plain = GaussianScene.from_tensors(
        made.means, made.quats, made.log_scales, made.opacity_logits, made.sh
    )
    assert torch.equal(made.render(CAMERAS, kernel="gaussian").image, plain.render(CAMERAS).image)
    assert not torch.equal(out.image, plain.render(CAMERAS).image)


@pytest.mark.claim(
    17,
    "The 3-D filter adds its variance along all axes and keeps each splat's mass",
    tolerance=1e-6,
)
def test_filtered_pictures():
    made = scene()
    assert torch.equal(made.render(CAMERAS, filter_3d=True).image, made.render(CAMERAS).image)
    made.update_filter_3d(CAMERAS, variance=0.4)
    torch.testing.assert_close(
        made.filter_scales.data, mip_filter_3d(made.means, CAMERAS, variance=0.4)
    )
    with torch.no_grad():
        s, f, o = made.scales, made.filter_scales, made.opacities
        wide = torch.stack([(s[:, k] ** 2 + f**2) ** 0.5 for k in range(3)], -1)
        opacities = o * (s[:, 0] * s[:, 1] * s[:, 2]) / (wide[:, 0] * wide[:, 1] * wide[:, 2])
        smooth = AnalyticScene.from_tensors(
            made.means, made.quats, wide.log(), opacities.logit(), made.sh
        )
    expected = smooth.render(CAMERAS).image
    found = made.render(CAMERAS, filter_3d=True)
    torch.testing.assert_close(found.image, expected, atol=1e-5, rtol=0)
    assert (found.image - made.render(CAMERAS).image).abs().max() > 1e-2
    found.image.sum().backward()
    assert made.log_scales.grad.isfinite().all()
    assert made.filter_scales.grad is None


def brute_filter(means, cameras, variance):
    """Pixel by pixel in Python; None where nothing sees a point."""
    sizes = []
    for mean in means.tolist():
        least = None
        for view, K in zip(cameras.viewmats.tolist(), cameras.Ks.tolist(), strict=True):
            x, y, z = (
                sum(r * m for r, m in zip(row[:3], mean, strict=True)) + row[3] for row in view[:3]
            )
            if z < 0.01:
                continue
            depth = z if cameras.camera_model == "pinhole" else 1.0
            u, v = K[0][0] * x / depth + K[0][2], K[1][1] * y / depth + K[1][2]
            w, h = cameras.width, cameras.height
            if -0.15 * w <= u <= 1.15 * w and -0.15 * h <= v <= 1.15 * h:
                size = depth / max(K[0][0], K[1][1])
                least = size if least is None else min(least, size)
        sizes.append(least)
    largest = max((size for size in sizes if size is not None), default=0.0)
    return [math.sqrt(variance) * (largest if s is None else s) for s in sizes], sizes


@pytest.mark.claim(
    17,
    "The 3-D filter is sqrt(0.2) pixels of the nearest camera that sees the splat's centre",
    tolerance=1e-6,
)
@pytest.mark.parametrize("model", ["pinhole", "orthographic"])
def test_filter_sizes(model):
    random = torch.Generator().manual_seed(1)
    means = 2.5 * torch.randn(300, 3, generator=random, dtype=torch.float64)
    cameras = Cameras.orbit(5, radius=3.0, width=16, height=12, dtype=torch.float64)
    stretch = torch.tensor([[1.0], [1.3], [1.0]], dtype=torch.float64)
    scale = 1.0 if model == "pinhole" else 0.3
    Ks = cameras.Ks * stretch
    Ks[:, :2, :2] *= scale * torch.tensor([1.0, 1.1, 0.9, 1.2, 1.0]).double()[:, None, None]
    cameras = Cameras(cameras.viewmats, Ks, 16, 12, model)
    expected, sizes = brute_filter(means, cameras, 0.2)
    assert sum(size is None for size in sizes) >= 3
    assert len(set(expected)) > 3
    found = mip_filter_3d(means, cameras)
    torch.testing.assert_close(found.tolist(), expected, rtol=1e-9, atol=0)
    wider = mip_filter_3d(means, cameras, variance=0.8)
    torch.testing.assert_close(wider, 2 * found)


def test_filters_of_what_nobody_sees():
    behind = torch.tensor([[0.0, 0.0, -5.0]])
    ahead = Cameras(torch.eye(4)[None], CAMERAS.Ks[:1], 16, 12)
    assert mip_filter_3d(behind, ahead).tolist() == [0.0]
    assert mip_filter_3d(torch.empty(0, 3), ahead).shape == (0,)
    both = mip_filter_3d(torch.cat([behind, -behind]), ahead)
    assert both[0] == both[1] > 0
    assert not mip_filter_3d(behind.clone().requires_grad_(), ahead).requires_grad


@pytest.mark.claim(17, "Edits, files and loading carry the 3-D filter along; training leaves it")
def test_filters_live_with_their_splats(tmp_path):
    made = scene()
    made.update_filter_3d(CAMERAS)
    before = made.filter_scales.clone()
    images = torch.rand(3, 12, 16, 3)
    trainer = SplatTrainer(made, CAMERAS, images, steps=2, render_options={"filter_3d": True})
    means = made.means.detach().clone()
    trainer.fit()
    assert torch.equal(made.filter_scales, before)
    assert not torch.equal(made.means, means)
    assert "filter_scales" not in {group["name"] for group in trainer.optimizer.param_groups}
    made.keep(torch.tensor([3, 1, 2]), trainer.optimizer)
    made.clone(torch.tensor([0]), trainer.optimizer)
    assert torch.equal(made.filter_scales, before[[3, 1, 2, 3]])
    assert not made.filter_scales.requires_grad
    other = AnalyticScene(7, sh_degree=1)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.filter_scales, made.filter_scales)
    twin = AnalyticScene.from_pretrained(made.save_pretrained(tmp_path / "scene"))
    shown = [one.render(CAMERAS, filter_3d=True).image for one in (made, other, twin)]
    assert torch.equal(shown[0], shown[1])
    assert torch.equal(shown[0], shown[2])
    made.reset_parameters()
    assert (made.filter_scales == 0).all()


@pytest.mark.claim(
    17, "A smaller camera sees each point at its place over the factor", tolerance=1e-5
)
def test_smaller_cameras():
    cameras = Cameras.orbit(3, radius=3.0, width=64, height=32)
    for factor, smaller in zip((1, 2, 4, 8), multiscale_cameras(cameras), strict=True):
        assert (smaller.width, smaller.height) == (64 // factor, 32 // factor)
        assert torch.equal(smaller.viewmats, cameras.viewmats)
        points = torch.tensor([[0.1, -0.2, 0.3], [0.0, 0.4, 0.0]])
        places = []
        for seen in (cameras, smaller):
            local = points @ seen.viewmats[:, :3, :3].mT + seen.viewmats[:, None, :3, 3]
            ahead = local @ seen.Ks.mT
            places.append(ahead[..., :2] / ahead[..., 2:])
        torch.testing.assert_close(places[0] / factor, places[1])


def test_smaller_pictures():
    images = torch.rand(2, 3, 12, 8, 3)
    channels_first = images.flatten(0, 1).permute(0, 3, 1, 2)
    for factor in (1, 2, 4):
        expected = F.avg_pool2d(channels_first, factor).permute(0, 2, 3, 1)
        found = area_downsample(images, factor).flatten(0, 1)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: area_downsample(torch.rand(12, 8, 3), 8), r"factor: got 8, .* \(12, 8\)"),
        (lambda: area_downsample(torch.rand(12, 8, 3), 0), "factor: got 0"),
        (lambda: area_downsample(torch.rand(12, 8), 2), r"images: .* \(12, 8\)"),
        (lambda: area_downsample(torch.ones(4, 4, 3).byte(), 2), "images: got torch.uint8"),
        (lambda: multiscale_cameras(CAMERAS, (1, 8)), r"factors: got 8, .* \(12, 16\)"),
        (lambda: multiscale_cameras(CAMERAS, (0,)), "factors: got 0"),
        (lambda: mip_filter_3d(torch.rand(3), CAMERAS), r"means: got \(3,\)"),
        (lambda: mip_filter_3d(torch.rand(3, 3), CAMERAS, variance=0.0), "variance: got 0.0"),
        (
            lambda: mip_filter_3d(
                torch.rand(3, 3), Cameras(CAMERAS.viewmats, CAMERAS.Ks, 16, 12, "fisheye")
            ),
            "cameras: got fisheyes",
        ),
        (lambda: AnalyticScene(3, sh_degree=7), "sh_degree: got 7"),
    ],
)
def test_what_does_not_fit(call, words):
    with pytest.raises(ValueError, match=words):
        call()
