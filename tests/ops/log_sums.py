"""Problems for the sums in log space, and their values and gradients term by term in float64."""

import pytest
import torch

from torchzoo.ops import log_einsum_exp, log_einsum_exp2

DOUBLE = torch.float64
INF = torch.inf
TOLERANCE = {DOUBLE: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
tucker = pytest.mark.parametrize("tucker", [False, True], ids=["plain", "tucker"])


def call(operands, w, **options):
    return (log_einsum_exp2 if len(operands) == 2 else log_einsum_exp)(*operands, w, **options)


def pairs(operands):
    """`(F, B, 1, K)` or `(F, B, 1, K1 K2)`."""
    if len(operands) == 1:
        return operands[0][:, :, None]
    a, b = operands
    return (a[..., None] + b[:, :, None]).flatten(2)[:, :, None]


def by_terms(operands, w):
    """The sums, and their slopes by values and weights, each term by itself in float64."""
    operands, w = [x.detach().double() for x in operands], w.detach().double()
    terms = pairs(operands)
    flat = w.flatten(2)[:, None]
    weighted = terms + flat.log()
    out = torch.logsumexp(weighted, -1) if w.shape[-1] else weighted.sum(-1).log()
    below = out.masked_fill(out == -INF, INF)[..., None]
    slopes = (terms - below).exp()
    return out, slopes, (weighted - below).exp()


def gradients_by_terms(operands, w, grad):
    _, slopes, flows = by_terms(operands, w)
    grad = grad.double()[..., None]
    flows = (flows * grad).sum(2).unflatten(-1, [x.shape[2] for x in operands])
    values = [flows.sum(-1), flows.sum(2)] if len(operands) == 2 else [flows]
    return *values, (slopes * grad).sum(1).reshape(w.shape)


def problem(tucker, f=2, b=5, o=3, k=4, dtype=DOUBLE, seed=0, spread=3.0, hard=False):
    """Log-values and weights; where `hard`, many weights are 0 and many values minus infinity."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [k, k + 1] if tucker else [k]
    shapes = [(f, b, size) for size in sizes]
    operands = [spread * torch.randn(s, generator=generator, dtype=DOUBLE) for s in shapes]
    w = torch.rand(f, o, *sizes, generator=generator, dtype=DOUBLE)
    grad = torch.randn(f, b, o, generator=generator, dtype=DOUBLE)
    if hard:
        w = w.masked_fill(torch.rand(w.shape, generator=generator) < 0.6, 0)
        w[:, ::3] *= 1e-30
        operands[-1][torch.rand(shapes[-1], generator=generator) < 0.3] = -INF
        operands[0][:, 1::4] = -INF
    return [x.to(dtype) for x in operands], w.to(dtype), grad.to(dtype)


def assert_near(found, expected, tolerance):
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
