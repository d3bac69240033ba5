"""Solves above the size at which normal equations are formed, against those that form them."""

import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchzoo.gp import GPHM, Fields, StudentTMixtureKernel, gp_pde_solver

few = partial(StudentTMixtureKernel, 3, freq_scale=3.0)


def line(n):
    return torch.linspace(0, 1, n, dtype=torch.float64)


def edges(*sizes):
    inside = torch.zeros(sizes, dtype=torch.bool)
    inside[tuple(slice(1, -1) for _ in sizes)] = True
    return ~inside


def constant(f):
    """Even orders with unequal coefficients, and a source."""
    return f.dx(0, 2) - 0.7 * f.mixed([0] * (len(f.x) - 1) + [2]) + 2 * f.u - f.x[0]


def odd(f):
    """Odd orders as well, and a varying coefficient."""
    return constant(f) + 0.3 * f.dx(0, 1) + f.x[1] * f.mixed((1, 1))


def solver(grids, operator, mask):
    """Kernels and precisions that differ, and boundary values without symmetry."""
    known = torch.linspace(-1, 1, int(mask.sum()), dtype=torch.float64)
    gp = GPHM(grids, operator, (mask, known), kernel_factory=few, jitter=1e-4)
    with torch.no_grad():
        for d, kernel in enumerate(gp.kernels):
            kernel.log_weights.add_(0.3 * d + torch.linspace(0, 0.5, 3).double())
    gp.log_precisions.copy_(torch.tensor([0.4, -0.3]))
    return gp


def structured(monkeypatch, gp):
    """What `gp` finds by blocks, and how many iterations its systems took."""
    counts = []

    def counted(*args, **options):
        found = solve(*args, **options)
        counts.append(found.iterations)
        return found

    solve = gp_pde_solver.conjugate_gradient
    with monkeypatch.context() as patch:
        patch.setattr(gp_pde_solver, "conjugate_gradient", counted)
        patch.setattr("torchzoo.gp.gp_pde._DENSE", 0)
        gp.solve()
    found = gp.values.detach().clone()
    with torch.no_grad():
        gp.values.zero_()
    return found, counts


def waves(n, cubic):
    """Poisson's or Allen and Cahn's equation on the square, with two scales."""
    x = line(n)
    wave = x.sin() + 0.3 * (12 * x).sin()
    bent = -x.sin() - 43.2 * (12 * x).sin()
    exact = wave[:, None] * wave
    source = bent[:, None] * wave + wave[:, None] * bent + cubic * exact * (exact**2 - 1)

    def residual(f):
        found = f.dx(0, 2) + f.dx(1, 2) - source
        return found + f.u * (f.u**2 - 1) if cubic else found

    return GPHM([x, x], residual, (edges(n, n), exact[edges(n, n)]))


@pytest.mark.claim(
    143,
    "Solving for even and odd functions apart finds the minimum of the dense normal equations, in "
    "two iterations or fewer where the equation is linear with constant coefficients",
    tolerance=1e-8,
)
@pytest.mark.parametrize("cubic", [False, True], ids=["Poisson", "Allen-Cahn"])
def test_minimum_is_the_dense_one(monkeypatch, cubic):
    gp = waves(16, cubic)
    with torch.no_grad():
        gp.values.fill_(0.1)
    found, counts = structured(monkeypatch, gp)
    gp.solve()
    scale = gp.values.detach().abs().max().item()
    torch.testing.assert_close(found, gp.values.detach(), rtol=0, atol=1e-8 * scale)
    assert max(counts) <= (6 if cubic else 2)


CASES = {
    "1d": ([line(7)], constant, edges(7), [True]),
    "odd and even sizes": ([line(5), line(6)], constant, edges(5, 6), [True, True]),
    "3d": ([line(4), line(3), line(5)], constant, edges(4, 3, 5), [True] * 3),
    "uneven but symmetric": (
        [torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64), line(3) ** 2],
        constant,
        edges(5, 3),
        [True, False],
    ),
    "no field": ([line(4), line(5)], lambda f: f.x[0] * f.x[1], edges(4, 5), [True, True]),
    "one side open": ([line(5), line(4)], constant, edges(6, 4)[:-1], [False, True]),
    "odd orders": (
        [line(4), line(5)],
        lambda f: constant(f) + 0.3 * f.dx(1),
        edges(4, 5),
        [True, False],
    ),
}


def dense_normal(gp):
    """`I + J^T J` by differentiating all residuals in the whitened values."""
    factors = gp.factors()
    zero = gp.values.detach().flatten()

    def weighted(z):
        return gp._weighted(Fields(z, lambda d, m: gp.root(d, m, factors[d]), gp.grids))

    jacobian = torch.func.jacfwd(weighted)(zero)
    return torch.eye(len(zero)).double() + jacobian.mT @ jacobian


@pytest.mark.claim(
    143,
    "The preconditioner of a linear equation with constant coefficients is the inverse of the "
    "dense normal matrix, whichever dimensions have a mirror image",
    tolerance=1e-8,
)
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_preconditioner_is_exact_for_constant_coefficients(name):
    grids, operator, mask, mirrored = CASES[name]
    gp = solver(grids, operator, mask)
    factors = gp.factors()
    white = gp.values.flatten()
    root = [{m: gp.root(d, m, factors[d]) for m in range(3)} for d in range(len(grids))]
    _, rotated, preconditioner = gp._rotated(white, lambda d, m: root[d][m])
    turns = [torch.linalg.solve(root[d][0], rotated(d, 0)) for d in range(len(grids))]
    turn = turns[0]
    for other in turns[1:]:
        turn = torch.kron(turn, other)
    normal = turn.mT @ dense_normal(gp) @ turn
    unit = preconditioner.solve(preconditioner.solve(normal).mT)
    torch.testing.assert_close(unit, torch.eye(len(unit)).double(), rtol=0, atol=1e-8)
    diagonal = preconditioner.scale.flatten() ** -2
    torch.testing.assert_close(diagonal, normal.diagonal(), rtol=1e-10, atol=0)
    x = torch.linspace(-1, 2, len(unit), dtype=torch.float64)
    there = preconditioner.solve(preconditioner.solve(x), transposed=True)
    torch.testing.assert_close(normal @ there, x, rtol=1e-7, atol=1e-7)
    blocks = math.prod(2 if even else 1 for even in mirrored)
    assert len(preconditioner.blocks) == blocks


def test_batch_is_a_loop(monkeypatch):
    speeds = torch.tensor([1.0, 1.1], dtype=torch.float64)[:, None, None]
    mask = edges(4, 5)
    known = torch.linspace(-1, 1, 2 * int(mask.sum()), dtype=torch.float64).reshape(2, -1)

    def made(c, known, **options):
        return GPHM(
            [line(4), line(5)],
            lambda f: f.dx(0, 2) + c * f.dx(1, 2) - f.x[0],
            (mask, known),
            kernel_factory=few,
            **options,
        )

    found, _ = structured(monkeypatch, made(speeds, known, batch_shape=(2,)))
    for i in range(2):
        one = made(speeds[i], known[i])
        one.solve()
        torch.testing.assert_close(found[i], one.values.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("limit", [1, 14, 5000])
def test_varying_coefficients_and_large_blocks(monkeypatch, limit):
    """Blocks of the mean coefficients, of even orders alone (14), or none: the same minimum."""
    monkeypatch.setattr(gp_pde_solver, "BLOCK", limit)
    gp = solver([line(5), line(5)], odd, edges(5, 5))
    found, counts = structured(monkeypatch, gp)
    gp.solve()
    torch.testing.assert_close(found, gp.values.detach(), rtol=1e-6, atol=1e-8)
    assert max(counts) <= 25 if limit > 1 else max(counts) > 25


@torch.no_grad()
def test_slopes_of_a_nonlinear_operator():
    gp = solver([line(4), line(5)], constant, edges(4, 5))
    factors = gp.factors()
    white = torch.linspace(0.3, 1, 20, dtype=torch.float64)
    fields = Fields(white, lambda d, m: gp.root(d, m, factors[d]), gp.grids)
    found = fields._slopes(lambda f: f.dx(0, 2) * f.x[1] + f.u * (f.u**2 - 1))
    torch.testing.assert_close(found[0, 0], 3 * fields.u**2 - 1)
    torch.testing.assert_close(found[2, 0], line(5).expand(4, 5))


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that operators write while it is entered."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


@pytest.mark.claim(
    143, "Solving for even and odd functions apart makes no matrix of all by all points", None
)
def test_work_is_that_of_quarters(monkeypatch):
    monkeypatch.setattr("torchzoo.gp.gp_pde._DENSE", 0)
    gp = waves(24, False)
    with LargestTensor() as seen:
        gp.solve()
    assert 24**2 < seen.largest <= (24**2 / 4) ** 2
