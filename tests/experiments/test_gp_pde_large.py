"""The measurement on fine grids, on a coarse one."""

import pytest
import torch

from torchzoo.experiments.gp import gp_pde_large as unit


def test_source_is_the_second_derivative():
    x = torch.linspace(0, 1, 5, dtype=torch.float64)
    slope = torch.func.vmap(torch.func.grad(torch.func.grad(unit.wave)))(x)
    torch.testing.assert_close(unit.wave(x, 2), slope)


@pytest.mark.parametrize("equation", unit.EQUATIONS)
def test_figures(equation):
    found = unit.figures(equation, points=6, steps=1, coarse=5, coarse_steps=1)
    assert found["collocation points"] == 36
    assert found["relative gradient"] < 1e-8
    assert found["relative error on the grid"] > 0.1
    assert found["peak memory, MiB"] >= found["of which libraries, MiB"] > 50


def test_exact_values_have_no_residual():
    gp = unit.solver("allen-cahn", 4)
    x = gp.grids[0]

    class Known:
        u = unit.exact(x)

        def dx(self, d, order):
            parts = unit.wave(x, 2)[:, None] * unit.wave(x)
            return parts if d == 0 else parts.T

    residual = gp.operator(Known())
    torch.testing.assert_close(residual, torch.zeros_like(residual), rtol=0, atol=1e-9)
