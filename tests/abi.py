"""Loads a kernel library built elsewhere into this torch and holds its operators to the reference.

Usage: python tests/abi.py LIBRARY, in an environment that has this package on its path and any
torch from 2.10 on. Prints the instruction set; exits with an error where a result differs.
"""

import os
import sys
from pathlib import Path

os.environ["TORCHZOO_OPS"] = "reference"

import torch
from torch import Tensor

from torchzoo.ops import (
    basis_functions,
    bounded_relu,
    categorical_log_prob,
    cauchy,
    crrelu,
    delta_conv2d_step,
    delta_linear_step,
    diagonal_step,
    evonorm_batch,
    evonorm_sample,
    grouped_ffn,
    grouped_mm,
    hyper_condition,
    hyrelu,
    library,
    log_einsum_exp,
    log_einsum_exp2,
    log_max_sum,
    lti_scan,
    mexican_hats,
    ordered_matmul,
    pair_mixtures,
    plas_sort,
    rans_encode,
    rasterize,
    s3im_groups,
    scaled_softmax,
    sparse_ffn,
    spgemm,
    vandermonde,
)


def results() -> list[Tensor]:
    """Results and gradients of the operators on fixed inputs."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, weight = normal(37, 19), normal(5, 19, 23)
    y = grouped_mm(x, weight, torch.tensor([9, 9, 20, 31, 36]))
    frame, ref, acc, weight_t = normal(3, 19), normal(3, 19), normal(3, 23), normal(19, 23)
    steps = delta_linear_step(frame, ref, acc, weight_t, threshold=0.5, quantum=0.25)
    image, sent, sums, kernels = (
        normal(5, 9, 8),
        normal(5, 9, 8),
        normal(6, 7, 6),
        normal(6, 5, 3, 3),
    )
    pixels = delta_conv2d_step(image, sent, sums, kernels, threshold=0.5)
    token, up, down, gate = normal(4, 19), normal(45, 19), normal(45, 19), normal(45, 19)
    ffn = sparse_ffn(token, up, down, gate, threshold=0.3)
    left, right = normal(31, 27), normal(27, 40)
    pattern = [(t.detach() > 0.8).to(t.dtype) for t in (left, right)]
    product = spgemm(
        *((t * p).to_sparse_csr() for t, p in zip((left, right), pattern, strict=True))
    )
    rows, w_in, w_out, scale = normal(9, 19), normal(3, 19, 46), normal(3, 23, 19), normal(17)
    src = torch.arange(17) % 9
    experts = grouped_ffn(rows, w_in, w_out, torch.tensor([5, 5, 16]), src, scale)
    bent = [crrelu(x, torch.tensor([0.3])), hyrelu(x, torch.tensor([1.5]))]
    v, log_x, a_bar = (torch.view_as_complex(normal(3, 11, 2)) for _ in range(3))
    drive, start = (torch.view_as_complex(normal(*s, 3, 11, 2)) for s in ((2, 70), (2,)))
    spaces = [vandermonde(v, 0.01 * log_x, 200), cauchy(v, 5 + log_x, a_bar)]
    spaces += [lti_scan(0.2 * a_bar, drive, start)]
    a_pairs, b_pairs = normal(3, 11, 2), normal(3, 11, 2)
    spaces += diagonal_step(normal(2, 3), start, a_pairs, b_pairs, normal(2, 3, 11, 2))
    spaces = [torch.view_as_real(t) if t.is_complex() else t for t in spaces]
    level, mixed, mixing, pairs = (
        normal(3, 7, 5),
        normal(3, 7, 4),
        normal(3, 6, 5),
        normal(3, 6, 5, 4),
    )
    bent += [bounded_relu(x, torch.tensor([0.5]))]
    bent += [evonorm_sample(pairs, *normal(3, 6).unbind(), groups=2)]
    bent += [evonorm_batch(pairs, *normal(3, 6).unbind())[0]]
    bent += [scaled_softmax(pairs, mixing)]
    logs = [log_einsum_exp(level, mixing.square()), log_einsum_exp2(level, mixed, pairs.square())]
    logs += [log_max_sum(level, mixing.square())[0]]
    logs += [categorical_log_prob(mixing, torch.arange(12).view(3, 4) % 6)]
    means, quats, sizes, colours, poses = (
        normal(20, 3),
        normal(20, 4),
        normal(20, 3),
        normal(20, 4, 3),
        normal(2, 4, 4),
    )
    pinhole = torch.tensor([[[30.0, 0, 16], [0, 30.0, 12], [0, 0, 1]]], dtype=x.dtype).expand(
        2, 3, 3
    )
    views = torch.eye(4, dtype=x.dtype) * (1 + 0.01 * poses)
    views = views + torch.tensor([0, 0, 6.0, 0], dtype=x.dtype)[:, None] * torch.eye(4)[3]
    scene = (means, quats, sizes.square() + 0.1, torch.full((20,), 0.7, dtype=x.dtype), colours)
    exponents = {"generalized_exponential": sizes[:, 0].square() + 1}
    drawn = [
        rasterize(
            *scene, views, pinhole, 32, 24, sh_degree=1, kernel=kernel, beta=exponents.get(kernel)
        ).image
        for kernel in ("gaussian", "generalized_exponential", "analytic")
    ]
    latent = [normal(2, 9, 5), normal(9, 3), normal(9, 5), normal(9, 6), normal(9, 5, 3)]
    means_given = hyper_condition(*latent)
    shifts, scores = normal(2, 7), normal(3, 7)
    mixtures = pair_mixtures(x, *shifts.unbind(), scores)
    alike = s3im_groups(left, right.T[:31, :27].contiguous(), torch.arange(64).view(8, 8) % 31)
    words = rans_encode(
        torch.arange(900) % 3, torch.tensor([0, 9, 11, 16]).expand(900, 4), precision=4
    )
    shift, rate = normal(7, 19), normal(7, 19)
    waves = [basis_functions(x, family, 7) for family in ("splines", "gaussians", "chebyshev")]
    waves += [basis_functions(x, "splines", 5, order=2), mexican_hats(x, shift, rate)]
    exact = [ordered_matmul(x.detach(), up.detach().T.contiguous())]
    exact += [torch.frombuffer(bytearray(words), dtype=torch.uint8)]
    exact += [plas_sort(pairs.detach().view(90, 4)[:81], min_block=2, generator=generator)]
    found = [y, *steps, *pixels, ffn, experts, *bent, *spaces, *logs, *drawn, means_given, alike]
    found += [*waves, *mixtures, product.to_dense()]
    inputs = [x, weight, frame, acc, weight_t, image, sums, kernels, token, up, down, gate]
    inputs += [rows, w_in, w_out, scale, v, log_x, a_bar, drive, start]
    inputs += [level, mixed, mixing, pairs, means, quats, sizes, colours, poses, *latent]
    inputs += [shift, rate, shifts, scores]
    total = sum((t.square().sum() for t in found[:-1]), found[0].new_zeros(()))
    return [*found, *exact, *torch.autograd.grad(total, inputs)]


def main(path: str) -> None:
    """Compute on the reference, load the library, compute again, compare."""
    expected = results()
    torch.ops.load_library(path)
    for op in library.ops_of("cpu"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"torchzoo::{op}", "CPU"), op
    for found, wanted in zip(results(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    kind = library.instruction_set(Path(path))
    print(f"{kind}: {len(expected)} results agree under torch {torch.__version__}")


if __name__ == "__main__":
    main(sys.argv[1])
