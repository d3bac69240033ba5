"""The ray tracer against closed forms."""

import math

import numpy as np
import pytest
import torch

from torchzoo.data.raytracing import Box, Cylinder, Ellipsoid, Fog, Solid, Torus, World, pixel_rays
from torchzoo.data.splat_worlds import WORLDS, flat, world
from torchzoo.splatting.cameras import Cameras

SHAPES = [
    Ellipsoid((0.5, 0.5, 0.5)),
    Ellipsoid((0.7, 0.4, 0.3)),
    Box((0.3, 0.5, 0.2)),
    Cylinder(0.4, 0.3),
    Torus(0.5, 0.2),
]
WHITE = flat((1.0, 1.0, 1.0))


def rays(count=4000, seed=0, aim=1.0):
    """Float64 rays from radius 4 towards points near the origin."""
    random = torch.Generator().manual_seed(seed)
    o, target = torch.randn(2, 3, count, generator=random, dtype=torch.float64)
    return 4 * o / o.norm(dim=0), aim * target / 2 - 4 * o / o.norm(dim=0)


def camera(eye=(0.0, -4.0, 0.0), size=64, fov=45.0):
    return Cameras.look_at(torch.tensor([eye]), width=size, height=size, fov=fov)


def inside(shape, p):
    """Whether points are inside, from the shape's definition."""
    x, y, z = p
    if isinstance(shape, Ellipsoid):
        return sum((c / r) ** 2 for c, r in zip(p, shape.radii, strict=True)) < 1
    if isinstance(shape, Box):
        return (p.abs() < torch.tensor(shape.half)[:, None]).all(0)
    if isinstance(shape, Cylinder):
        return (x**2 + y**2 < shape.radius**2) & (z.abs() < shape.half_height)
    across = x**2 + y**2
    return (across + z**2 + shape.ring**2 - shape.tube**2) ** 2 < 4 * shape.ring**2 * across


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_a_ray_enters_where_its_inside_begins(shape):
    o, d = rays()
    t = shape.enter(o, d)
    steps = torch.linspace(0.5, 1.5, 2001, dtype=torch.float64)[:, None]
    along = torch.stack(
        [inside(shape, o + s * d) for s in steps]
    )  # brute force in steps of about 0.002
    first = torch.where(along.any(0), steps[along.int().argmax(0), 0], torch.inf)
    sure = first.isfinite()
    assert 500 < sure.sum() < 3500
    assert float(t[sure].isinf().float().mean()) < 0.01 * isinstance(shape, Torus) + 1e-9
    late = (first - t)[sure & t.isfinite()]
    assert float(late.min()) > -2e-4
    assert float(late.quantile(0.99)) < 6e-4  # a step; only grazing rays slip through one
    missed = t.isfinite() & ~sure
    assert int(missed.sum()) < 40
    found = t.isfinite()
    level = shape.distance((o + t.nan_to_num(posinf=0) * d)[:, found]).abs()
    assert float(level.max()) < (3.1e-4 if isinstance(shape, Torus) else 1e-7)


def test_nothing_behind_the_eye_is_seen():
    o, d = rays()
    for shape in SHAPES:
        assert not shape.enter(o, -d).isfinite().any()


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_normals_are_gradients_of_the_distance(shape):
    o, d = rays()
    t = shape.enter(o, d)
    p = (o + t * d)[:, t.isfinite()]
    p = (p + 1e-6 * shape.normal(p)).requires_grad_()  # the distance has a kink at 0
    (slope,) = torch.autograd.grad(shape.distance(p).sum(), p)
    n = shape.normal(p)
    torch.testing.assert_close(n.norm(dim=0), torch.ones_like(n[0]))
    tight = (slope / slope.norm(dim=0) * n).sum(0).detach()
    assert float(tight.quantile(0.01)) > 1 - 1e-6  # edges belong to two faces
    assert bool(((n * d[:, t.isfinite()]).sum(0) < 1e-6).all())


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != SHAPES[1]], ids=repr)
def test_distances_are_those_to_the_nearest_surface_point(shape):
    o, d = rays(40000)
    t = shape.enter(o, d)
    surface = (o + t * d)[:, t.isfinite()].T
    p = 1.5 * torch.randn(3, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p = p[:, ~inside(shape, p)]
    brute = torch.cdist(p.T, surface).amin(1)
    error = brute - shape.distance(p)
    assert float(error.min()) > -1e-3
    assert float(error.max()) < 0.03  # the gaps between the samples
    assert bool((shape.distance(0.5 * o / 4 * 0.2)[inside(shape, 0.5 * o / 4 * 0.2)] < 0).all())


def test_depth_of_a_sphere_and_of_a_plane():
    sphere = World([Solid(Ellipsoid((1.0, 1.0, 1.0)), WHITE)])
    view, camera_ = sphere.render(camera(), supersample=1), camera()
    half = math.tan(math.radians(22.5))
    x = (np.arange(64) + 0.5) / 32 - 1
    u, v = np.meshgrid(half * x, half * x)
    a = 1 + u**2 + v**2  # abs(t d - (0, 0, 4)) = 1
    square = 16 - a * 15
    expected = np.where(square > 0, (4 - np.sqrt(square.clip(0))) / a, 0)
    np.testing.assert_allclose(view.depth[0].numpy(), expected, atol=2e-4)
    np.testing.assert_array_equal(view.alpha[0].numpy(), expected > 0)

    wall = World([Solid(Box((9.0, 0.5, 9.0)), WHITE)])
    np.testing.assert_allclose(wall.render(camera_).depth.numpy(), 3.5, rtol=1e-5)


def test_a_pixel_is_where_the_camera_says():
    cameras = camera((2.0, -3.0, 1.0), size=8)
    o, d = pixel_rays(cameras)
    p = cameras.viewmats[0, :3, :3] @ (o + 3 * d) + cameras.viewmats[0, :3, 3:]
    np.testing.assert_allclose(p[2].numpy(), 3, rtol=1e-5)
    pixel = (cameras.Ks[0] @ (p / p[2]))[:2].T.reshape(8, 8, 2)
    np.testing.assert_allclose(pixel[5, 2].numpy(), [2.5, 5.5], atol=1e-4)


def test_a_solid_stands_where_it_is_put():
    turn = torch.tensor([[0.6, 0.8, 0.0], [-0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    box = Solid(Box((0.5, 0.1, 0.2)), WHITE, (0.3, -0.2, 0.1), turn)
    tip = torch.tensor([[0.3 + 0.6 * 0.5], [-0.2 + 0.8 * 0.5], [0.1]])  # end of the long axis
    assert float(World([box]).distance(tip.T)[0]) == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(box.normal(tip * 1.0001)[:, 0].numpy(), [0.6, 0.8, 0.0], atol=1e-6)
    o = tip + torch.tensor([[0.6], [0.8], [0.0]])
    t = box.enter(o, torch.tensor([[-0.6], [-0.8], [0.0]]))
    assert float(t) == pytest.approx(1, abs=1e-5)


def test_light_on_a_ground_with_a_shadow():
    ground = Solid(Box((3.0, 3.0, 0.5)), flat((0.5, 0.4, 0.2)), (0.0, 0.0, -0.5))
    ball = Solid(Ellipsoid((0.4, 0.4, 0.4)), WHITE, (0.0, 0.0, 1.0))
    scene = World([ground, ball], sun=(1.0, 0.0, 2.0), ambient=0.3)
    spot = torch.tensor([[-0.5, 0.0], [0.0, -2.0], [0.0, 0.0]])  # behind the ball, and beside it
    o = spot + torch.tensor([[0.0], [-1.0], [2.0]])
    color = scene.trace(o, spot - o).color
    slope = 2 / math.sqrt(5)
    np.testing.assert_allclose(color[:, 0].numpy(), [0.15, 0.12, 0.06], rtol=1e-5)
    np.testing.assert_allclose(
        color[:, 1].numpy(), np.array([0.5, 0.4, 0.2]) * (0.3 + 0.7 * slope), rtol=1e-5
    )


def test_a_highlight_is_that_of_blinn_and_phong():
    plate = Solid(Box((3.0, 3.0, 0.5)), flat((0.1, 0.1, 0.1)), (0.0, 0.0, -0.5), gloss=(0.6, 20.0))
    scene = World([plate], sun=(1.0, 0.0, 1.0), ambient=0.4)
    eyes = torch.tensor([[-1.0, -0.5, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    rays_ = scene.trace(eyes, -eyes)
    sun = np.array([1.0, 0.0, 1.0]) / math.sqrt(2)
    for k, eye in enumerate(eyes.T.numpy()):
        half = sun + eye / np.linalg.norm(eye)
        shine = 0.6 * (half[2] / np.linalg.norm(half)) ** 20
        expected = min(1.0, 0.1 * (0.4 + 0.6 / math.sqrt(2)) + shine)
        assert float(rays_.color[0, k]) == pytest.approx(expected, rel=1e-4)
        assert float(rays_.glint[k]) == (shine > 0.05)
    assert rays_.glint.tolist() == [1.0, 1.0, 0.0]


def test_glass_by_its_angle():
    pane = Solid(Ellipsoid((1.0, 1.0, 1.0)), flat((0.2, 0.6, 1.0)), glass=True)
    wall = Solid(Box((3.0, 0.5, 3.0)), flat((0.8, 0.8, 0.8)), (0.0, 3.0, 0.0))
    scene = World([pane, wall], ambient=1.0)
    offset = torch.tensor([0.0, 0.6, 0.9, 1.1])
    o = torch.stack([offset, -4 * torch.ones(4), torch.zeros(4)])
    seen = scene.trace(o, torch.tensor([[0.0], [1.0], [0.0]]).expand(3, 4))
    cosine = (1 - offset.square()).clamp(min=0).sqrt()
    share = torch.where(offset < 1, 0.1 + 0.8 * (1 - cosine) ** 3, 0)
    torch.testing.assert_close(seen.color[0], share * 0.2 + (1 - share) * 0.8)
    torch.testing.assert_close(seen.t, torch.full((4,), 6.5))
    assert seen.glint.tolist() == [1.0, 1.0, 1.0, 0.0]
    alone = World([pane, Solid(Ellipsoid((0.1,) * 3), WHITE, (0.0, 0.0, 2.0))]).trace(
        o, torch.tensor([[0.0], [1.0], [0.0]]).expand(3, 4)
    )
    torch.testing.assert_close(alone.alpha, share)
    behind = World([pane, Solid(Box((3.0, 0.5, 3.0)), WHITE, (0.0, -2.0, 0.0))], ambient=1.0)
    assert behind.trace(o, torch.tensor([[0.0], [1.0], [0.0]]).expand(3, 4)).color.min() == 1


def test_fog_thins_with_the_way_in_it():
    wall = Solid(Box((9.0, 0.5, 9.0)), flat((0.8, 0.8, 0.8)), (0.0, 0.5, 0.0))
    scene = World([wall], ambient=1.0, fog=Fog(0.7, 1.5, (0.1, 0.5, 0.9)))
    o = torch.tensor([[0.0, 1.2, 2.0], [-4.0, -4.0, -4.0], [0.0, 0.0, 0.0]])
    seen = scene.trace(o, torch.tensor([[0.0], [2.0], [0.0]]).expand(3, 3))
    clear = torch.exp(-0.7 * torch.tensor([1.5, 0.9, 0.0]))
    torch.testing.assert_close(seen.color[2], clear * 0.8 + (1 - clear) * 0.9)
    away = scene.trace(o, torch.tensor([[0.0], [-2.0], [0.0]]).expand(3, 3))
    assert away.alpha.max() == 0
    through = World([Solid(Ellipsoid((0.01,) * 3), WHITE, (3.0, 3.0, 3.0))], fog=scene.fog)
    alpha = through.trace(o, torch.tensor([[0.0], [2.0], [0.0]]).expand(3, 3)).alpha
    torch.testing.assert_close(alpha, 1 - clear.square())


def test_coverage_is_the_image_of_a_white_world_in_even_light():
    solids = [
        Solid(s.shape, WHITE, s.center, s.rotation)
        for s in world("boxes").solids + world("thin").solids
    ]
    views = World(solids, ambient=1.0).render(camera((1.0, -3.0, 2.0), 24))
    torch.testing.assert_close(views.images, views.alpha[..., None].expand(-1, -1, -1, 3))
    assert 0.1 < float(((views.alpha > 0) & (views.alpha < 1)).float().mean()) < 0.8


@pytest.mark.parametrize("name", WORLDS)
def test_images_of_several_sizes_agree(name):
    scene = world(name, seed=3)
    cameras = camera((2.0, -2.5, 2.0), 32)
    coarse = scene.render(cameras, supersample=4)
    fine = scene.render(cameras.resized(64, 64), supersample=2)
    pooled = torch.nn.functional.avg_pool2d(fine.images.permute(0, 3, 1, 2), 2)
    torch.testing.assert_close(
        coarse.images, pooled.permute(0, 2, 3, 1), atol=0.04, rtol=0
    )  # a ray that grazes an edge may fall on either side
    assert float((coarse.images - pooled.permute(0, 2, 3, 1)).abs().mean()) < 1e-5
