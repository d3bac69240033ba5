"""The curve along which massive activations emerge in training, and its prediction.

Gallego-Feliciano, McClendon, Morinelli, Zervoudakis and Saravanos, "Hidden Dynamics of Massive
Activations in Transformer Training", 2025. With t in training steps, the ratio of a layer's largest
activation to its median follows

    f(t) = A exp(-λ x) log(x) + K,   x = γ t + t0,
    f'(t) = A γ exp(-λ x) (1/x - λ log x),   zero where λ x log x = 1:
    t_peak = (exp(W(1/λ)) - t0) / γ,   W the Lambert function,

and settles at K where λ > 0. At λ = 0 it is a logarithm, γ of which is a part of K.

Deviations: A and K, in which f is linear, are solved in closed form for each (λ, γ, t0), so that
the search is over three parameters instead of five; from several starts, and x is kept positive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Values = Tensor | Sequence[float] | Floats

# What the search allows: x at the first measurement, the factor from it to x at the last one, and
# λ times the last x.
# All starts get some evaluations; the best of them are searched to the end.
ROUGH, POLISHED = 12, 4
FIRST_X, SPAN, DECAY = (1e-3, 1e3), (1.01, 1e8), (0.0, 60.0)


class EmergenceParams(NamedTuple):
    """The five parameters of the curve, in the paper's order; `lam` is λ."""

    A: float
    lam: float
    gamma: float
    t0: float
    K: float


class Peak(NamedTuple):
    """Where the curve turns.

    Attributes:
        t: The training step; infinite where the curve never turns. Below 0 it can't be observed.
        value: The curve there.
        kind: `"maximum"` (A > 0), `"minimum"` (A < 0), or `"none"`.
    """

    t: float
    value: float
    kind: Literal["maximum", "minimum", "none"]


class Forecast(NamedTuple):
    """A curve's values and the limits between which a new measurement is expected."""

    mean: Tensor
    lower: Tensor
    upper: Tensor


@dataclass(frozen=True)
class EmergenceCurve:
    """The emergence curve with given or fitted parameters.

    It unpacks as `params, r2, covariance`.

    Args:
        params: The five parameters.
        r2: Share of the variance that a fit explains.
        covariance: Of the fitted parameters, `(5, 5)`; large along directions that the
            measurements leave open, so compare curves rather than parameters.
        noise: Standard deviation of the measurements around a fit.
        measured: First and last step, and number of measurements.

    Raises:
        ValueError: λ < 0 or γ ≤ 0.

    Source:
        Gallego-Feliciano, McClendon, Morinelli, Zervoudakis and Saravanos, "Hidden Dynamics of
        Massive Activations in Transformer Training", 2025.

    Example:
        >>> curve = EmergenceCurve(EmergenceParams(A=50, lam=0.3, gamma=0.02, t0=1.1, K=20))
        >>> curve.peak().kind, round(curve.peak().t, 4), round(curve.peak().value, 4)
        ('maximum', 95.8921, 42.3338)
        >>> t = torch.arange(0, 1000, 25)
        >>> fitted, r2, covariance = EmergenceCurve.fit(t, curve.predict(t))
        >>> r2 > 0.9999
        True
    """

    params: EmergenceParams
    r2: float = math.nan
    covariance: Tensor | None = None
    noise: float = math.nan
    measured: tuple[float, float, int] = (0.0, math.inf, 0)

    def __post_init__(self) -> None:
        if not self.params.lam >= 0:
            raise ValueError(f"params: expected lam ≥ 0, got {self.params.lam}")
        if not self.params.gamma > 0:
            raise ValueError(f"params: expected gamma > 0, got {self.params.gamma}")

    def __iter__(self) -> Any:
        return iter((self.params, self.r2, self.covariance))

    @classmethod
    def fit(
        cls, t: Values, r: Values, *, restarts: int = 32, log_time: bool = True
    ) -> EmergenceCurve:
        """Fit the curve to measured ratios by bounded least squares.

        Args:
            t: Training steps, increasing, `(n,)`.
            r: Ratios, `(n,)`.
            restarts: How many starts the search is made from; they are the same on every call.
            log_time: Spread the time scales of the starts evenly over log t; False: over t.

        Returns:
            The best curve.

        Raises:
            ValueError: Lengths differ, fewer than 6 points, `t` does not increase, a value is not
                finite, or `restarts` < 1.
        """
        times, ratios = _checked(t, r)
        if restarts < 1:
            raise ValueError(f"restarts: expected at least 1, got {restarts}")
        params = _search(times, ratios, restarts, log_time)
        residuals = ratios - _curve(params, times)
        squares, n = float(residuals @ residuals), len(times)
        centred = ratios - ratios.mean()
        total = float(centred @ centred)
        variance = squares / max(n - 5, 1)
        slopes = _slopes(params, times)
        # Columns differ by many orders of magnitude; scaled, only truly open directions are small.
        scale = np.linalg.norm(slopes, axis=0)
        scale[scale == 0] = 1.0
        inner = np.linalg.pinv((slopes / scale).T @ (slopes / scale), rcond=1e-14)
        return cls(
            params,
            1 - squares / total if total else float(squares == 0),
            torch.from_numpy(variance * inner / np.outer(scale, scale)),
            math.sqrt(variance),
            (float(times[0]), float(times[-1]), n),
        )

    def predict(self, t: Values) -> Tensor:
        """The curve at training steps `t`, float64 of the shape of `t`; NaN where x is not > 0."""
        return torch.from_numpy(np.asarray(_curve(self.params, _floats(t))))

    def derivative(self, t: Values) -> Tensor:
        """The slope of the curve at training steps `t`, float64 of the shape of `t`."""
        a, lam, gamma, t0, _ = self.params
        with np.errstate(invalid="ignore", divide="ignore"):
            x = gamma * _floats(t) + t0
            slope = a * gamma * np.exp(-lam * x) * (1 / x - lam * np.log(x))
        return torch.from_numpy(np.asarray(slope))

    def peak(self) -> Peak:
        """Where the curve has its maximum (A > 0) or minimum (A < 0)."""
        from scipy.special import lambertw

        a, lam, gamma, t0, k = self.params
        if a == 0:
            return Peak(math.inf, k, "none")
        if lam == 0 or math.isinf(1 / lam):
            return Peak(math.inf, math.copysign(math.inf, a), "none")
        x = 1 / (lam * float(lambertw(1 / lam).real))
        value = a * math.exp(-lam * x) * math.log(x) + k
        return Peak((x - t0) / gamma, value, "maximum" if a > 0 else "minimum")

    @property
    def limit(self) -> float:
        """The steady state: K for λ > 0, else infinite with the sign of A."""
        steady = self.params.lam > 0 or self.params.A == 0
        return self.params.K if steady else math.copysign(math.inf, self.params.A)

    @property
    def regime(self) -> Literal["early peak", "log increase", "decrease"]:
        """How the curve runs over the steps measured.

        It has its maximum among them, or else it ends higher, or lower, than it begins.
        """
        first, last, _ = self.measured
        peak = self.peak()
        if peak.kind == "maximum" and max(first, 0.0) < peak.t < last:
            return "early peak"
        rises = self.params.A > 0 if math.isinf(last) else _rises(self.params, first, last)
        return "log increase" if rises else "decrease"

    def forecast(self, t: Values, level: float = 0.9) -> Forecast:
        """The curve at steps to come, with the interval for a measurement there.

        The interval is that of the curve linearised in its parameters, and takes the curve to be
        right.

        Raises:
            ValueError: `level` is not in (0, 1), or the curve was not fitted.
        """
        if not 0 < level < 1:
            raise ValueError(f"level: expected a number in (0, 1), got {level}")
        if self.covariance is None:
            raise ValueError("forecast: expected a fitted curve, got parameters alone")
        from scipy.stats import t as student

        times = _floats(t)
        slopes = _slopes(self.params, times)
        curve_variance = np.einsum("...i,ij,...j->...", slopes, self.covariance.numpy(), slopes)
        dof = max(self.measured[2] - 5, 1)
        width = student.ppf((1 + level) / 2, dof) * np.sqrt(curve_variance + self.noise**2)
        mean = _curve(self.params, times)
        return Forecast(
            *(torch.from_numpy(np.asarray(v)) for v in (mean, mean - width, mean + width))
        )


def solve_linear(t: Values, r: Values, lam: float, gamma: float, t0: float) -> tuple[float, float]:
    """The A and K of least squares for given λ, γ and t0.

    Example:
        >>> a, k = solve_linear([0.0, 1.0, 3.0], [5.0, 7.0, 9.0], 0.0, 1.0, 1.0)
        >>> round(a * math.log(2), 6), round(k, 6)
        (2.0, 5.0)
    """
    x = gamma * _floats(t) + t0
    a, k, _ = _project(x, lam, _floats(r))
    return a, k


def _project(x: Floats, lam: float, r: Floats) -> tuple[float, float, Floats]:
    """A, K and residuals; the basis is scaled by exp(λ x_0) to keep it from underflow."""
    basis = np.exp(-lam * (x - x[0])) * np.log(x)
    centred = basis - basis.mean()
    power = float(centred @ centred)
    amplitude = float(centred @ r) / power if power > 0 else 0.0
    offset = float(r.mean() - amplitude * basis.mean())
    return amplitude * math.exp(lam * x[0]), offset, amplitude * basis + offset - r


def _search(t: Floats, r: Floats, restarts: int, log_time: bool) -> EmergenceParams:
    """Variable projection over u = (log x_first, log(x_last / x_first), λ x_last)."""
    from scipy.optimize import least_squares
    from scipy.stats import qmc

    since, span = t - t[0], float(t[-1] - t[0])

    def unpack(u: Floats) -> tuple[float, float, Floats]:
        first = math.exp(u[0])
        gamma = first * math.expm1(u[1]) / span
        return u[2] / (first + gamma * span), gamma, first + gamma * since

    def residuals(u: Floats) -> Floats:
        lam, _, x = unpack(u)
        return _project(x, lam, r)[2] / scale

    scale = float(np.std(r)) or 1.0
    low = np.array([math.log(FIRST_X[0]), math.log(SPAN[0]), DECAY[0]])
    high = np.array([math.log(FIRST_X[1]), math.log(SPAN[1]), DECAY[1]])
    starts = qmc.Sobol(3, seed=0).random(1 << (restarts - 1).bit_length())[:restarts]
    starts[:, 0] = low[0] + starts[:, 0] * (high[0] - low[0])
    if log_time:
        starts[:, 1] = low[1] + starts[:, 1] * (high[1] - low[1])
        starts[:, 2] = DECAY[1] ** (2 * starts[:, 2] - 1)
    else:
        starts[:, 1] = np.log(SPAN[0] + starts[:, 1] * (SPAN[1] - SPAN[0]))
        starts[:, 2] *= DECAY[1]
    starts[0, 2] = 0.0  # the pure logarithm is always tried
    rough = [least_squares(residuals, u, bounds=(low, high), max_nfev=ROUGH) for u in starts]
    rough.sort(key=lambda one: one.cost)
    found = [least_squares(residuals, one.x, bounds=(low, high)) for one in rough[:POLISHED]]
    lam, gamma, x = unpack(min(found, key=lambda one: one.cost).x)
    a, k, _ = _project(x, lam, r)
    return EmergenceParams(a, lam, gamma, float(x[0] - gamma * t[0]), k)


def _curve(params: EmergenceParams, t: Floats) -> Floats:
    a, lam, gamma, t0, k = params
    with np.errstate(invalid="ignore", divide="ignore"):
        x = gamma * t + t0
        return np.where(x > 0, a * np.exp(-lam * x) * np.log(x) + k, np.nan)


def _slopes(params: EmergenceParams, t: Floats) -> Floats:
    """Derivatives of the curve by its five parameters, in the last axis."""
    a, lam, gamma, t0, _ = params
    x = gamma * t + t0
    decay, log = np.exp(-lam * x), np.log(x)
    by_x = a * decay * (1 / x - lam * log)
    return np.stack([decay * log, -a * x * decay * log, by_x * t, by_x, np.ones_like(x)], -1)


def _rises(params: EmergenceParams, first: float, last: float) -> bool:
    start, end = _curve(params, np.array([first, last]))
    return bool(end > start)


def _floats(values: Values) -> Floats:
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def _checked(t: Values, r: Values) -> tuple[Floats, Floats]:
    times, ratios = _floats(t), _floats(r)
    if times.ndim != 1 or times.shape != ratios.shape:
        raise ValueError(f"t, r: expected one length (n,), got {times.shape} and {ratios.shape}")
    if len(times) < 6:
        raise ValueError(f"t: expected at least 6 points for 5 parameters, got {len(times)}")
    if not (np.diff(times) > 0).all():
        raise ValueError("t: expected increasing steps")
    for name, values in (("t", times), ("r", ratios)):
        if not np.isfinite(values).all():
            raise ValueError(
                f"{name}: expected finite numbers, got {values[~np.isfinite(values)][0]}"
            )
    return times, ratios
