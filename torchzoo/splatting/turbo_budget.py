"""How many splats a scene may have by now, from the way its loss falls.

After a start-up phase the logarithm of the loss is nearly a line in that of the step: it falls like
`t^-a`. The allowance grows along a power of the progress whose exponent is higher where the loss
has of late fallen more slowly than before, so that splats come later.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["ConvergenceBudget"]

WARM_UP, WARM_UP_SHARE, RECENT_SHARE = 100, 10, 0.2
"""The first 100 steps, or a tenth if that is less, don't count; the last fifth is recent."""

SPAN = 100.0
"""The progress is counted from 1 to this."""


class ConvergenceBudget:
    """A number of splats that grows from `n0` to `cap`, later where the loss has slowed down.

        B(t) = n0 + (t^alpha - 1) / (100^alpha - 1) · (cap - n0),   t = 1 + 99 progress
        alpha = alpha_base + lam tanh(eps),   eps = (a - a_recent) / max(abs(a), 0.001)

    Both exponents are slopes of least squares through the smoothed logarithms of losses and steps.
    The two are smoothed alike, so that a power law stays one. What was allowed once is never taken
    back.

    Args:
        n0: Splats at first.
        cap: Splats in the end.
        alpha_base: Exponent while the loss goes on as it did; 1 is a straight line.
        lam: By how much the exponent is changed at most; 0 leaves the loss out.
        ema: Share of the old in the running means of the logarithms.

    Raises:
        ValueError: A negative `n0`, a `cap` below it, a `lam` that is negative or not below
            `alpha_base`, an `ema` not between 0 and 1.

    Source:
        Lu et al., "Turbo-GS: Accelerating 3D Gaussian Fitting for High-Quality Radiance Fields",
        2024 (arXiv 2412.13547). How the exponents are fitted is ours.

    Example:
        >>> budget = ConvergenceBudget(1000, 5000)
        >>> for step in range(1, 201):
        ...     budget.update(step, step**-0.5)
        >>> budget.exponents()
        (0.5, 0.5)
        >>> [budget.allowed(progress) for progress in (0.0, 0.5, 1.0)]
        [1000, 3000, 5000]
    """

    def __init__(
        self, n0: int, cap: int, *, alpha_base: float = 1.0, lam: float = 0.5, ema: float = 0.98
    ) -> None:
        if n0 < 0:
            raise ValueError(f"n0: got {n0}, expected at least 0")
        if cap < n0:
            raise ValueError(f"cap: got {cap}, expected at least n0 = {n0}")
        if not 0 <= lam < alpha_base:
            raise ValueError(f"lam: got {lam}, expected from 0 to below alpha_base = {alpha_base}")
        if not 0 <= ema < 1:
            raise ValueError(f"ema: got {ema}, expected from 0 to below 1")
        self.n0, self.cap = n0, cap
        self.alpha_base, self.lam, self.ema = alpha_base, lam, ema
        self.reset()

    def reset(self) -> None:
        """Forget all losses, and what was allowed."""
        self._means = (0.0, 0.0, 0.0)  # of ln step, ln loss and 1, from which the bias is known
        self._path: list[tuple[float, float]] = []
        self._granted: list[tuple[float, int]] = []

    def update(self, step: int, loss: float) -> None:
        """Take note of a step's loss; one that has no logarithm is left out, with a warning.

        Args:
            step: 1 for the first step.
            loss: The loss.

        Raises:
            ValueError: `step` is below 1.
        """
        if step < 1:
            raise ValueError(f"step: got {step}, expected at least 1")
        if not (math.isfinite(loss) and loss > 0):
            warnings.warn(f"the loss {loss} of step {step} is left out", stacklevel=2)
            return
        new = (math.log(step), math.log(loss), 1.0)
        kept = self.ema
        times, losses, weight = (
            kept * mean + (1 - kept) * value for mean, value in zip(self._means, new, strict=True)
        )
        self._means = (times, losses, weight)
        self._path.append((times / weight, losses / weight))

    def exponents(self) -> tuple[float, float]:
        """How fast the loss falls: a of `t^-a` since the warm-up, and in the last fifth of that.

        Both are 0 as long as there are too few steps to tell.
        """
        since = self._path[min(WARM_UP, len(self._path) // WARM_UP_SHARE) :]
        recent = math.ceil(RECENT_SHARE * len(since))
        if recent < 2:
            return 0.0, 0.0
        points = torch.tensor(since, dtype=torch.float64)
        return _decay(points), _decay(points[-recent:])

    @property
    def alpha(self) -> float:
        """The exponent of the growth."""
        long, recent = self.exponents()
        return self.alpha_base + self.lam * math.tanh((long - recent) / max(abs(long), 1e-3))

    def allowed(self, progress: float) -> int:
        """How many splats there may be; at least what was allowed at this progress or before.

        Args:
            progress: From 0, where that is `n0`, to 1, where it is `cap`.

        Raises:
            ValueError: `progress` is not from 0 to 1.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress: got {progress}, expected from 0 to 1")
        alpha = self.alpha
        share = ((1 + (SPAN - 1) * progress) ** alpha - 1) / (SPAN**alpha - 1)
        before = [count for when, count in self._granted if when <= progress]
        count = max(round(self.n0 + share * (self.cap - self.n0)), *before, self.n0)
        self._granted.append((progress, count))
        return count

    def state_dict(self) -> dict[str, Tensor]:
        """All that was noted."""
        parts = {"means": self._means, "path": self._path, "granted": self._granted}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in parts.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        times, losses, weight = state["means"].tolist()
        self._means = (times, losses, weight)
        self._path = [(time, loss) for time, loss in state["path"].tolist()]
        self._granted = [(when, int(count)) for when, count in state["granted"].tolist()]

    def __repr__(self) -> str:
        return (
            f"ConvergenceBudget({self.n0}, {self.cap}, alpha_base={self.alpha_base}, "
            f"lam={self.lam}, ema={self.ema})"
        )


def _decay(points: Tensor) -> float:
    """Minus the slope of the line of least squares through points `(n, 2)`."""
    x, y = (points - points.mean(0)).unbind(-1)
    spread = x.dot(x)
    return (-x.dot(y) / spread).item() if spread > 0 else 0.0
