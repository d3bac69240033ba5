"""Curvature and midpoints: closed forms, and pairs found one by one."""

import math

import numpy as np
import pytest
import torch

from torchzoo.splatting.sags_points import (
    _is_low,
    curvature,
    curvature_densify,
    neighbors,
    voxel_means,
)

DOUBLE = torch.float64


def cloud(count, *, seed=0, dtype=DOUBLE):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sphere(count):
    index = torch.arange(count, dtype=DOUBLE)
    z = 1 - (2 * index + 1) / count
    angle = index * math.pi * (3 - math.sqrt(5))
    flat = (1 - z.square()).sqrt()
    return torch.stack([flat * angle.cos(), flat * angle.sin(), z], -1)


def plane_and_blob(flat, count=1200):
    """A grid, of a part `flat` of all points, far from a blob of noise."""
    side = round(math.sqrt(flat * count))
    axis = torch.arange(side, dtype=DOUBLE) / side
    grid = torch.cartesian_prod(axis, axis, torch.zeros(1, dtype=DOUBLE))
    return torch.cat([grid, cloud(count - side**2) + 20]), side**2


@pytest.mark.claim(
    134,
    "Curvature is the least singular value of a surrounding over their sum: c / (a + b + c) for "
    "points at a, b and c along the axes",
    tolerance=1e-12,
)
def test_curvature_of_axes():
    sizes = torch.tensor([3.0, 2.0, 0.5], dtype=DOUBLE)
    points = torch.cat([torch.diag(sizes), -torch.diag(sizes)]) + 5.0
    expected = torch.full((6,), 0.5 / 5.5, dtype=DOUBLE)
    torch.testing.assert_close(curvature(points, k=6), expected, atol=1e-12, rtol=0)


@pytest.mark.claim(
    134,
    "Curvature is 0 on a plane, and on an even sphere away from its poles within 20 % of its mean, "
    "0.020",
    tolerance=1e-6,
)
def test_curvature_of_surfaces():
    plane, _ = plane_and_blob(1.0, 400)
    assert curvature(plane.float()).abs().max() < 1e-6
    turned = plane @ torch.linalg.qr(cloud(3)).Q
    assert curvature(turned).abs().max() < 1e-6
    points = sphere(2000)
    found = curvature(points)[points[:, 2].abs() < 0.9]
    assert found.mean().item() == pytest.approx(0.020, abs=0.0005)
    assert (found / found.mean() - 1).abs().max() < 0.2
    assert curvature(torch.ones(12, 3)).eq(0).all()  # all the same


@pytest.mark.claim(
    134,
    "Of a plane of a quarter of the points beside a blob all points are of low curvature, and at "
    "least 90 % of those of low curvature lie on it",
)
def test_plane_is_chosen():
    points, count = plane_and_blob(0.25)
    low = _is_low(curvature(points), -1.0)
    assert low[:count].all()
    assert low[:count].sum() >= 0.9 * low.sum()


@pytest.mark.claim(
    134,
    "Where half of the cloud is flat no curvature is a deviation below the mean; below the median "
    "the flat points are chosen",
)
def test_flat_clouds():
    points, count = plane_and_blob(0.55)
    assert not _is_low(curvature(points), -1.0).any()
    points, count = plane_and_blob(0.4)
    assert _is_low(curvature(points), None)[:count].all()
    tilted = plane_and_blob(1.0, 100)[0] @ torch.linalg.qr(cloud(3)).Q
    assert not _is_low(curvature(tilted.float()), -1.0).any()  # which differ by rounding alone


def expected_pairs(points, k, low_k, high_k, threshold):
    """Pairs of points with a midpoint, one point at a time."""
    p = points.numpy()
    distances = np.linalg.norm(p[:, None] - p, axis=-1)
    order = distances.argsort(1)
    values = []
    for i in range(len(p)):
        around = p[order[i, :k]]
        s = np.linalg.svd(around - around.mean(0), compute_uv=False)
        values.append(s[2] / s.sum())
    z = (np.array(values) - np.mean(values)) / np.std(values)
    pairs = set()
    for i in range(len(p)):
        near = order[i, 1:low_k] if z[i] < threshold else order[i, 1 : high_k + 1]
        pairs |= {(min(i, j), max(i, j)) for j in near.tolist()}
    return pairs


@pytest.mark.claim(
    134,
    "Midpoints are the exact means of their parents, no pair is there twice, all points are kept: "
    "pairs are those to 9 neighbours of points of low curvature and to 2 of the others",
    tolerance=0,
)
@pytest.mark.parametrize(
    "options",
    [{}, {"k": 6, "low_k": 4, "high_k": 3, "z_threshold": -0.5}, {"high_k": 0}],
    ids=["default", "other", "none"],
)
def test_midpoints(options):
    points = cloud(150)
    points[:30, 2] *= 1e-3
    found, parents = curvature_densify(points, **options)
    count = len(points)
    assert torch.equal(found[:count], points)
    assert torch.equal(parents[:count], torch.arange(count)[:, None].expand(-1, 2))
    assert torch.equal(found, (points[parents[:, 0]] + points[parents[:, 1]]) / 2)
    pairs = [tuple(pair) for pair in parents[count:].tolist()]
    settings = {"k": 10, "low_k": 10, "high_k": 2, "z_threshold": -1.0} | options
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == expected_pairs(points, *settings.values())


def test_neighbors_begin_with_the_point_itself():
    points = torch.zeros(4, 3)
    points[3] = 1.0
    table = neighbors(points, 3)
    assert table[:, 0].tolist() == [0, 1, 2, 3]
    assert all(len(set(row)) == 3 for row in table.tolist())


def test_voxel_means():
    points = cloud(300)
    found = voxel_means(points, 0.7)
    cells = {}
    for point in points:
        cells.setdefault(tuple((point / 0.7).floor().tolist()), []).append(point)
    expected = torch.stack([torch.stack(cells[key]).mean(0) for key in sorted(cells)])
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    apart = torch.cdist(points, points).fill_diagonal_(torch.inf).amin(1).median().item()
    assert torch.equal(voxel_means(points), voxel_means(points, apart))
    same = torch.ones(3, 3)
    assert voxel_means(same) is same


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        (torch.rand(9, 3), {}, "points: got 9, expected at least k=10"),
        (torch.rand(12, 3), {"high_k": 12}, "points: got 12, expected at least k=13"),
        (torch.rand(12, 2), {}, r"points: got \(12, 2\)"),
        (torch.full((12, 3), torch.nan), {}, "points: got some that are NaN"),
        (torch.rand(12, 3), {"high_k": -1}, "high_k: got"),
        (torch.rand(12, 3), {"low_k": 0}, "low_k, high_k: got"),
    ],
)
def test_bad_input(points, options, message):
    with pytest.raises(ValueError, match=message):
        curvature_densify(points, **options)
