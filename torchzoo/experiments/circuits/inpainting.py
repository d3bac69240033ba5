"""A denoiser of digits, the circuits that steer it, and the samplers that inpaint with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchzoo.circuits import Circuit
from torchzoo.circuits.steering import linear_schedule
from torchzoo.data.digits import digits
from torchzoo.experiments.circuits.compression import LEVELS, TEST, fit_hclt, independent
from torchzoo.trainer import fit

STEPS, PIXELS = 100, 64


class Denoiser(nn.Module):
    """Predicts the noise of x_t, `(B, 64)`, from it and the step `(B,)`."""

    def __init__(self, width: int = 256):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(PIXELS + 16, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, PIXELS),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None] / STEPS * math.pi * 2.0 ** torch.arange(-1, 7)
        return self.net(torch.cat([x, angle.sin(), angle.cos()], 1))

    @torch.no_grad()
    def guess(self, x: Tensor, t: int) -> Tensor:
        """The x_0 that it sees in x_t, within [-1, 1]."""
        share = linear_schedule(t / STEPS)
        noise = self(x, torch.full((len(x),), t))
        return ((x - (1 - share) ** 0.5 * noise) / share**0.5).clamp(-1, 1)


class Models(NamedTuple):
    """What all methods share.

    Attributes:
        denoiser: The diffusion model.
        variance: `(STEPS + 1, 64)`, of x_0 given x_t: the guess's mean squared error in training.
        circuit: The hidden Chow-Liu tree.
        independent: A circuit of independent pixels.
        classify: Labels of images `(B, 64)` of levels 0 to 16.
        test_x: `(N, 64)`, levels of test images.
        test_y: Their labels.
    """

    denoiser: Denoiser
    variance: Tensor
    circuit: Circuit
    independent: Circuit
    classify: Callable[[Tensor], Tensor]
    test_x: Tensor
    test_y: Tensor


@cache
def trained(images: int, epochs: int, em_epochs: int) -> Models:
    """Train denoiser, circuits and classifier once, on the same images."""
    from sklearn.svm import SVC

    split = digits(seed=0, test_fraction=TEST / 1797)
    x, test_x = ((16 * part).round().long().flatten(1) for part in (split.train_x, split.test_x))
    x, y = x[:images], split.train_y[:images]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = Denoiser()
        fit(
            denoiser,
            _denoising_loss,
            (to_pixels(x),),
            epochs=epochs,
            batch_size=128,
            generator=torch.Generator().manual_seed(0),
        )
        variance = torch.stack([_error(denoiser, to_pixels(x), t) for t in range(STEPS + 1)])
        circuit, _ = fit_hclt(x, LEVELS, 16, 0, epochs=em_epochs)
    classifier = SVC().fit(x.numpy(), y.numpy())

    def classify(levels: Tensor) -> Tensor:
        return torch.as_tensor(classifier.predict(levels.numpy()))

    pixels = independent(x, LEVELS)
    return Models(denoiser, variance, circuit, pixels, classify, test_x, split.test_y)


def to_pixels(levels: Tensor) -> Tensor:
    """Levels 0 to 16 as pixels in [-1, 1]."""
    return levels / 8 - 1


def to_levels(pixels: Tensor) -> Tensor:
    """The nearest levels of pixels."""
    return (8 * (pixels + 1)).round().clamp(0, LEVELS - 1).long()


def _denoising_loss(model: nn.Module, x: Tensor) -> Tensor:
    t = torch.randint(1, STEPS + 1, (len(x),))
    share = torch.exp(-0.1 * (t / STEPS) - 9.95 * (t / STEPS) ** 2)[:, None]
    noise = torch.randn_like(x)
    return (model(share.sqrt() * x + (1 - share).sqrt() * noise, t) - noise).square().mean()


def _error(denoiser: Denoiser, x: Tensor, t: int) -> Tensor:
    if t == 0:
        return torch.zeros(PIXELS)
    return (denoiser.guess(_noisy(x, t, None), t) - x).square().mean(0)


def _noisy(x: Tensor, t: int, generator: torch.Generator | None) -> Tensor:
    share = linear_schedule(t / STEPS)
    return share**0.5 * x + (1 - share) ** 0.5 * torch.randn(x.shape, generator=generator)


Guess = Callable[[Tensor, int], Tensor]


def replacement(guess: Guess, image: Tensor, unknown: Tensor, seed: int) -> Tensor:
    """DDIM without noise of its own, the known pixels of each x_t being drawn from q(x_t | x_0)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(image.shape, generator=generator)
    for t in range(STEPS, 0, -1):
        now, before = linear_schedule(t / STEPS), linear_schedule((t - 1) / STEPS)
        x = torch.where(unknown, x, _noisy(image, t, generator))
        x_0 = guess(x, t)
        noise = (x - now**0.5 * x_0) / (1 - now) ** 0.5
        x = before**0.5 * x_0 + (1 - before) ** 0.5 * noise
    return torch.where(unknown, x, image)


def repaint(guess: Guess, image: Tensor, unknown: Tensor, seed: int, extra: int) -> Tensor:
    """DDPM with `extra` steps that are taken back and again, spread evenly over all steps."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(image.shape, generator=generator)
    for t in range(STEPS, 0, -1):
        now, before = linear_schedule(t / STEPS), linear_schedule((t - 1) / STEPS)
        beta, done = 1 - now / before, STEPS - t
        repeats = extra * (done + 1) // STEPS - extra * done // STEPS
        for again in range(repeats, -1, -1):
            x_0 = guess(x, t)
            mean = before**0.5 * beta * x_0 + (1 - beta) ** 0.5 * (1 - before) * x
            spread = ((1 - before) / (1 - now) * beta) ** 0.5
            free = mean / (1 - now) + spread * torch.randn(x.shape, generator=generator)
            x = torch.where(unknown, free, _noisy(image, t - 1, generator))
            if again:
                fresh = torch.randn(x.shape, generator=generator)
                x = (1 - beta) ** 0.5 * x + beta**0.5 * fresh
    return torch.where(unknown, x, image)
