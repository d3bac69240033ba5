"""A circuit over the tokens of a codec: what it finds for an image, carried over to pixels.

With p(code | image) of the encoder, s the share of a token's patch that is known, and p_TPM the
circuit's posterior marginals given all w at once:

    w_i = p(code | image)^(1 / T_i), normalised,   T_i = T_unknown + s_i (T_known - T_unknown)
    a token's code is drawn from p_TPM^(1 - s_i) w_i^(s_i), among the encoder's likeliest
    a pixel is Gaussian with the mean and variance of some decoded draws

Liu, Niepert and Van den Broeck, Image Inpainting via Tractable Steering of Diffusion Models, 2024,
section 5, with the constants of its code.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from torchzoo.circuits.circuit import Circuit
from torchzoo.circuits.leaf import draw
from torchzoo.circuits.soft_evidence import gaussian_on_levels, geometric_mix

__all__ = ["Codec", "decoded_draws", "draw_mixture", "patch_side"]

FLOOR = 1e-3
"""Added to the density of pixels under the circuit, which comes from a few decoded draws."""
CUT = 2.0
"""Deviations beyond which the denoiser's density is 0."""
UNLIKELY = 1e-8
"""Weight of a code that is none of the encoder's likeliest."""
ENTRIES_AT_ONCE = 1 << 24
"""How many numbers, pixels times levels, a piece of work takes."""


class Codec(Protocol):
    """What maps images to a circuit's tokens and back."""

    def encode_logits(self, images: Tensor) -> Tensor:
        """`(B, D, C)`, log-probabilities of the codes of images, up to a constant."""

    def decode(self, tokens: Tensor) -> Tensor:
        """Images of tokens `(B, D)`."""


def decoded_draws(
    circuit: Circuit,
    codec: Codec,
    images: Tensor,
    mask: Tensor,
    log_w: Tensor | None,
    temperatures: tuple[float, float],
    top_k: int,
    num_samples: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Images of tokens that the circuit finds for images `(B, channels, height, width)`.

    Args:
        circuit: The circuit over tokens.
        codec: The codec.
        images: What is encoded.
        mask: True where a pixel is known.
        log_w: `(B, D, C)`, soft evidence in place of the encoder's.
        temperatures: Of evidence of unknown and of known patches.
        top_k: Codes that are kept.
        num_samples: Draws S of an image's tokens.
        generator: Source of randomness.

    Returns:
        `(S, B, channels, height, width)`.

    Raises:
        ValueError: Tokens that the circuit is not over, or decoded images of another shape.
    """
    wanted = (len(images), circuit.num_variables, circuit.leaf.num_categories)
    logits = codec.encode_logits(images)
    if logits.shape != wanted:
        raise ValueError(
            f"codec: got logits of shape {tuple(logits.shape)} from encode_logits, expected "
            f"{wanted} for the circuit"
        )
    logits = logits.log_softmax(-1)
    side = patch_side(images.shape, circuit.num_variables)
    share = F.avg_pool2d(mask.to(logits), side).mean(1).flatten(1)[..., None]
    if log_w is None:
        unknown, known = temperatures
        log_w = (logits / (unknown + share * (known - unknown))).log_softmax(-1)
    log_tpm = circuit.posterior_marginals(log_w=log_w).log()
    probs = geometric_mix(log_w, log_tpm, share).exp()
    least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
    probs = probs.masked_fill(logits < least, UNLIKELY)
    tokens = draw(probs.repeat(num_samples, 1, 1, 1), generator)
    decoded = codec.decode(tokens.flatten(0, 1))
    expected = (num_samples * len(images), *images.shape[1:])
    if decoded.shape != expected:
        raise ValueError(
            f"codec: got images of shape {tuple(decoded.shape)} from decode, expected {expected}"
        )
    return decoded.unflatten(0, (num_samples, len(images)))


def draw_mixture(
    mean: Tensor,
    variance: Tensor,
    images: Tensor,
    levels: Tensor,
    mix: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Levels of pixels, from the denoiser's Gaussian and that of decoded images `(S, ...)`.

    Args:
        mean: The denoiser's mean.
        variance: The denoiser's variance, of the same shape.
        images: Decoded draws.
        levels: `(L,)`, increasing.
        mix: Exponent of the denoiser's factor.
        generator: Source of randomness.
    """
    images = images.to(levels)
    given = (mean, variance, images.mean(0), images.var(0))
    at_once = max(1, ENTRIES_AT_ONCE // len(levels))
    drawn = []
    for dm_mean, dm_var, tpm_mean, tpm_var in zip(
        *(tensor.flatten().split(at_once) for tensor in given), strict=True
    ):
        log_dm = gaussian_on_levels(dm_mean, dm_var, levels, cut=CUT)
        density = gaussian_on_levels(tpm_mean, tpm_var, levels).exp() + FLOOR
        log_p = geometric_mix(log_dm, density.log().log_softmax(-1), mix)
        drawn.append(levels[draw(log_p.exp(), generator)])
    return torch.cat(drawn).view_as(mean)


def patch_side(shape: torch.Size, num_tokens: int) -> int:
    """Side of the square patch of images `(B, channels, height, width)` that a token stands for.

    Raises:
        ValueError: No size of patch gives so many.
    """
    if len(shape) == 4:
        height, width = shape[2:]
        side = math.isqrt(height * width // num_tokens)
        fits = side > 0 and height % side == 0 and width % side == 0
        if fits and (height // side) * (width // side) == num_tokens:
            return side
    raise ValueError(
        f"x0_mean: got shape {tuple(shape)}, expected (B, channels, height, width) of "
        f"{num_tokens} square patches, one for each variable of the circuit"
    )
