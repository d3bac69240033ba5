"""Soft evidence from noise and from codebooks, against distributions written out."""

import pytest
import torch

from torchzoo.circuits import soft_evidence_from_codebook, soft_evidence_from_gaussian

F64 = torch.float64


@pytest.mark.claim(
    64, "Gaussian evidence is the likelihood q(x_t | x_0 = level) up to a factor", tolerance=1e-12
)
def test_gaussian_evidence_is_the_likelihood():
    levels = torch.linspace(-1, 1, 5, dtype=F64)
    x_t = torch.randn(3, 4, dtype=F64)
    share = torch.tensor([[0.05], [0.5], [0.97]], dtype=F64)
    found = soft_evidence_from_gaussian(x_t, share, levels)
    normal = torch.distributions.Normal(
        share[..., None].sqrt() * levels, (1 - share[..., None]).sqrt()
    )
    gap = found - normal.log_prob(x_t[..., None])
    assert (gap - gap[..., :1]).abs().max() < 1e-12
    exact = -((x_t[1, 2] - 0.5**0.5 * levels[3]) ** 2) / (2 * 0.5)
    assert (found[1, 2, 3] - exact).abs() < 1e-12
    assert torch.equal(found[1], soft_evidence_from_gaussian(x_t[1], 0.5, levels))


@pytest.mark.claim(
    64,
    "Codebook evidence is the softmax of log code probabilities over the temperature",
    tolerance=1e-10,
)
def test_codebook_evidence():
    z, codebook = torch.randn(2, 3, 4, dtype=F64), torch.randn(5, 4, dtype=F64)
    distance = (z[:, :, None] - codebook).square().sum(-1)
    probs = (-distance).softmax(-1)
    warmth = torch.tensor([0.1, 1.0, 3.0], dtype=F64)
    for temperature in (1.0, 0.5, warmth):
        found = soft_evidence_from_codebook(z, codebook, temperature=temperature).exp()
        powers = probs ** (1 / torch.as_tensor(temperature, dtype=F64).expand(3)[:, None])
        expected = powers / powers.sum(-1, keepdim=True)
        assert (found - expected).abs().max() < 1e-10


def test_errors_of_the_evidence():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="levels: got shape"):
        soft_evidence_from_gaussian(x, 0.5, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"alpha_bar: got 1\.2"):
        soft_evidence_from_gaussian(x, 1.2, torch.zeros(3))
    with pytest.raises(ValueError, match="codebook: got shape"):
        soft_evidence_from_codebook(x, torch.zeros(3, 5))
    with pytest.raises(ValueError, match="temperature: got 0"):
        soft_evidence_from_codebook(x, torch.zeros(3, 4), temperature=0)
