"""Makes the shipped circuits: `python -m torchzoo.experiments.circuits.pretrain`.

Three hidden tree models: of digits, of residuals of photographs, and of English text by its bytes,
the last two with the same leaves everywhere. The recipes run on one thread, so that the same torch
and operators on the same kind of processor give the same bytes again. The shipped ones were made
with the reference operators.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchzoo import hub
from torchzoo.circuits import (
    CategoricalLeaf,
    Circuit,
    CircuitCodec,
    chow_liu_tree,
    em_fit,
    hclt,
    init_from_data,
)
from torchzoo.circuits.archive import BYTE_MODEL, IMAGE_MODEL
from torchzoo.circuits.residuals import SIDE, to_patches, to_residuals
from torchzoo.data.photographs import PHOTOGRAPHS, photograph
from torchzoo.data.topics import topics
from torchzoo.experiments.circuits.compression import LEVELS, digit_levels, fit_hclt

COMMAND = "python -m torchzoo.experiments.circuits.pretrain"
DIGIT_MODEL = "digits-hclt"
WINDOW = 64
"""Bytes of a window of text."""


class Recipe(NamedTuple):
    """A circuit's training: what makes it and its test set, and what it is trained on in words."""

    fit: Callable[[int], tuple[Circuit, Tensor]]
    data: str


def fit_digits(seed: int) -> tuple[Circuit, Tensor]:
    """A hidden Chow-Liu tree of 1,300 digits, by 30 full steps."""
    train, test = digit_levels(seed)
    circuit, _ = fit_hclt(train, LEVELS, 16, seed, epochs=30)
    return circuit, test


def photo_patches() -> tuple[Tensor, Tensor]:
    """Patches of residuals `(N, 64)`: left halves, at two offsets and mirrored; right halves."""
    train, test = [], []
    for name in PHOTOGRAPHS:
        pixels = (255 * photograph(name)).round().to(torch.uint8)[:424]
        left, right = pixels.chunk(2, 1)
        for view in (left, left.flip(1)):
            for at in (0, SIDE // 2):
                train.append(_whole_patches(view[at:, at:]))
        test.append(_whole_patches(right))
    return torch.cat(train), torch.cat(test)


def _whole_patches(pixels: Tensor) -> Tensor:
    height, width = (size // SIDE * SIDE for size in pixels.shape[:2])
    return to_patches(to_residuals(pixels[:height, :width])).long()


def fit_photographs(seed: int, *, units: int = 32, epochs: int = 6) -> tuple[Circuit, Tensor]:
    """A hidden tree over signs and magnitudes' dependence, by mini-batch EM."""
    train, test = photo_patches()
    generator = torch.Generator().manual_seed(seed)
    signed = (train + 128) % 256 - 128
    magnitude = signed.sign() * (1 + signed.abs()).log2().floor().long()
    tree = chow_liu_tree(magnitude + 8, num_categories=17)
    circuit = Circuit(hclt(tree), CategoricalLeaf(256), num_units=units, tie="leaves")
    init_from_data(circuit, train, generator=generator)
    marginal = train.flatten().bincount(minlength=256) / train.numel()
    em_fit(
        circuit,
        train,
        epochs=epochs,
        batch_size=512,
        step_size=(0.5, 0.02),
        pseudocount=0.05,
        leaf_pseudocount=(marginal + 0.001).expand(SIDE**2, -1),
        generator=generator,
    )
    return circuit, test


def text_windows() -> tuple[Tensor, Tensor]:
    """Windows of the bytes of Python's language reference, `(N, 64)`, to train on and to test."""
    text = topics()
    sides = []
    for side in (text.train, text.validation):
        encoded = torch.tensor(list(text.decode(side).encode()))
        sides.append(encoded[: len(encoded) // WINDOW * WINDOW].view(-1, WINDOW))
    return sides[0], sides[1]


def fit_text(seed: int, *, units: int = 64, epochs: int = 6) -> tuple[Circuit, Tensor]:
    """A hidden Markov model with the same weights at every place, by mini-batch EM."""
    train, test = text_windows()
    generator = torch.Generator().manual_seed(seed)
    chain = hclt(list(range(-1, WINDOW - 1)))
    circuit = Circuit(chain, CategoricalLeaf(256), num_units=units, tie="all")
    init_from_data(circuit, train, generator=generator)
    em_fit(
        circuit,
        train,
        epochs=epochs,
        batch_size=128,
        step_size=(0.7, 0.05),
        pseudocount=0.01,
        leaf_pseudocount=0.01,
        generator=generator,
    )
    return circuit, test


RECIPES = {
    DIGIT_MODEL: Recipe(fit_digits, "1,300 of scikit-learn's digits, in 17 levels"),
    IMAGE_MODEL: Recipe(
        fit_photographs,
        "residuals of the left halves of scikit-learn's photographs; tested on the right halves",
    ),
    BYTE_MODEL: Recipe(fit_text, "pydoc_data.topics, nine of ten; tested on the others"),
}
"""How each shipped circuit is made."""


def main(names: list[str], seed: int = 0) -> None:
    """Train and ship circuits, and print what they reach."""
    torch.set_num_threads(1)
    for name in names or RECIPES:
        torch.manual_seed(seed)
        circuit, test = RECIPES[name].fit(seed)
        bits = CircuitCodec(circuit, precision=20, block_size=1024).bits_per_dim(test)
        reached = {"test_bits_per_dim": round(bits, 4)}
        folder = hub.ship(
            name,
            circuit,
            data=RECIPES[name].data,
            metric=reached,
            seed=seed,
            command=f"{COMMAND} {name}" + (f" --seed {seed}" if seed else ""),
        )
        print(f"{folder}: {reached}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog=COMMAND, description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    main(given.names, given.seed)
