"""The scenes: geometry that agrees between views, points, seeds and the cache."""

import pytest
import torch

from torchzoo.data import splat_scenes
from torchzoo.data.splat_scenes import hemisphere, make_scene, split, surface_points, visible
from torchzoo.data.splat_worlds import WORLDS, world
from torchzoo.splatting.cameras import Cameras


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHZOO_CACHE", str(tmp_path))
    return tmp_path / "scenes"


def unproject(cameras, depth, index):
    """World points of all pixels of a view that see something, and where they are in it."""
    rows, columns = depth[index].nonzero().T
    z = depth[index][rows, columns]
    K, view = cameras.Ks[index], cameras.viewmats[index]
    pixel = torch.stack([columns + 0.5, rows + 0.5, torch.ones(len(rows))])
    local = torch.linalg.inv(K) @ pixel * z
    return (view[:3, :3].T @ (local - view[:3, 3:])).T, rows, columns


@pytest.mark.parametrize("name", WORLDS)
def test_views_agree_with_the_surfaces_and_with_each_other(name):
    scene = make_scene(name, n_views=3, size=32, seed=2, n_points=50)
    truth = world(name, 2)
    opaque = [solid for solid in truth.solids if not solid.glass]
    for index in range(3):
        points, _, _ = unproject(scene.cameras, scene.depth, index)
        distance = torch.stack([s.shape.distance(s.local(points.T)) for s in opaque])
        assert float(distance.abs().amin(0).max()) < 2e-3
        for other in range(3):
            o = scene.cameras.centers[other][:, None].expand(3, len(points))
            t = truth.trace(o, points.T - o).t
            passed = t > 1 + 2e-3  # the point stops the ray, or another does, but for silhouettes
            assert float(passed.float().mean()) < 0.02
            if other == index:
                assert float((t - 1).abs().median()) < 1e-5


def test_colours_of_matt_points_are_the_same_in_all_views():
    truth, cameras = world("checker"), hemisphere(6, 32)
    points, _ = surface_points(truth, cameras, 400)
    depth = truth.render(cameras, supersample=1).depth
    points = unproject(cameras, depth, 2)[0]
    seen = visible(truth, cameras, points)
    assert 0.2 < float(seen[5].float().mean()) < 1
    both = points[seen[5] & seen[2]].T
    first, second = (
        truth.trace(c.centers.T.expand_as(both), both - c.centers.T).color
        for c in (cameras[2], cameras[5])
    )
    differs = (first - second).abs().amax(0) > 1e-3
    assert float(differs.float().mean()) < 0.02  # next to an edge of a square or of a shadow


@pytest.mark.parametrize("name", WORLDS)
def test_alpha_parts_the_image_from_its_background(name):
    scene = make_scene(name, n_views=2, size=24, n_points=20)
    assert float(scene.images.min()) >= 0
    assert float(scene.images.max()) <= 1 + 1e-6
    assert bool((scene.images <= scene.alpha[..., None] + 1e-6).all())
    empty = scene.alpha == 0
    assert bool((scene.depth[empty] == 0).all())
    if name != "fog":
        assert 0.1 < float(empty.float().mean()) < 0.9
    full = scene.alpha == 1
    if name not in ("glass", "fog"):
        assert bool((scene.depth[full] > 2).all())


def test_points_are_where_motion_would_find_them(monkeypatch):
    scene = make_scene("boxes", n_views=9, size=32, n_points=1000)
    truth = world("boxes")
    assert scene.points.shape == scene.colors.shape == (1000, 3)
    off = truth.distance(scene.points).abs()
    stray = off > 0.05
    assert 10 <= int(stray.sum()) <= 20  # 2 %, a few of them near a surface by chance
    spread = off[~stray].square().mean().sqrt()
    assert float(spread) == pytest.approx(0.01, rel=0.1)  # along the normal
    clean = scene.points[~stray]
    floor = (clean[:, 2] + 0.5).abs() < 0.02
    grey = scene.colors[~stray][floor]
    assert float((grey.amax(1) - grey.amin(1)).median()) < 0.06
    monkeypatch.setattr(splat_scenes, "_POINT_NOISE", 0.0)
    monkeypatch.setattr(splat_scenes, "_OUTLIERS", 0.0)
    train = scene.cameras[scene.train_ids]
    exact, _ = surface_points(truth, train, 500, seed=5)
    assert float(truth.distance(exact).abs().max()) < 1e-4
    assert int(visible(truth, train, exact).sum(0).min()) >= 2


def test_points_come_from_training_views_only():
    truth, cameras = world("texture"), hemisphere(8, 32)
    points, colors = surface_points(truth, cameras[[7]], 200, seed=1)
    inside = visible(truth, cameras[[7]], points + 0.03 * (cameras.centers[7] - points))
    assert float(inside.float().mean()) > 0.9
    assert len(points) == len(colors) == 200


def test_visibility_is_bounded_by_image_and_surfaces():
    truth = world("checker")
    top = truth.solids[1]
    spot = torch.tensor([[0.0, 0.0, -0.5 + 1.0], [0.0, 0.0, -0.5 + 0.001], [3.0, 0.0, 0.0]])
    above = Cameras.look_at(torch.tensor([[0.0, -0.5, 4.0]]), width=8, height=8)
    assert top.center == (0.0, 0.0, 0.0)
    assert visible(truth, above, spot).tolist() == [[True, False, False]]


def test_seeds_and_views():
    one, same, other = (make_scene("texture", 2, 16, seed, n_points=30) for seed in (0, 0, 1))
    for field in ("images", "depth", "points", "colors"):
        assert torch.equal(getattr(one, field), getattr(same, field))
        assert not torch.equal(getattr(one, field), getattr(other, field))
    cameras = hemisphere(24, 64)
    assert torch.allclose(cameras.centers.norm(dim=1), torch.tensor(4.0))
    assert bool((cameras.centers[:, 2].diff() > 0).all())
    assert float(torch.pdist(cameras.centers).min()) > 1.0
    assert float(cameras.Ks[0, 0, 0]) == pytest.approx(32 / 0.41421356)
    assert torch.allclose(hemisphere(4, 8, zoom=0.5).Ks[:, 0, 0], hemisphere(4, 4).Ks[:, 0, 0])


@pytest.mark.parametrize(("n", "held"), [(24, [4, 12, 20]), (8, [3]), (2, [0]), (9, [4])])
def test_every_eighth_view_is_held_out(n, held):
    train, test = split(n)
    assert test.tolist() == held
    assert sorted([*train.tolist(), *held]) == list(range(n))


def test_the_cache_is_read_and_mended(own_cache, monkeypatch):
    first = make_scene("thin", 2, 8, n_points=10)
    (path,) = own_cache.iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(splat_scenes, "_trace", None)  # reading needs no tracing
        assert torch.equal(make_scene("thin", 2, 8, n_points=10).images, first.images)
    path.write_bytes(b"half a file")
    assert torch.equal(make_scene("thin", 2, 8, n_points=10).images, first.images)
    make_scene("thin", 2, 8, n_points=10, zoom=1.1)
    assert len(list(own_cache.iterdir())) == 2
    monkeypatch.setenv("TORCHZOO_CACHE", str(path))  # a file, where no folder can be made
    assert torch.equal(make_scene("thin", 2, 8, n_points=10).images, first.images)


def test_an_avatar_follows_its_code():
    camera = Cameras.look_at(torch.tensor([[0.0, -4.0, 0.3]]), width=64, height=64, fov=30.0)
    rest = world("avatar").render(camera)
    for place, half in ((0, "lower"), (1, "upper"), (5, "upper")):
        code = torch.zeros(6)
        code[place] = 1
        changed = (world("avatar", code=code).render(camera).images - rest.images).abs() > 0.02
        rows = changed.any(-1)[0].nonzero()[:, 0]
        assert len(rows) > 5
        assert float((rows > 32).float().mean()) > 0.9 if half == "lower" else rows.max() < 40
    code = torch.tensor([0.0, 0, 0, 1, 0, 0])
    lit = world("avatar", code=code).render(camera)
    assert torch.equal(lit.alpha, rest.alpha)
    assert float((lit.glint - rest.glint).abs().sum()) > 5  # the highlight moves


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "chess"}, "name: expected one of"),
        ({"n_views": 1}, "n_views: expected a number ≥ 2, got 1"),
        ({"size": 0}, "size: expected a number ≥ 1, got 0"),
        ({"zoom": 0.0}, "zoom: expected a number > 0, got 0.0"),
        ({"n_points": 0}, "n_points: expected"),
        ({"supersample": 0}, "supersample: expected"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_scene(**{"name": "checker", **arguments})


def test_bad_codes():
    with pytest.raises(ValueError, match=r"code: expected 6 numbers, got \(2,\)"):
        world("avatar", code=[0.0, 1.0])
    with pytest.raises(ValueError, match="code: expected None for 'checker'"):
        world("checker", code=[0.0] * 6)
    with pytest.raises(ValueError, match="name: expected one of"):
        world("chess")
