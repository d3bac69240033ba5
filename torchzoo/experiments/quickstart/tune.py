"""How the learning rates were chosen: `python -m torchzoo.experiments.quickstart.tune`.

Every arm goes through the same grid, on three seeds that the quickstart does not use by default.
A third of the training images is held out; no test image is looked at.
"""

from __future__ import annotations

import statistics

import torch

from torchzoo.data.digits import DigitsSplit, digits
from torchzoo.experiments.quickstart.finetune import ARMS, CLASSES, finetune

GRID = (5e-4, 1e-3, 2e-3, 4e-3)
SEEDS = (100, 101, 102)


def held_out(data: DigitsSplit) -> DigitsSplit:
    """The training side alone, split once more; the test side is gone."""
    order = torch.randperm(len(data.train_y), generator=torch.Generator().manual_seed(0))
    cut = len(order) * 2 // 3
    kept, held = order[:cut], order[cut:]
    return DigitsSplit(
        data.train_x[kept], data.train_y[kept], data.train_x[held], data.train_y[held]
    )


def main() -> None:
    """Print the validation accuracy of each arm at each learning rate."""
    data = held_out(digits(CLASSES))
    for arm in ARMS:
        for lr in GRID:
            runs = [finetune(arm, data, seed=seed, lr=lr).accuracy[-1] for seed in SEEDS]
            error = statistics.stdev(runs) / len(runs) ** 0.5
            print(f"{arm.key:24} lr {lr:g}: {statistics.mean(runs):.3f} ± {error:.3f}", flush=True)


if __name__ == "__main__":
    main()
