"""The dense field against closed forms of volume rendering."""

import math

import numpy as np
import pytest
import torch

from torchzoo.splatting import DenseGridField

AXIS = torch.tensor([[0.1, 0.2, -4.0]]), torch.tensor([[0.0, 0.0, 2.0]])


def field(**options):
    torch.manual_seed(0)
    made = DenseGridField(8, **{"samples": 24, "bound": 1.5, **options}).double()
    torch.nn.init.zeros_(made.color[-1].weight)  # grey: every colour is 0.5
    return made


def along(made):
    return made(*(x.double() for x in AXIS))


def test_an_even_field_absorbs_exponentially():
    made = field()
    rate = math.log1p(math.exp(0.7 + made.shift))
    torch.nn.init.constant_(made.density, 0.7)
    expected = 0.5 * (1 - math.exp(-rate * 3.0))  # the cube is 3 thick
    np.testing.assert_allclose(along(made).detach().numpy(), expected, rtol=1e-10)
    half = made(torch.tensor([[0.0, 0.0, 0.0]]).double(), torch.tensor([[0.0, 3.0, 0.0]]).double())
    np.testing.assert_allclose(half.detach().numpy(), 0.5 * (1 - math.exp(-rate * 1.5)), rtol=1e-10)


def test_the_first_opacity_of_a_step():
    made = field(samples=1, initial_alpha=0.3)
    np.testing.assert_allclose(along(made).detach().numpy(), 0.15, rtol=1e-10)
    many = field(initial_alpha=0.01)
    np.testing.assert_allclose(along(many).detach().numpy(), 0.5 * (1 - 0.99**24), rtol=1e-10)


def test_what_is_in_front_hides_what_is_behind():
    made = field(features=1)
    with torch.no_grad():
        made.density.fill_(40.0)
        made.features[..., :4, :, :] = 1.0  # z < 0, where rays along z come in first
        first, last = made.color[0], made.color[-1]
        first.weight.zero_(), first.bias.zero_(), last.weight.zero_()
        first.weight[0, 0] = 1.0
        last.weight[:, 0] = torch.tensor([3.0, 0.0, -3.0])
    red = torch.tensor([[3.0, 0.0, -3.0]]).double().sigmoid()
    torch.testing.assert_close(along(made), red, atol=1e-6, rtol=0)
    o, d = (x.double() for x in AXIS)
    behind = made(o * torch.tensor([1.0, 1.0, -1.0]), -d)
    torch.testing.assert_close(behind, torch.full((1, 3), 0.5).double(), atol=1e-6, rtol=0)


def test_grids_are_trilinear_between_their_points():
    made = field(features=2)
    axis = torch.linspace(-1.5, 1.5, 8).double()
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    grid = torch.stack([x + 2 * y - z + 0.5, x * y])[None]
    points = 2.8 * torch.rand(5, 4, 3, dtype=torch.float64) - 1.4
    values = made._interpolated(grid, points)
    linear = points @ torch.tensor([1.0, 2.0, -1.0]).double() + 0.5
    torch.testing.assert_close(values[..., 0], linear)
    assert values.shape == (5, 4, 2)


def test_rays_that_miss_are_black_and_the_length_of_directions_does_not_matter():
    made = field()
    o = torch.tensor([[0.0, 0.0, -4.0], [2.0, 0.0, -4.0], [0.0, 0.0, -4.0]]).double()
    d = torch.tensor([[0.0, 0.1, 5.0], [0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]).double()
    color = made(o, d)
    assert (color[1:] == 0).all()
    torch.testing.assert_close(color, made(o, 0.3 * d))


def test_samples_move_with_the_offset():
    made = field(samples=3)
    with torch.no_grad():
        made.density.normal_()
    o, d = (x.double() for x in AXIS)
    at = [made(o, d, torch.tensor([w]).double()) for w in (0.0, 0.5, 1.0)]
    torch.testing.assert_close(at[1], made(o, d))
    assert len({float(c[0, 0]) for c in at}) == 3


def test_gradients():
    made = DenseGridField(3, features=2, hidden=3, samples=4).double()
    with torch.no_grad():
        made.density.normal_()
        made.features.normal_()
    o, d = (x.double() for x in AXIS)
    names, values = zip(*made.named_parameters(), strict=True)

    def call(*parameters):
        return torch.func.functional_call(made, dict(zip(names, parameters, strict=True)), (o, d))

    assert torch.autograd.gradcheck(call, values)


def test_bad_rays():
    made = field()
    with pytest.raises(ValueError, match=r"directions: expected \(..., 3\), got \(2, 3\)"):
        made(torch.zeros(1, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"offset: expected \(1,\), got \(2,\)"):
        made(torch.zeros(1, 3), torch.ones(1, 3), torch.zeros(2))
