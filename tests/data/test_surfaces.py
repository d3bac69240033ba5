"""Surfaces: where their points lie, that they are uniform, and that triangles close them."""

import math

import pytest
import torch

from torchzoo.data.surfaces import PITCH, TURNS, sample_surface, triangulate


def drawn(name, count):
    return sample_surface(name, count, generator=torch.Generator().manual_seed(0))


def test_sphere_is_uniform():
    points = drawn("sphere", 4000).points
    assert (points.norm(dim=1) - 1).abs().max() < 1e-12
    moments = points.mT @ points / len(points)
    assert (moments - torch.eye(3) / 3).abs().max() < 0.02


def test_torus_is_uniform():
    surface = drawn("torus", 4000)
    out = surface.points[:, :2].norm(dim=1)
    assert ((out - 1).square() + surface.points[:, 2].square() - 0.16).abs().max() < 1e-12
    assert out.mean() == pytest.approx(1 + 0.4**2 / 2, abs=0.02)  # more area outside


def test_sheet_is_a_spiral():
    surface = drawn("folded sheet", 4000)
    x, y, z = surface.points.unbind(1)
    radius = (x**2 + z**2).sqrt()
    assert ((radius / PITCH) - (radius / PITCH).round()).abs().max() > 0.1
    turned = torch.atan2(z, x) - radius / PITCH
    assert (turned / (2 * math.pi) - (turned / (2 * math.pi)).round()).abs().max() < 1e-4
    assert math.pi * TURNS[0] * PITCH <= radius.min() < radius.max() <= math.pi * TURNS[1] * PITCH
    order = surface.chart[:, 0].argsort()
    chart, steps = surface.chart[order, 0], surface.points[order][:, [0, 2]].diff(dim=0)
    assert (steps.norm(dim=1).sum() / (chart[-1] - chart[0])) == pytest.approx(1, abs=1e-3)
    assert ((y >= 0) & (y <= 1)).all()
    share = (chart - chart[0]) / (chart[-1] - chart[0])
    assert (share - torch.linspace(0, 1, 4000)).abs().max() < 0.03  # uniform along the spiral


@pytest.mark.parametrize(("name", "euler"), [("sphere", 2), ("torus", 0), ("folded sheet", 1)])
def test_triangles_close_the_surface(name, euler):
    faces = triangulate(drawn(name, 200))
    edges = torch.cat([faces, faces.roll(1, 1)]).view(2, -1).sort(dim=0).values
    pairs, uses = edges.unique(dim=1, return_counts=True)
    assert uses.max() == 2
    assert (uses == 1).any() == (name == "folded sheet")
    assert len(faces.unique()) - pairs.shape[1] + len(faces) == euler


def test_unknown_name():
    with pytest.raises(ValueError, match=r"name: expected 'sphere'.* got 'cube'"):
        drawn("cube", 3)
