"""1,797 real 8×8 images of handwritten digits, as scikit-learn ships them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class DigitsSplit(NamedTuple):
    """Images in [0, 1] of shape (N, 1, 8, 8), float32, and int64 labels, for training and test."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits(
    classes: Sequence[int] | None = None, *, seed: int = 0, test_fraction: float = 0.25
) -> DigitsSplit:
    """Handwritten digits, split at random with the same share of each class on both sides.

    Args:
        classes: The digits to keep; a label is the digit's place in this sequence. None keeps
            all ten, labelled by themselves.
        seed: Seed of the split.
        test_fraction: Share of the images that goes to the test side.

    Shape:
        - train_x, test_x: `(N, 1, 8, 8)`
        - train_y, test_y: `(N,)`

    Raises:
        ValueError: `classes` is empty, repeats a digit or holds something that is none, or
            `test_fraction` is outside (0, 1).

    Source:
        E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
        Repository, 1998: the part that scikit-learn ships.

    Example:
        >>> data = digits(classes=(3, 8))
        >>> tuple(data.train_x.shape[1:]), data.test_y.unique().tolist()
        ((1, 8, 8), [0, 1])
    """
    kept = list(range(10) if classes is None else classes)
    if not kept or len(set(kept)) < len(kept) or not set(kept) <= set(range(10)):
        raise ValueError(f"classes: expected distinct digits from 0 to 9, got {classes!r}")
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction: expected a number in (0, 1), got {test_fraction!r}")

    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    rows, labels = (torch.as_tensor(bunch.target)[:, None] == torch.tensor(kept)).nonzero().T
    images = torch.as_tensor(bunch.images, dtype=torch.float32)[rows, None] / 16  # 17 grey levels
    train, test = (
        torch.as_tensor(part)
        for part in train_test_split(
            range(len(rows)), test_size=test_fraction, random_state=seed, stratify=labels
        )
    )
    return DigitsSplit(images[train], labels[train], images[test], labels[test])
