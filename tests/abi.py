"""Loads a kernel library built elsewhere into this torch and holds its operators to the reference.

Usage: python tests/abi.py LIBRARY, in an environment that has this package on its path and any
torch from 2.10 on. Exits with an error where a result differs.
"""

import os
import sys

os.environ["TORCHZOO_OPS"] = "reference"

import torch

from torchzoo.ops import delta_linear_step, grouped_mm


def results() -> list[torch.Tensor]:
    """Results and gradients of the operators on fixed inputs."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, weight = normal(37, 19), normal(5, 19, 23)
    y = grouped_mm(x, weight, torch.tensor([9, 9, 20, 31, 36]))
    frame, ref, acc, weight_t = normal(3, 19), normal(3, 19), normal(3, 23), normal(19, 23)
    steps = delta_linear_step(frame, ref, acc, weight_t, threshold=0.5, quantum=0.25)
    inputs = (x, weight, frame, acc, weight_t)
    total = y.square().sum() + sum(step.square().sum() for step in steps)
    return [y, *steps, *torch.autograd.grad(total, inputs)]


def main(path: str) -> None:
    """Compute on the reference, load the library, compute again, compare."""
    expected = results()
    torch.ops.load_library(path)
    for op in ("grouped_mm", "grouped_mm_dweight", "delta_linear_step"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"torchzoo::{op}", "CPU"), op
    for found, wanted in zip(results(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    print(f"torch {torch.__version__}: {len(expected)} results agree")


if __name__ == "__main__":
    main(sys.argv[1])
