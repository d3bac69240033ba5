"""The step of a diffusers-style scheduler, with its prediction of the original sample steered.

With a the share of the signal's variance, x_t = sqrt(a) x_0 + sqrt(1 - a) eps, and a model
predicts eps, x_0, or v = sqrt(a) eps - sqrt(1 - a) x_0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

__all__ = ["PREDICTIONS", "steered_step", "to_output", "to_x0"]

PREDICTIONS = ("epsilon", "sample", "v_prediction")


def to_x0(kind: str, output: Tensor, x_t: Tensor, share: float) -> Tensor:
    """The x_0 that a model's output stands for."""
    if kind == "sample":
        return output
    if kind == "v_prediction":
        return share**0.5 * x_t - (1 - share) ** 0.5 * output
    return (x_t - (1 - share) ** 0.5 * output) / share**0.5


def to_output(kind: str, x_0: Tensor, x_t: Tensor, share: float) -> Tensor:
    """The output that stands for x_0; the inverse of `to_x0`."""
    if kind == "sample":
        return x_0
    if kind == "v_prediction":
        return (share**0.5 * x_t - x_0) / (1 - share) ** 0.5
    return (x_t - share**0.5 * x_0) / (1 - share) ** 0.5


def steered_step(
    scheduler: Any,
    steer: Callable[[Tensor, Tensor, int, float], Tensor],
    is_steered: Callable[[int], bool],
) -> Callable[..., Any]:
    """A scheduler's step that steers x_0 before it is used.

    Args:
        scheduler: Has `alphas_cumprod`, `config.prediction_type` and `step`.
        steer: Called with x_0, x_t, the timestep and the share of the signal's variance.
        is_steered: Whether a timestep is; in others the output goes through as it is.

    Raises:
        ValueError: A type of prediction that is unknown.
    """
    kind = scheduler.config.prediction_type
    if kind not in PREDICTIONS:
        raise ValueError(
            f"scheduler: got prediction_type {kind!r}, expected one of {list(PREDICTIONS)}"
        )
    plain = scheduler.step

    @wraps(plain)
    def step(
        model_output: Tensor, timestep: int | Tensor, sample: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        at = int(timestep)
        if is_steered(at):
            share = float(scheduler.alphas_cumprod[at])
            x_0 = steer(to_x0(kind, model_output, sample, share), sample, at, share)
            model_output = to_output(kind, x_0, sample, share)
        return plain(model_output, timestep, sample, *args, **kwargs)

    return step
