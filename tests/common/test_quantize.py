"""Residual vector quantisation against its definition."""

from itertools import pairwise

import pytest
import torch

from torchzoo.common.quantize import ResidualVQ


def fitted(stages=6, rows=500, dim=3, codebook_size=16):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(rows, dim, generator=random, dtype=torch.float64)
    quantizer = ResidualVQ(dim, codebook_size=codebook_size, stages=stages, dtype=x.dtype)
    quantizer.init_kmeans(x, generator=random)
    return quantizer, x


@pytest.mark.claim(26, "The error does not grow with the number of stages on the data fitted to")
def test_error_falls_with_stages():
    quantizer, x = fitted()
    _, indices, _ = quantizer(x)
    left, errors = x.clone(), [x.square().sum(-1).mean().item()]
    for stage in range(6):
        left -= quantizer.codebooks[stage].detach()[indices[:, stage]]
        errors.append(left.square().sum(-1).mean().item())
    assert all(b <= a for a, b in pairwise(errors))
    assert errors[-1] < 1e-3 * errors[0]  # 24 bits of three numbers
    torch.testing.assert_close(x - quantizer(x)[0], left)


@pytest.mark.claim(26, "Sums of codes are found exactly where later stages are small enough")
def test_exact_for_separated_codes():
    quantizer = ResidualVQ(3, codebook_size=8, stages=3, dtype=torch.float64)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
    quantizer.codebooks.data = torch.stack([corners, 0.2 * corners, 0.04 * corners])
    indices = torch.cartesian_prod(*[torch.arange(8)] * 3)
    sums = quantizer.decode(indices)
    quantised, found, _ = quantizer(sums)
    assert torch.equal(found, indices)
    assert torch.equal(quantised, sums)
    brute = [
        sum(quantizer.codebooks.detach()[q, i] for q, i in enumerate(row)) for row in indices[:50]
    ]
    torch.testing.assert_close(sums[:50], torch.stack(brute))


@pytest.mark.claim(26, "decode(indices) is the quantised vector to the last bit", tolerance=0)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decode_is_bitwise(dtype):
    quantizer, x = fitted()
    quantizer = quantizer.to(dtype)
    x = (x * torch.logspace(-3, 3, len(x))[:, None]).to(dtype).requires_grad_()
    quantised, indices, _ = quantizer(x)
    assert torch.equal(quantizer.decode(indices), quantised)
    assert torch.equal(quantizer.decode(indices.to(torch.uint8)), quantised)
    assert torch.equal(quantizer.encode(x), indices)


@pytest.mark.claim(
    26, "The gradient passes straight to the vectors; codebooks learn from their loss only"
)
def test_gradients():
    quantizer, x = fitted(stages=3)
    x.requires_grad_()
    quantised, indices, loss = quantizer(x)
    weight = torch.randn_like(x)
    into_x, into_codes = torch.autograd.grad(
        (quantised * weight).sum(), (x, quantizer.codebooks), allow_unused=True, retain_graph=True
    )
    assert torch.equal(into_x, weight)
    assert into_codes is None
    into_x, into_codes = torch.autograd.grad(loss, (x, quantizer.codebooks), allow_unused=True)
    assert into_x is None
    # by hand: 2 / M times the sum of (code - residual) over the vectors that chose the code
    residual, total = x.detach().clone(), 0.0
    expected = torch.zeros_like(quantizer.codebooks)
    for stage in range(3):
        distance = (residual[:, None] - quantizer.codebooks[stage].detach()).norm(dim=-1)
        assert torch.equal(distance.argmin(1), indices[:, stage])
        code = quantizer.codebooks[stage].detach()[indices[:, stage]]
        expected[stage].index_add_(0, indices[:, stage], 2 * (code - residual) / len(x))
        residual = residual - code
        total += residual.square().sum().item() / len(x)
    torch.testing.assert_close(into_codes, expected)
    assert loss.item() == pytest.approx(total, rel=1e-12)


def test_kmeans_codes_are_means():
    random = torch.Generator().manual_seed(3)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = centres.repeat_interleave(40, 0) + 0.1 * torch.randn(120, 2, generator=random)
    found = []
    for seed in range(5):  # it begins from random vectors, so some starts end elsewhere
        quantizer = ResidualVQ(2, codebook_size=3, stages=1)
        quantizer.init_kmeans(x, generator=torch.Generator().manual_seed(seed))
        codes = quantizer.codebooks[0].detach()
        found.append(codes[codes.sum(-1).argsort()])
    errors = [inertia(codes, x) for codes in found]
    best = found[errors.index(min(errors))]
    means = x.view(3, 40, 2).mean(1)
    torch.testing.assert_close(best[0], means[0])
    few = ResidualVQ(2, codebook_size=8, stages=1)
    few.init_kmeans(x[:5])  # fewer vectors than codes: each is a code
    torch.testing.assert_close(few(x[:5])[0], x[:5])


def inertia(codes, x):
    return torch.cdist(x, codes).min(1).values.square().sum().item()


def test_bad_input():
    quantizer = ResidualVQ(3, codebook_size=4, stages=2)
    assert quantizer(torch.empty(0, 3))[2].item() == 0
    with pytest.raises(ValueError, match=r"indices: got 0 to 4, expected 0 to 3"):
        quantizer.decode(torch.tensor([[0, 4]]))
    with pytest.raises(ValueError, match="indices"):
        quantizer.decode(torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"x: got .*\(5, 4\)"):
        quantizer(torch.zeros(5, 4))
    with pytest.raises(ValueError, match="x: got"):
        quantizer.init_kmeans(torch.empty(0, 3))
    with pytest.raises(ValueError, match="stages"):
        ResidualVQ(3, stages=0)
