"""Paper 143 on fine grids: seconds, memory and errors of fits at 10^4 collocation points.

    python -m torchzoo.experiments.gp.gp_pde_large

Poisson's and Allen and Cahn's equations on the unit square, their solution a product of sums of
three sines of 1, 20 and 100 radians a unit. Frequencies are first learned on a coarser grid, where
steps are quick; kernels and precisions then go on from there on the fine one. Each equation is
fitted in a process of its own, for its peak of memory; seconds are those after imports.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchzoo.common.linalg import kron_matvec
from torchzoo.gp import GPHM, Fields

EQUATIONS = ("poisson", "allen-cahn")
WAVES = ((1.0, 1.0), (0.1, 20.0), (0.05, 100.0))  # amplitudes and angular frequencies
RATE = 0.04


def wave(x: Tensor, order: int = 0) -> Tensor:
    """A sum of sines, or its second derivative."""
    return torch.stack([a * (-w * w) ** (order // 2) * (w * x).sin() for a, w in WAVES]).sum(0)


def exact(x: Tensor) -> Tensor:
    """The solution on the tensor grid of a line with itself."""
    return wave(x)[:, None] * wave(x)


def solver(equation: str, points: int) -> GPHM:
    """A solver of an equation with a known solution."""
    x = torch.linspace(0, 1, points, dtype=torch.float64)
    u = exact(x)
    source = wave(x, 2)[:, None] * wave(x) + wave(x)[:, None] * wave(x, 2)
    cubic = equation == "allen-cahn"
    if cubic:
        source = source + u * (u**2 - 1)

    def residual(f: Fields) -> Tensor:
        found = f.dx(0, 2) + f.dx(1, 2) - source
        return found + f.u * (f.u**2 - 1) if cubic else found

    edge = torch.ones_like(u, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    return GPHM([x, x], residual, (edge, u[edge]))


def figures(
    equation: str, points: int, steps: int, coarse: int, coarse_steps: int
) -> dict[str, Any]:
    """What one fit takes and finds."""
    before, start, busy = peak(), time.perf_counter(), time.process_time()
    threads = torch.get_num_threads()
    optimizer = partial(torch.optim.Adam, lr=RATE)
    rough = solver(equation, coarse)
    torch.set_num_threads(1)  # to share matrices as small as these costs more than it saves
    rough.fit(coarse_steps, optimizer=optimizer)
    torch.set_num_threads(threads)
    learned = time.perf_counter()
    gp = solver(equation, points)
    gp.kernels.load_state_dict(rough.kernels.state_dict())
    gp.log_precisions.copy_(rough.log_precisions)
    gp.fit(steps, optimizer=optimizer)
    end, busy = time.perf_counter(), time.process_time() - busy
    return {
        "equation": equation,
        "collocation points": points**2,
        "seconds": end - start,
        "of which on the coarse grid": learned - start,
        "processor seconds": busy,
        "peak memory, MiB": peak(),
        "of which libraries, MiB": before,
        **errors(gp),
    }


def peak() -> float:
    """The most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def errors(gp: GPHM) -> dict[str, float]:
    """Relative L2 errors on and off the grid, and how flat the loss is at what was found.

    Gradients are those in whitened values, here and where all grid values are 0.
    """
    x = gp.grids[0]
    off = x[:-1] + 0.37 * x.diff()
    with torch.no_grad():
        truth = exact(off)
        missed = gp(torch.cartesian_prod(off, off)).reshape(truth.shape) - truth
        on = (gp.values - exact(x)).norm() / exact(x).norm()
        found = gradient(gp)
        gp.values.zero_()
    return {
        "relative error on the grid": on.item(),
        "relative error off the grid": (missed.norm() / truth.norm()).item(),
        "relative gradient": found / gradient(gp),
    }


def gradient(gp: GPHM) -> float:
    """Norm of the loss's gradient in whitened values."""
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(gp.loss(), gp.values)
    factors = [factor.mT.detach() for factor in gp.factors()]
    return float(kron_matvec(factors, slope.flatten()).norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--points", type=int, default=100, help="points of each axis")
    parser.add_argument("--steps", type=int, default=10, help="steps on that grid")
    parser.add_argument("--coarse", type=int, default=50, help="points of the coarser grid's axes")
    parser.add_argument("--coarse-steps", type=int, default=120, help="steps there")
    parser.add_argument("--equation", choices=EQUATIONS, help="one only, in this process")
    options = vars(parser.parse_args())
    if options["equation"] is None:
        for equation in EQUATIONS:
            command = [sys.executable, "-m", __spec__.name, *sys.argv[1:], "--equation", equation]
            subprocess.run(command, check=True)
        return
    found = figures(**options)
    for name, value in found.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")


if __name__ == "__main__":
    main()
