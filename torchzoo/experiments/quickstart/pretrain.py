"""Makes the shipped weights: `python -m torchzoo.experiments.quickstart.pretrain`.

Both models learn the digits 0 to 4 from the training images of a fixed split, by the same recipe.
The recipe runs on one thread, so that the same torch and operators on the same kind of processor
give the same bytes again. The shipped ones were made with the reference operators.
"""

from __future__ import annotations

import argparse

import torch

from torchzoo import hub
from torchzoo.data.digits import DigitsSplit, digits
from torchzoo.experiments.quickstart.baseline import TransformerModel
from torchzoo.experiments.quickstart.model import ZooVisionModel
from torchzoo.experiments.quickstart.training import Recipe, score, train

CLASSES = range(5)
RECIPE = Recipe(epochs=100, batch_size=64, lr=1e-3)
COMMAND = "python -m torchzoo.experiments.quickstart.pretrain"
SHIPPED = {"digits-0-4": ZooVisionModel, "digits-0-4-transformer": TransformerModel}
"""The model behind each shipped name."""


def pretrain(
    name: str, data: DigitsSplit, recipe: Recipe = RECIPE, *, seed: int = 0
) -> ZooVisionModel | TransformerModel:
    """Train the model of a shipped name from scratch.

    Args:
        name: A key of `SHIPPED`.
        data: The digits; only the training images are used.
        recipe: How long and how fast.
        seed: Seed of the initial weights, of the order and of the places of the images.
    """
    torch.manual_seed(seed)
    model: ZooVisionModel | TransformerModel
    if SHIPPED[name] is ZooVisionModel:
        steps = recipe.steps(len(data.train_x))
        model = ZooVisionModel(len(CLASSES), anneal_steps=steps)
    else:
        model = TransformerModel(len(CLASSES))
    train(model, data.train_x, data.train_y, recipe, seed=seed)
    return model


def main(seed: int = 0) -> None:
    """Train and ship both models, and print what they reach."""
    torch.set_num_threads(1)
    data = digits(CLASSES)
    for name in SHIPPED:
        model = pretrain(name, data, seed=seed)
        reached = {
            "train_accuracy": round(score(model, data.train_x, data.train_y), 4),
            "test_accuracy": round(score(model, data.test_x, data.test_y), 4),
        }
        folder = hub.ship(
            name,
            model,
            data="digits 0 to 4 of scikit-learn's digits, training side of digits(range(5))",
            metric=reached,
            seed=seed,
            command=f"{COMMAND} --seed {seed}" if seed else COMMAND,
        )
        print(f"{folder}: {reached}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog=COMMAND, description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args().seed)
