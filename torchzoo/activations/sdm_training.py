"""Training an SDM head: q and d of the training points are those of the epoch before.

Schmaltz, "Similarity-Distance-Magnitude Universal Verification", 2025. The first epoch is one of
ordinary softmax and cross entropy. Before each later one the training points are searched among
themselves with the present weights, which gives q and d; no gradient passes through these. Of all
epochs the one is kept whose calibration points have the largest balanced median of q.
"""

from __future__ import annotations

import copy
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from torchzoo.activations.sdm import SOFTMAX_Q, sdm_loss, sdm_softmax
from torchzoo.activations.sdm_head import SDMHead
from torchzoo.trainer import fit


class SDMEpoch(NamedTuple):
    """What an epoch came to.

    Attributes:
        loss: Mean training loss.
        median_q: Mean over the classes of the median similarity of calibration points.
        balanced_accuracy: Mean over the classes of the accuracy on calibration points.
    """

    loss: float
    median_q: float
    balanced_accuracy: float


class CalibrationView(NamedTuple):
    """Points outside the training set as a head with training points sees them, `(N,)` each.

    Attributes:
        logits: `(N, C)`.
        pred: The class of the largest logit.
        nearest: Distance to the nearest training point.
        q: Similarity; 0 where the SDM output has its maximum elsewhere, as at d = 0 it may.
        d: Distance quantile.
        sdm: The SDM output, `(N, C)`.
    """

    logits: Tensor
    pred: Tensor
    nearest: Tensor
    q: Tensor
    d: Tensor
    sdm: Tensor


@torch.no_grad()
def view_calibration(head: SDMHead, e: Tensor, y: Tensor) -> CalibrationView:
    """Look at calibration points, whose distances become those that `head.distance` refers to."""
    logits, exemplars = head(e)
    pred = logits.argmax(-1)
    nearest, run = head.search(exemplars, pred)
    head.set_distances(nearest, y, run)
    d = head.quantile(nearest)
    sdm = sdm_softmax(logits, run, d)
    q = torch.where(sdm.argmax(-1) == pred, run, 0)
    return CalibrationView(logits, pred, nearest, q, d, sdm)


def train_sdm_head(
    head: SDMHead,
    train: tuple[Tensor, Tensor],
    calibration: tuple[Tensor, Tensor],
    *,
    epochs: int = 50,
    batch_size: int = 50,
    lr: float = 1e-3,
    warm_up_epochs: int = 0,
    select: Literal["median_q", "balanced_accuracy"] = "median_q",
    generator: torch.Generator | None = None,
) -> list[SDMEpoch]:
    """Train an SDM head with Adam; its training points and the distances are fitted after.

    Args:
        head: The head. It ends with the weights of the best epoch, the later one of equals.
        train: Embeddings `(N, in_features)` and labels `(N,)`.
        calibration: The same of the calibration set, which chooses the epoch.
        epochs: Number of epochs.
        batch_size: Rows a step.
        lr: Learning rate.
        warm_up_epochs: How many of the first epochs have the ordinary softmax; at least one has.
        select: What an epoch is chosen by.
        generator: Draws the order of the rows.

    Returns:
        For each epoch its loss, median q and accuracy.

    Raises:
        ValueError: No epochs, or an unknown criterion.

    Source:
        Schmaltz, "Similarity-Distance-Magnitude Universal Verification", 2025, training.

    Example:
        >>> e, y = torch.randn(40, 4), torch.arange(40) % 2
        >>> e[:, 0] += 6 * y
        >>> head = SDMHead(4, 2, exemplar_dim=8)
        >>> history = train_sdm_head(head, (e[:20], y[:20]), (e[20:], y[20:]), epochs=3)
        >>> len(history), len(head.support)
        (3, 20)
    """
    if epochs < 1:
        raise ValueError(f"epochs: expected at least 1, got {epochs}")
    if select not in SDMEpoch._fields[1:]:
        raise ValueError(f"select: expected one of {SDMEpoch._fields[1:]}, got {select!r}")
    e, y = train
    n = len(y)
    q, d = torch.full((n,), SOFTMAX_Q, device=e.device), torch.ones(n, device=e.device)
    if head.normalize:
        head.fit_normalization([train])
    history: list[SDMEpoch] = []
    best = copy.deepcopy(head.state_dict())

    def loss(model: nn.Module, e: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return sdm_loss(model(e).logits, y, q[rows], d[rows])

    @torch.no_grad()
    def end_of_epoch(epoch: int, mean_loss: float) -> None:
        output = head(e)
        nearest, run = head.remember(output, y)
        if epoch + 1 >= warm_up_epochs:
            quantile = head.quantile(nearest)
            sdm = sdm_softmax(output.logits, run, quantile)
            flipped = sdm.argmax(-1) != head.support_predictions
            q.copy_(torch.where(flipped, 0, run))
            d.copy_(quantile)
        view = view_calibration(head, *calibration)
        history.append(SDMEpoch(mean_loss, *_balanced(view, calibration[1], head.num_classes)))
        if _best(history, select) == epoch:
            best.update(copy.deepcopy(head.state_dict()))

    rows = torch.arange(n, device=e.device)
    fit(
        head,
        loss,
        (e, y, rows),
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        generator=generator,
        on_epoch=end_of_epoch,
    )
    head.load_state_dict(best)
    return history


def _best(history: list[SDMEpoch], select: str) -> int:
    """The last of the best epochs."""
    values = [getattr(epoch, select) for epoch in history]
    return len(values) - 1 - values[::-1].index(max(values))


def _balanced(view: CalibrationView, y: Tensor, num_classes: int) -> tuple[float, float]:
    """Median q and accuracy, averaged over the classes that there are."""
    medians, shares = [], []
    for c in range(num_classes):
        own = y == c
        if own.any():
            medians.append(view.q[own].double().quantile(0.5))
            shares.append((view.pred[own] == c).double().mean())
    return float(torch.stack(medians).mean()), float(torch.stack(shares).mean())
