"""What a noisy or encoded image says about each variable of a circuit, and how two sources mix.

Soft evidence is a weight for every value of every variable, as a logarithm `(..., D, C)`. That of
a diffusion step is the likelihood q(x_t | x_0 = c), that of a codebook a distribution over codes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "gaussian_on_levels",
    "geometric_mix",
    "soft_evidence_from_codebook",
    "soft_evidence_from_gaussian",
]


def soft_evidence_from_gaussian(x_t: Tensor, alpha_bar: float | Tensor, levels: Tensor) -> Tensor:
    """Likelihoods of noisy values, `-(x_t - sqrt(alpha_bar) level)^2 / (2 (1 - alpha_bar))`.

    With `alpha_bar` 0 all is noise and nothing is said; with 1 nothing is, and the nearest level
    is certain.

    Args:
        x_t: Noisy values.
        alpha_bar: Share of the signal's variance that is left, in [0, 1]; a tensor broadcasts
            against `x_t`.
        levels: What each category stands for, in the scale of the diffusion model.

    Shape:
        - x_t: `(..., D)`
        - levels: `(C,)`
        - output: `(..., D, C)`

    Returns:
        Soft evidence for a circuit.

    Raises:
        ValueError: Levels that are no vector, or `alpha_bar` outside [0, 1].

    Source:
        A. Liu, M. Niepert and G. Van den Broeck, Image Inpainting via Tractable Steering of
        Diffusion Models, 2024, section 4.

    Example:
        >>> levels = torch.tensor([-1.0, 0.0, 1.0])
        >>> soft_evidence_from_gaussian(torch.tensor([0.9]), 0.5, levels).argmax(-1)
        tensor([2])
    """
    if levels.dim() != 1 or not len(levels):
        raise ValueError(f"levels: got shape {tuple(levels.shape)}, expected (C,)")
    check_share("alpha_bar", alpha_bar)
    levels = levels.to(x_t)
    share = torch.as_tensor(alpha_bar, dtype=x_t.dtype, device=x_t.device)[..., None]
    gap = x_t[..., None] - share.sqrt() * levels
    log_w = -gap.square() / (2 * (1 - share))
    nearest = gap.abs().argmin(-1, keepdim=True)
    ruled_out = torch.arange(len(levels), device=x_t.device) != nearest
    certain = torch.zeros_like(log_w).masked_fill(ruled_out, -torch.inf)
    return torch.where(share == 1, certain, log_w.masked_fill(share == 0, 0))


def soft_evidence_from_codebook(
    z: Tensor, codebook: Tensor, *, temperature: float | Tensor = 1.0
) -> Tensor:
    """A distribution over codes for each token: softmax of `-(distance to the code)^2 / T`.

    Args:
        z: Encoder's outputs.
        codebook: The codes.
        temperature: T, above 0; a tensor gives one for each token.

    Shape:
        - z: `(..., D, d)`
        - codebook: `(C, d)`
        - temperature: `(D,)` or `(..., D)`
        - output: `(..., D, C)`

    Returns:
        Soft evidence for a circuit over tokens, normalised over codes.

    Raises:
        ValueError: Codes of another size than the outputs, or a temperature that is not positive.

    Source:
        A. Liu, M. Niepert and G. Van den Broeck, Image Inpainting via Tractable Steering of
        Diffusion Models, 2024, section 5.

    Example:
        >>> codes = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
        >>> soft_evidence_from_codebook(torch.zeros(1, 2), codes, temperature=25.0)
        tensor([[-0.3133, -1.3133]])
    """
    if codebook.dim() != 2 or z.dim() < 2 or z.shape[-1] != codebook.shape[1]:
        expected = f"expected (C, d) and (..., D, d), z has {tuple(z.shape)}"
        raise ValueError(f"codebook: got shape {tuple(codebook.shape)}, {expected}")
    if isinstance(temperature, float | int) and not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, expected a number above 0")
    distance = torch.cdist(z, codebook.to(z), compute_mode="donot_use_mm_for_euclid_dist")
    warmth = torch.as_tensor(temperature, dtype=z.dtype, device=z.device)[..., None]
    return (-distance.square() / warmth).log_softmax(-1)


def gaussian_on_levels(
    mean: Tensor, variance: Tensor, levels: Tensor, *, cut: float = math.inf
) -> Tensor:
    """Log-density of a Gaussian at each level, `(..., C)`, in the precision of the levels.

    The mean is kept between the outermost levels, and the standard deviation at half the widest
    gap of levels at least, so that a level is always within two deviations of the mean.

    Args:
        mean: `(...)`.
        variance: `(...)`.
        levels: `(C,)`, increasing.
        cut: Deviations beyond which the density is 0.
    """
    mean = mean.to(levels).clamp(levels[0], levels[-1])[..., None]
    least = levels.diff().max() / 2
    deviation = variance.to(levels).sqrt().clamp_min(least)[..., None]
    standard = (levels - mean) / deviation
    log_density = -standard.square() / 2 - deviation.log() - math.log(2 * math.pi) / 2
    return log_density.masked_fill(standard.abs() > cut, -torch.inf)


def geometric_mix(log_p: Tensor, log_q: Tensor, mix: float | Tensor) -> Tensor:
    """Logarithm of `p^mix q^(1 - mix)`, normalised over the last axis.

    An exponent of 0 leaves a factor out altogether, so that 0^0 is 1. Where the factors rule each
    other out q stands.

    Args:
        log_p: `(..., C)`.
        log_q: `(..., C)`, normalised.
        mix: Exponent of p in [0, 1], which broadcasts.
    """
    share = torch.as_tensor(mix, dtype=log_q.dtype, device=log_q.device)
    mixed = _power(log_p.to(log_q), share) + _power(log_q, 1 - share)
    total = mixed.logsumexp(-1, keepdim=True)
    return torch.where(total == -torch.inf, log_q, mixed - total)


def check_share(name: str, value: float | Tensor) -> None:
    """Refuse numbers outside [0, 1]; a compiled graph leaves tensors to the user."""
    if isinstance(value, Tensor) and (torch.compiler.is_compiling() or value.is_meta):
        return
    found = torch.as_tensor(value)
    if not ((found >= 0) & (found <= 1)).all():
        raise ValueError(f"{name}: got {value}, expected numbers in [0, 1]")


def _power(log_p: Tensor, exponent: Tensor) -> Tensor:
    return torch.where(exponent == 0, 0, exponent * log_p)
