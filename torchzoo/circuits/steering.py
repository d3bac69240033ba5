"""Steers a diffusion sampler by the exact posteriors of a circuit, for inpainting.

Liu, Niepert and Van den Broeck, Image Inpainting via Tractable Steering of Diffusion Models, 2024.
A denoiser knows each pixel of x_0 by itself, p_DM(x_0^i | x_t); a circuit over images gives what
the known pixels and x_t say together, for all pixels by one pass up and one down:

    p_TPM(x_0^i | x_t, known) is proportional to the sum over the other pixels of
        q(x_t | x_0) p_TPM(x_0 | known)
    p(x_0^i | x_t, known) is proportional to p_DM^a p_TPM^(1 - a),
        a(t) = (a_1 - a_0) exp(-kappa t / T) + a_0

and a draw of x_0 from it takes the place of the denoiser's guess in the step to x_(t-1).

Deviations from the paper's code: known pixels come back as they were given, after every call; the
deviation of a Gaussian on levels has a floor of half a gap; and the step to x_(t-1) that a
scheduler takes follows from x_t and the steered x_0, with the noise they imply.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchzoo.circuits.circuit import Circuit
from torchzoo.circuits.decoding import Codec, decoded_draws, draw_mixture, patch_side
from torchzoo.circuits.diffusion_step import steered_step
from torchzoo.circuits.finite_leaf import FiniteLeaf
from torchzoo.circuits.leaf import draw
from torchzoo.circuits.soft_evidence import (
    check_share,
    gaussian_on_levels,
    geometric_mix,
    soft_evidence_from_codebook,
    soft_evidence_from_gaussian,
)
from torchzoo.circuits.teacher import init_from_teacher

__all__ = [
    "TractableSteering",
    "init_from_teacher",
    "soft_evidence_from_codebook",
    "soft_evidence_from_gaussian",
    "steered_posterior",
]

IMAGE_LEVELS = 256
"""Grey levels on which images are drawn that come from a codec."""


def steered_posterior(
    circuit: Circuit,
    log_p_dm: Tensor,
    log_w: Tensor,
    known: Tensor,
    value: Tensor,
    *,
    mix: float | Tensor,
) -> Tensor:
    """Geometric mixture of a denoiser's marginals and a circuit's exact posterior marginals.

    Args:
        circuit: The circuit, of one class, with leaves of finitely many values.
        log_p_dm: Log-probabilities of the denoiser; they need not be normalised.
        log_w: Soft evidence; it is not read at known variables.
        known: True where a variable's value is given.
        value: The values; not read at other variables.
        mix: Exponent of the denoiser's factor in [0, 1], the circuit's being `1 - mix`; 1 leaves
            the circuit out and 0 the denoiser. A tensor broadcasts against `(..., D, C)`.

    Shape:
        - log_p_dm, log_w: `(..., D, C)`
        - known, value: `(..., D)`
        - output: `(..., D, C)`

    Returns:
        Log-probabilities, normalised over `C`, detached, in the circuit's precision; point masses
        at known variables. The circuit's own where it and the denoiser rule each other out, NaN
        where the evidence is impossible.

    Raises:
        ValueError: A shape or type that does not fit, or `mix` outside [0, 1].

    Source:
        A. Liu, M. Niepert and G. Van den Broeck, Image Inpainting via Tractable Steering of
        Diffusion Models, 2024, section 4.

    Example:
        >>> from torchzoo.circuits import CategoricalLeaf, hclt
        >>> circuit = Circuit(hclt([-1, 0]), CategoricalLeaf(3), num_units=2)
        >>> flat, known = torch.zeros(2, 3), torch.tensor([True, False])
        >>> value = torch.tensor([1, 0])
        >>> steered_posterior(circuit, flat, flat, known, value, mix=0.5).exp()[0]
        tensor([0., 1., 0.])
    """
    check_share("mix", mix)
    size = (circuit.num_variables, circuit.leaf.num_categories)
    if log_p_dm.shape[-2:] != size:
        raise ValueError(f"log_p_dm: got shape {tuple(log_p_dm.shape)}, expected (*, {size})")
    for name, tensor in (("known", known), ("value", value)):
        if tensor.shape != log_p_dm.shape[:-1]:
            wanted = tuple(log_p_dm.shape[:-1])
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {wanted}")
    if known.dtype != torch.bool:
        raise ValueError(f"known: got dtype {known.dtype}, expected torch.bool")
    log_tpm = circuit.posterior_marginals(value, known, log_w=log_w).log()
    mixed = geometric_mix(log_p_dm.detach(), log_tpm, mix)
    return torch.where(known[..., None], log_tpm, mixed)


class TractableSteering:
    """Replaces a denoiser's guess of x_0 by a draw that known pixels steer, in the noisiest steps.

    Without a codec the circuit is over pixels. With one it is over the tokens of a codec: what
    the circuit says is carried over to pixels by decoding some draws.

    Args:
        circuit: The circuit, of one class, with leaves of finitely many values.
        codec: Has `encode_logits(images) -> (B, D, C)`, log-probabilities of codes, and
            `decode(tokens) -> images`, for a square patch of the image a token.
        levels: `(L,)`, increasing values that pixels can have, in the diffusion model's scale. By
            default from -1 to 1 in equal steps: the circuit's C categories, or 256 with a codec.
        mix_start: Exponent a_0 of the denoiser's factor, at the noisy end of the schedule.
        mix_end: Exponent a_1, at the clean end.
        mix_rate: Rate kappa of the change between them.
        num_latent_samples: Draws of tokens that are decoded, with a codec.
        top_k: Codes of a token that are kept, the encoder's likeliest, with a codec.
        steer_fraction: Share of the steps that are steered, the noisiest.
        temperatures: Of the evidence of tokens whose patch is unknown, and known, with a codec;
            between them in proportion to the share that is known.

    Raises:
        ValueError: An option out of its range, or a circuit that can't be asked for marginals.

    Source:
        A. Liu, M. Niepert and G. Van den Broeck, Image Inpainting via Tractable Steering of
        Diffusion Models, 2024, sections 4 and 5; the defaults are those of the paper's code for
        CelebA-HQ.

    Example:
        >>> from torchzoo.circuits import CategoricalLeaf, hclt
        >>> circuit = Circuit(hclt([-1, 0, 1, 2]), CategoricalLeaf(5), num_units=3)
        >>> steering = TractableSteering(circuit)
        >>> x_known = torch.tensor([[[1.0, -1.0], [0.0, 0.0]]])
        >>> mask = torch.tensor([[True, True], [False, False]])
        >>> guess, spread, x_t = torch.zeros(1, 2, 2), torch.ones(1, 2, 2), torch.randn(1, 2, 2)
        >>> x_0 = steering.steer(guess, spread, x_t, 95, 100, x_known=x_known, mask=mask)
        >>> x_0[0, 0].tolist()
        [1.0, -1.0]
    """

    def __init__(
        self,
        circuit: Circuit,
        *,
        codec: Codec | None = None,
        levels: Tensor | None = None,
        mix_start: float = 0.8,
        mix_end: float = 1.0,
        mix_rate: float = 2.0,
        num_latent_samples: int = 8,
        top_k: int = 20,
        steer_fraction: float = 0.1,
        temperatures: tuple[float, float] = (0.1, 0.01),
    ) -> None:
        if circuit.num_classes != 1 or not isinstance(circuit.leaf, FiniteLeaf):
            expected = "one class and leaves of finitely many values"
            raise ValueError(f"circuit: got {circuit.extra_repr()}, expected {expected}")
        shares = {"mix_start": mix_start, "mix_end": mix_end, "steer_fraction": steer_fraction}
        for name, share in shares.items():
            check_share(name, share)
        for name, count, least in (
            ("num_latent_samples", num_latent_samples, 2),
            ("top_k", top_k, 1),
        ):
            if count < least:
                raise ValueError(f"{name}: got {count}, expected at least {least}")
        if mix_rate < 0:
            raise ValueError(f"mix_rate: got {mix_rate}, expected at least 0")
        if len(temperatures) != 2 or not min(temperatures) > 0:
            raise ValueError(f"temperatures: got {temperatures}, expected two numbers above 0")
        categories = circuit.leaf.num_categories
        if levels is None:
            levels = torch.linspace(-1, 1, categories if codec is None else IMAGE_LEVELS)
        if levels.dim() != 1 or len(levels) < 2 or not (levels.diff() > 0).all():
            raise ValueError(f"levels: got {levels}, expected at least two increasing numbers")
        if codec is None and len(levels) != categories:
            raise ValueError(
                f"levels: got {len(levels)}, expected the circuit's {categories} categories"
            )
        self.circuit, self.codec, self.levels = circuit, codec, levels
        self.mix_start, self.mix_end, self.mix_rate = mix_start, mix_end, mix_rate
        self.num_latent_samples, self.top_k = num_latent_samples, top_k
        self.steer_fraction, self.temperatures = steer_fraction, temperatures

    def __repr__(self) -> str:
        mode = "pixels" if self.codec is None else "tokens"
        return f"TractableSteering({mode}, steer_fraction={self.steer_fraction})"

    def mix(self, t: float, T: float) -> float:
        """Exponent of the denoiser's factor at step t of T."""
        fall = math.exp(-self.mix_rate * t / T)
        return (self.mix_end - self.mix_start) * fall + self.mix_start

    def is_steered(self, t: float, T: float) -> bool:
        """Whether step t of T, T being the noisiest, is among those that are steered."""
        return t > (1 - self.steer_fraction) * T

    @torch.no_grad()
    def steer(
        self,
        x0_mean: Tensor,
        x0_var: Tensor,
        x_t: Tensor,
        t: float,
        T: float,
        *,
        x_known: Tensor,
        mask: Tensor,
        alpha_bar: float | None = None,
        log_w: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The denoiser's guess of x_0 or, in a step that is steered, a draw in its place.

        Args:
            x0_mean: The guess.
            x0_var: The variance of x_0 given x_t.
            x_t: The noisy images.
            t: The step; `T` has most noise.
            T: Number of steps.
            x_known: Images that hold the known pixels; not read elsewhere.
            mask: True where a pixel is known.
            alpha_bar: Share of the signal's variance in `x_t`, read without a codec only; by
                default of DDPM's linear schedule, exp(-0.1 s - 9.95 s^2) at s = t / T.
            log_w: Other soft evidence in place of that of `x_t`, or of the guess with a codec:
                codes of a reference image in some region, or ranges of pixels.
            generator: Source of randomness; untouched in steps that are not steered.

        Shape:
            - x0_mean, x_t, x_known: `(B, *)`, `(B, channels, height, width)` with a codec
            - x0_var, mask: like `x0_mean`, or broadcasting against it
            - log_w: `(B, D, C)`
            - output: like `x0_mean`

        Returns:
            `x0_mean` itself, or levels drawn pixel by pixel, with the known pixels as given.

        Raises:
            ValueError: A shape that doesn't fit, a mask that is not bool, a step outside 0 to `T`,
                or a number of pixels, tokens or codes that is not the circuit's.
        """
        self._check(x0_mean, x0_var, x_t, x_known, mask)
        if not 0 <= t <= T:
            raise ValueError(f"t: got {t}, expected a step from 0 to {T}")
        if not self.is_steered(t, T):
            return x0_mean
        mix, levels = self.mix(t, T), self.levels.to(x_t.device)
        x0_var, mask = x0_var.expand_as(x0_mean), mask.expand_as(x0_mean)
        if self.codec is None:
            if log_w is None:
                share = linear_schedule(t / T) if alpha_bar is None else alpha_bar
                log_w = soft_evidence_from_gaussian(x_t.flatten(1).to(levels), share, levels)
            log_p_dm = gaussian_on_levels(x0_mean.flatten(1), x0_var.flatten(1), levels)
            value = nearest_level(x_known.flatten(1).to(levels), levels)
            log_p = steered_posterior(
                self.circuit, log_p_dm, log_w, mask.flatten(1), value, mix=mix
            )
            drawn = levels[draw(log_p.exp(), generator)].view_as(x0_mean)
        else:
            pasted = torch.where(mask, x_known, x0_mean)
            images = decoded_draws(
                self.circuit,
                self.codec,
                pasted,
                mask,
                log_w,
                self.temperatures,
                self.top_k,
                self.num_latent_samples,
                generator,
            )
            drawn = draw_mixture(x0_mean, x0_var, images, levels, mix, generator)
        return torch.where(mask, x_known, drawn.to(x0_mean))

    def as_callback(
        self,
        scheduler: Any,
        *,
        x_known: Tensor,
        mask: Tensor,
        data_var: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Callable[..., Any]:
        """A scheduler's `step` with its prediction of the original sample steered.

        For schedulers in the style of diffusers, with `alphas_cumprod`, `step(output, timestep,
        sample, ...)`, and a `config` with `prediction_type` and `num_train_timesteps`:
        `pipe.scheduler.step = steering.as_callback(pipe.scheduler, x_known=..., mask=...)` steers
        any pipeline. The step goes on from the steered sample and the noise that it implies.

        Args:
            scheduler: The scheduler.
            x_known: See `steer`.
            mask: See `steer`.
            data_var: Variance v of a pixel; x_0 given x_t has `v (1 - a) / (v a + 1 - a)` where
                the share of the signal is a, as for Gaussian pixels.
            generator: See `steer`.

        Returns:
            What takes the place of `scheduler.step`.

        Raises:
            ValueError: A type of prediction that is unknown.
        """

        def steer(x0: Tensor, x_t: Tensor, timestep: int, share: float) -> Tensor:
            variance = data_var * (1 - share) / (data_var * share + 1 - share)
            return self.steer(
                x0,
                torch.full_like(x0, variance),
                x_t,
                timestep,
                total,
                x_known=x_known,
                mask=mask,
                alpha_bar=share,
                generator=generator,
            )

        total = scheduler.config.num_train_timesteps
        return steered_step(scheduler, steer, lambda timestep: self.is_steered(timestep, total))

    def _check(
        self, x0_mean: Tensor, x0_var: Tensor, x_t: Tensor, x_known: Tensor, mask: Tensor
    ) -> None:
        shape = x0_mean.shape
        for name, tensor in (("x_t", x_t), ("x_known", x_known)):
            if tensor.shape != shape:
                raise ValueError(
                    f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(shape)}"
                )
        for name, tensor in (("x0_var", x0_var), ("mask", mask)):
            if not _broadcasts(tensor.shape, shape):
                raise ValueError(
                    f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(shape)} or one that "
                    "broadcasts to it"
                )
        if mask.dtype != torch.bool:
            raise ValueError(f"mask: got dtype {mask.dtype}, expected torch.bool")
        size = self.circuit.num_variables
        if self.codec is None and math.prod(shape[1:]) != size:
            raise ValueError(f"x0_mean: got shape {tuple(shape)}, expected {size} pixels an image")
        if self.codec is not None:
            patch_side(shape, size)


def linear_schedule(s: float) -> float:
    """Share of the signal's variance at time s of 1 where noise grows linearly, as in DDPM."""
    return math.exp(-0.1 * s - 9.95 * s**2)


def nearest_level(x: Tensor, levels: Tensor) -> Tensor:
    """Indices of the nearest levels; `levels` increase."""
    return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2)


def _broadcasts(shape: torch.Size, wanted: torch.Size) -> bool:
    """Whether a tensor of some shape can be expanded to the other."""
    pairs = zip(reversed(shape), reversed(wanted), strict=False)
    return len(shape) <= len(wanted) and all(size in (1, other) for size, other in pairs)
