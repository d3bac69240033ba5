"""How much of the work on a film can be skipped, and what that does to the predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchzoo.data.digits import DigitsSplit
from torchzoo.data.streams import moving_digits
from torchzoo.experiments.quickstart.model import ZooVisionModel
from torchzoo.experiments.quickstart.stream import StreamingClassifier, run_stream

ASKED = 0.99
"""Share of frames on which the chosen step has to give the dense model's class."""

HOLD, NOISE = 2, 0.02


@dataclass(frozen=True)
class Point:
    """What a quantisation step costs and saves.

    Attributes:
        step: Quantum of each layer, in root mean squares of its inputs; None: exact.
        skipped: Share of the multiply-accumulates that were skipped.
        skipped_by_frame: The same for each frame.
        macs: Multiply-accumulates for a frame of one film.
        dense_macs: The dense model's.
        agreement: Share of frames with the dense model's class.
        difference: Largest difference of a logit from the dense model's.
        accuracy: Share of frames with the right class.
    """

    step: float | None
    skipped: float
    skipped_by_frame: list[float]
    macs: float
    dense_macs: float
    agreement: float
    difference: float
    accuracy: float


@dataclass(frozen=True)
class Temporal:
    """The sweep over steps, and which one was chosen without the test films.

    Attributes:
        points: One for each step, on films of test digits.
        chosen: Index of the coarsest step that kept `ASKED` on films of training digits.
        dense_accuracy: The dense model's share of frames with the right class.
        film: The first film `(T, S, S)`, for pictures.
    """

    points: list[Point]
    chosen: int
    dense_accuracy: float
    film: Tensor


def measure(
    model: ZooVisionModel,
    data: DigitsSplit,
    *,
    steps: Sequence[float | None],
    films: int,
    frames: int,
    seed: int,
    on_frame: Callable[[], None] = lambda: None,
) -> Temporal:
    """Sweep quantisation steps on films of moving digits.

    Args:
        model: The trained model, on the device to run on.
        data: Digits: layers are calibrated, and the step is chosen, on films of training digits;
            all figures are of films of test digits.
        steps: Steps from fine to coarse, None (exact) first.
        films: How many films, run side by side, each with its own state.
        frames: Length of a film.
        seed: Seed of the films.
        on_frame: Called after each frame of each step, `2 * frames * len(steps)` times in all.
    """
    device = next(model.parameters()).device

    def filmed(images: Tensor, seed: int) -> Tensor:
        film = moving_digits(images, frames=frames, hold=HOLD, noise=NOISE, seed=seed)
        return film.to(device)

    tuning = filmed(data.train_x[:films], seed)
    test = filmed(data.test_x[:films], seed + 1)
    labels = data.test_y[:films].to(device)

    stream = StreamingClassifier(model)
    scales = stream.calibrate(tuning)
    chosen, points = 0, []
    dense_tuning, dense_test = _dense(model, tuning), _dense(model, test)
    for index, step in enumerate(steps):
        stream.quantise(step, scales)
        if _agreement(run_stream(stream, tuning, on_frame).logits, dense_tuning) >= ASKED:
            chosen = index
        points.append(_point(stream, step, test, dense_test, labels, on_frame))
    accuracy = _share(dense_test.argmax(-1) == labels[:, None])
    return Temporal(points, chosen, accuracy, test[0, :, 0].cpu())


def _point(
    stream: StreamingClassifier,
    step: float | None,
    films: Tensor,
    dense: Tensor,
    labels: Tensor,
    on_frame: Callable[[], None],
) -> Point:
    found = run_stream(stream, films, on_frame)
    pictures = films.shape[0] * films.shape[1]
    return Point(
        step=step,
        skipped=found.skipped,
        skipped_by_frame=found.skipped_by_frame,
        macs=sum(found.macs) / pictures,
        dense_macs=sum(found.dense_macs) / pictures,
        agreement=_agreement(found.logits, dense),
        difference=float((found.logits - dense).abs().max()),
        accuracy=_share(found.logits.argmax(-1) == labels[:, None]),
    )


@torch.no_grad()
def _dense(model: ZooVisionModel, films: Tensor) -> Tensor:
    """The model's logits `(N, T, K)` for every frame by itself."""
    return model.eval()(films.flatten(0, 1)).unflatten(0, films.shape[:2])


def _agreement(logits: Tensor, dense: Tensor) -> float:
    return _share(logits.argmax(-1) == dense.argmax(-1))


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
