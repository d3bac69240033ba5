"""`spherical_harmonics` against scipy's, its gradients, and what torch asks of an operator."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from tests.ops.splats import DOUBLE, backend  # noqa: F401
from torchzoo.ops import sh_to_rgb, spherical_harmonics
from torchzoo.ops.spherical_harmonics import view_colors

pytestmark = pytest.mark.usefixtures("backend")


def directions(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 3, generator=g, dtype=DOUBLE) * 3


def test_is_the_real_basis_with_the_phase():
    special = pytest.importorskip("scipy.special")
    dirs = directions(200)
    basis = torch.eye(16, dtype=DOUBLE)[:, :, None].expand(16, 16, 3).contiguous()
    found = spherical_harmonics(3, dirs[:, None], basis)[..., 0]
    unit = dirs / dirs.norm(dim=-1, keepdim=True)
    polar, azimuth = torch.acos(unit[:, 2]), torch.atan2(unit[:, 1], unit[:, 0])
    for degree in range(4):
        for m in range(-degree, degree + 1):
            value = torch.from_numpy(
                special.sph_harm_y(degree, abs(m), polar.numpy(), azimuth.numpy())
            )
            part = value.imag if m < 0 else value.real
            expected = part * (math.sqrt(2) if m else 1)
            assert (found[:, degree * (degree + 1) + m] - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("degree", range(4))
def test_gradients(degree):
    dirs = directions(5).requires_grad_()
    coeffs = torch.randn(5, 16, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    coeffs.requires_grad_()
    assert gradcheck(lambda d, c: spherical_harmonics(degree, d, c), (dirs, coeffs))
    spherical_harmonics(degree, dirs, coeffs).sum().backward()
    assert (coeffs.grad[:, (degree + 1) ** 2 :] == 0).all()
    assert (dirs.grad * dirs).sum(-1).abs().max() <= 1e-12  # length does not matter


def test_lower_degrees_leave_the_rest_out():
    dirs, coeffs = directions(7), torch.ones(16, 3, dtype=DOUBLE)
    for degree in range(4):
        used = coeffs.clone()
        used[(degree + 1) ** 2 :] = 0
        found = spherical_harmonics(degree, dirs, coeffs)
        assert (found - spherical_harmonics(3, dirs, used)).abs().max() <= 1e-12


def test_leading_dimensions_broadcast():
    dirs, coeffs = directions(2, 1, 5), torch.randn(4, 5, 9, 3, dtype=DOUBLE)
    found = spherical_harmonics(2, dirs, coeffs)
    assert found.shape == (2, 4, 5, 3)
    alone = spherical_harmonics(2, dirs[1, 0, 3], coeffs[2, 3])
    assert (found[1, 2, 3] - alone).abs().max() <= 1e-14


def test_the_null_direction_has_only_the_mean():
    dirs = torch.zeros(1, 3, dtype=DOUBLE, requires_grad=True)
    coeffs = torch.randn(1, 16, 3, dtype=DOUBLE)
    found = spherical_harmonics(3, dirs, coeffs)
    assert (found - 0.28209479177387814 * coeffs[:, 0]).abs().max() <= 1e-15
    found.sum().backward()
    assert (dirs.grad == 0).all()


def test_single_precision_and_none():
    dirs, coeffs = directions(100), torch.randn(100, 16, 3, dtype=DOUBLE)
    exact = spherical_harmonics(3, dirs, coeffs)
    found = spherical_harmonics(3, dirs.float(), coeffs.float())
    assert (found - exact).abs().max() <= 1e-5
    assert spherical_harmonics(3, dirs.bfloat16(), coeffs.bfloat16()).dtype == torch.float32
    assert spherical_harmonics(3, dirs[:0], coeffs[:0]).shape == (0, 3)


def test_threads_give_the_same_bits():
    dirs, coeffs = directions(3000).float(), torch.randn(3000, 16, 3)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(spherical_harmonics(3, dirs, coeffs))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_colours_are_cut_off_below_zero():
    values = torch.tensor([-0.7, -0.5, 0.2], requires_grad=True)
    colours = sh_to_rgb(values)
    assert torch.equal(colours.detach(), torch.tensor([0.0, 0.0, 0.7]))
    colours.sum().backward()
    assert values.grad.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("degree", "dirs", "coeffs", "words"),
    [
        (4, (3,), (16, 3), "degree: got 4"),
        (1, (2,), (4, 3), r"dirs: got \(2,\)"),
        (1, (3,), (5, 3), r"coeffs: got \(5, 3\)"),
        (2, (3,), (4, 3), "at least 9"),
        (1, (5, 3), (4, 4, 3), "broadcast"),
    ],
)
def test_what_does_not_fit(degree, dirs, coeffs, words):
    with pytest.raises(ValueError, match=words):
        spherical_harmonics(degree, torch.zeros(dirs), torch.zeros(coeffs))


def views(shared, count=6, dtype=DOUBLE):
    """Means, two cameras, radii of which some are 0, and coefficients."""
    g = torch.Generator().manual_seed(4)
    shape = (count, 16, 3) if shared else (2, count, 16, 3)
    means, shift, coeffs, turn = (
        torch.randn(s, generator=g, dtype=dtype) for s in ((count, 3), (2, 3, 1), shape, (2, 3, 3))
    )
    viewmats = torch.eye(4, dtype=dtype).repeat(2, 1, 1)
    viewmats[:, :3] = torch.cat((torch.linalg.matrix_exp(turn - turn.mT), shift), 2)
    radii = torch.tensor([3, 1, 0, 2, 0, 5, 4, 1], dtype=torch.int32).repeat(count)[: 4 * count]
    return means, viewmats, radii.view(2, count, 2), coeffs


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("degree", range(4))
def test_colours_from_cameras_are_those_along_the_rays(degree, shared):
    means, viewmats, radii, coeffs = views(shared)
    leaves = [x.requires_grad_() for x in (means, viewmats, coeffs)]
    centres = -torch.einsum("cij,ci->cj", viewmats[:, :3, :3], viewmats[:, :3, 3])
    rays = torch.where((radii > 0).all(-1, keepdim=True), means - centres[:, None], 0)
    expected = sh_to_rgb(spherical_harmonics(degree, rays, coeffs))
    found = view_colors(degree, means, viewmats, radii, coeffs)
    assert 0 < int((expected == 0).sum()) < expected.numel()  # some are cut off
    assert (found - expected).abs().max() <= 1e-14
    above = torch.randn(2, 6, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(5))
    pairs = zip(
        *(torch.autograd.grad(image, leaves, above) for image in (found, expected)), strict=True
    )
    assert all((one - other).abs().max() <= 1e-13 for one, other in pairs)


def test_splats_out_of_sight_have_no_direction():
    means, viewmats, radii, coeffs = views(True)
    hidden = (radii[0] == 0).any(-1)
    means[hidden] = torch.nan
    leaf = means.clone().requires_grad_()
    found = view_colors(3, leaf, viewmats[:1], radii[:1], coeffs)
    mean = (0.28209479177387814 * coeffs[:, 0] + 0.5).relu()
    assert (found[0, hidden] - mean[hidden]).abs().max() <= 1e-15
    found.sum().backward()
    assert (leaf.grad[hidden] == 0).all()
    assert leaf.grad[~hidden].isfinite().all()
    assert (leaf.grad[~hidden] != 0).any()


def test_gradients_of_one_camera():
    means, viewmats, radii, coeffs = views(True)
    coeffs[:, 0] += 3  # away from the cut
    leaves = [x.requires_grad_() for x in (means, viewmats[:1].clone(), coeffs)]
    assert gradcheck(lambda m, v, s: view_colors(3, m, v, radii[:1], s), leaves)


def test_torch_accepts_the_operators():
    dirs, coeffs = directions(4), torch.randn(4, 9, 3, dtype=DOUBLE)
    torch.library.opcheck(torch.ops.torchzoo.splat_sh.default, (2, dirs, coeffs, None, None))
    given = (2, dirs, coeffs, None, None, None, torch.randn(4, 3, dtype=DOUBLE))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.torchzoo.splat_sh_backward.default, given, test_utils=tests)
    means, viewmats, radii, coeffs = views(False)
    given = (2, means, coeffs.flatten(0, 1), viewmats, radii)
    torch.library.opcheck(torch.ops.torchzoo.splat_sh.default, given, test_utils=tests)
    given = (*given, torch.ops.torchzoo.splat_sh(*given), torch.randn(12, 3, dtype=DOUBLE))
    torch.library.opcheck(torch.ops.torchzoo.splat_sh_backward.default, given, test_utils=tests)
