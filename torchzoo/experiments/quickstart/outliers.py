"""Which pictures are no digits: a circuit's likelihood against a classifier's confidence.

A circuit knows the probability of a whole picture, and was trained without labels: a picture is
scored by the bits a pixel that it takes, -log2 p(x) / D, and one that takes many is flagged. The
usual score is a classifier's largest softmax probability, which is low where the classifier
hesitates. Both have seen the same training images. With scores s, high for digits, the area under
the ROC curve and its variance (DeLong) come from the placements,

    A = mean_ij w_ij,   w_ij = 1[s_i > s_j] + 1[s_i = s_j] / 2,   i digits, j other pictures
    var A = var_i(mean_j w_ij) / I + var_j(mean_i w_ij) / J

and the difference of two areas has the variance of the differences of its placements.

Sources: Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution
Examples in Neural Networks", 2017; DeLong et al., "Comparing the Areas under Two or More Correlated
Receiver Operating Characteristic Curves", 1988.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchzoo.circuits import Circuit
from torchzoo.data.digits import DigitsSplit, digits
from torchzoo.experiments.circuits.compression import LEVELS, SIDE, TEST, grey_patches
from torchzoo.experiments.quickstart.model import ZooVisionModel
from torchzoo.experiments.quickstart.training import Recipe, objective
from torchzoo.hub import manifest
from torchzoo.trainer import accuracy, fit

WEIGHTS = "digits-hclt"
"""The shipped circuit."""

RECIPE = Recipe(epochs=8, batch_size=128, lr=4e-3)
KEPT = 0.95
"""Share of the digits that score above the threshold."""


class Area(NamedTuple):
    """Area under a ROC curve, or a difference of areas, and its standard error."""

    number: float
    std_error: float


@dataclass(frozen=True)
class Pictures:
    """Pictures of one kind and their scores.

    Attributes:
        name: What they are.
        levels: `(N, 64)`, grey levels 0 to 16.
        bits: `(N,)`, bits a pixel under the circuit; few for digits.
        confidence: `(N,)`, the classifier's largest log-probability; high for digits.
    """

    name: str
    levels: Tensor
    bits: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class Outliers:
    """What was scored.

    Attributes:
        digits: Test digits.
        others: The other kinds.
        accuracy: The classifier's share of right classes, on all test digits.
    """

    digits: Pictures
    others: list[Pictures]
    accuracy: float

    def areas(self, kind: Pictures) -> tuple[Area, Area, Area]:
        """Of the circuit and of the classifier against a kind, and their difference."""
        circuit = placements(-self.digits.bits, -kind.bits)
        classifier = placements(self.digits.confidence, kind.confidence)
        return (
            area(*circuit),
            area(*classifier),
            area(circuit[0] - classifier[0], circuit[1] - classifier[1]),
        )

    def to_json(self) -> dict[str, Any]:
        """Every score, and the shares that are flagged."""
        kinds = [self.digits, *self.others]
        flagged = {kind.name: self.flagged(kind) for kind in kinds}
        return {
            "threshold_bits": self.threshold,
            "classifier_accuracy": self.accuracy,
            "kinds": {
                kind.name: {
                    "bits_per_pixel": kind.bits.tolist(),
                    "largest_log_probability": kind.confidence.tolist(),
                    "flagged": {
                        "circuit": flagged[kind.name][0],
                        "classifier": flagged[kind.name][1],
                    },
                }
                for kind in kinds
            },
        }

    @property
    def threshold(self) -> float:
        """Bits a pixel that the share `KEPT` of the digits stays below."""
        return float(self.digits.bits.quantile(KEPT))

    def flagged(self, kind: Pictures) -> tuple[float, float]:
        """Shares of a kind that circuit and classifier flag, each keeping `KEPT` of the digits."""
        unsure = kind.confidence < self.digits.confidence.quantile(1 - KEPT)
        return _share(kind.bits > self.threshold), _share(unsure)


def placements(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """For each score the share of the other side that it is on the right side of; ties half.

    Example:
        >>> [side.tolist() for side in placements(torch.tensor([3, 1]), torch.tensor([1, 0]))]
        [[1.0, 0.75], [0.75, 1.0]]
    """
    higher, tied = inside[:, None] > outside, inside[:, None] == outside
    wins = higher.double() + tied.double() / 2
    return wins.mean(1), wins.mean(0)


def area(inside: Tensor, outside: Tensor) -> Area:
    """The area, or difference of areas, of placements `(I,)` and `(J,)`."""
    variance = inside.var() / len(inside) + outside.var() / len(outside)
    return Area(float(inside.mean()), float(variance.sqrt()))


def other_pictures(test: Tensor, *, seed: int) -> dict[str, Tensor]:
    """As many pictures of each kind as digits `(N, 64)` are given to turn and shuffle."""
    generator = torch.Generator().manual_seed(seed)
    grey = torch.cat(grey_patches())
    chosen = grey[torch.randperm(len(grey), generator=generator)[: len(test)]]
    square = test.unflatten(1, (SIDE, SIDE))
    order = torch.rand(len(test), SIDE, generator=generator).argsort(1)
    shuffled = square.gather(1, order[..., None].expand_as(square))
    return {
        "patches of photographs": (chosen * (LEVELS - 1) / 255).round().long(),
        "digits, rows shuffled": shuffled.flatten(1),
        "digits, a quarter turned": square.rot90(dims=(1, 2)).flatten(1),
    }


def measure(
    circuit: Circuit,
    *,
    seed: int,
    epochs: int = RECIPE.epochs,
    on_epoch: Callable[[], None] = lambda: None,
) -> Outliers:
    """Score test digits and other pictures with a circuit and with a classifier.

    Half of the test digits are left as they are, the others are turned and shuffled.

    Args:
        circuit: The shipped circuit, on the device to run on.
        seed: Seed of the classifier and of the other pictures.
        epochs: Epochs that the classifier is trained for.
        on_epoch: Called after each of them.
    """
    device = next(circuit.parameters()).device
    split = DigitsSplit(*(part.to(device) for part in _split()))
    model = _classifier(split, seed, epochs, on_epoch)
    levels = (split.test_x * (LEVELS - 1)).round().long().flatten(1)

    @torch.no_grad()
    def scored(name: str, levels: Tensor) -> Pictures:
        levels = levels.to(device)
        images = levels.float().view(-1, 1, SIDE, SIDE) / (LEVELS - 1)
        bits = -circuit.log_prob(levels).double() / (SIDE**2 * math.log(2))
        confidence = model(images).double().log_softmax(-1).amax(-1)
        return Pictures(name, levels.cpu(), bits.cpu(), confidence.cpu())

    kinds = other_pictures(levels[1::2].cpu(), seed=seed)
    return Outliers(
        digits=scored("digits", levels[::2]),
        others=[scored(name, pictures) for name, pictures in kinds.items()],
        accuracy=accuracy(model, split.test_x, split.test_y),
    )


def _split() -> DigitsSplit:
    """All ten digits, on the sides that the circuit was trained and tested on."""
    return digits(seed=manifest()[WEIGHTS]["seed"], test_fraction=TEST / 1797)


def _classifier(
    data: DigitsSplit, seed: int, epochs: int, on_epoch: Callable[[], None]
) -> ZooVisionModel:
    """The quickstart's model, for ten classes and pictures of 8 x 8, trained from scratch."""
    recipe = Recipe(epochs, RECIPE.batch_size, RECIPE.lr)
    torch.manual_seed(seed)
    steps = recipe.steps(len(data.train_x))
    model = ZooVisionModel(10, image_size=SIDE, patch_size=4, num_heads=1, anneal_steps=steps)
    fit(
        model.to(data.train_x.device),
        objective,
        (data.train_x, data.train_y),
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        generator=torch.Generator().manual_seed(seed),
        on_step=model.anneal,
        on_epoch=lambda epoch, loss: on_epoch(),
    )
    return model


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
