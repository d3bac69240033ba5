"""How the share of active neurons changes with training data: two laws, their fit and their limit.

Luo et al., "Sparsing law: towards large language models with greater activation sparsity", 2024.
After D tokens the activation ratio at a fixed loss of perplexity is

    relu:  A(D) = exp(−c D^α + b) + A0,  falling       silu:  A(D) = A0 − c D^(−α),  rising.

Deviations: the fit solves for what a law is linear in (e^b and A0; c and A0) by least squares with
no negative coefficient, and searches for the rest only, from many starts; the paper fits all by
Levenberg and Marquardt's method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor

# alpha, b, c, A0 for D in billions of tokens
_PUBLISHED = {
    "0.1b_relu": (0.101, -0.0151, 3.20, 0.0614),
    "0.2b_relu": (0.449, -3.05, 0.286, 0.0674),
    "0.4b_relu": (0.683, -3.46, 0.0790, 0.0690),
    "0.8b_relu": (1.01, -3.49, 7.97e-3, 0.0721),
    "1.2b_relu": (1.33, -3.89, 9.03e-4, 0.0782),
    "2.4b_relu": (2.11, -3.82, 9.04e-6, 0.0712),
    "0.1b_silu": (0.479, 0.0, 0.102, 0.409),
    "0.2b_silu": (0.844, 0.0, 0.208, 0.390),
    "0.4b_silu": (1.03, 0.0, 0.420, 0.385),
    "0.8b_silu": (0.995, 0.0, 0.562, 0.383),
    "1.2b_silu": (0.967, 0.0, 0.538, 0.382),
}
_ALPHAS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.2, 2.0, 3.0)
_RATES = (0.03, 0.3, 1.0, 3.0, 10.0)  # c D^α at the last point


class SparsingLaw:
    """The law of the activation ratio against training tokens.

    Args:
        kind: `"relu"`: a falling law, for activations that are zero; `"silu"`: a rising one.

    Attributes:
        alpha, b, c, a0: The coefficients; NaN before a fit, b is 0 for silu.

    Raises:
        ValueError: Another kind.

    Source:
        Luo et al., "Sparsing law: towards large language models with greater activation sparsity",
        2024.

    Example:
        >>> law = SparsingLaw.published("0.1b_relu")
        >>> [round(a, 4) for a in law.predict([3.0, 100.0]).tolist()], law.limit
        ([0.089, 0.0674], 0.0614)
    """

    def __init__(self, kind: Literal["relu", "silu"] = "relu"):
        if kind not in ("relu", "silu"):
            raise ValueError(f"kind: expected relu or silu, got {kind!r}")
        self.kind = kind
        self.alpha = self.b = self.c = self.a0 = float("nan")

    @classmethod
    def published(cls, name: str) -> Self:
        """A law of the paper, for billions of tokens: `"0.1b_relu"` to `"2.4b_relu"`, `"0.1b_silu"`
        to `"1.2b_silu"`.

        Raises:
            ValueError: Another name.
        """
        if name not in _PUBLISHED:
            raise ValueError(f"name: expected one of {', '.join(_PUBLISHED)}, got {name!r}")
        law = cls("relu" if name.endswith("relu") else "silu")
        law.alpha, law.b, law.c, law.a0 = _PUBLISHED[name]
        return law

    @property
    def limit(self) -> float:
        """The ratio A0 after endless training."""
        return self.a0

    def predict(self, tokens: Tensor | Sequence[float]) -> Tensor:
        """The ratio after some numbers of tokens, in the unit of the fit, float64."""
        d = torch.as_tensor(tokens, dtype=torch.float64)
        if self.kind == "relu":
            return torch.exp(self.b - self.c * d**self.alpha) + self.a0
        return self.a0 - self.c * d**-self.alpha

    def fit(self, tokens: Tensor | Sequence[float], ratio: Tensor | Sequence[float]) -> Self:
        """Fit the law by least squares.

        Args:
            tokens: Training tokens, > 0, in any unit.
            ratio: The activation ratio after each.

        Raises:
            ValueError: Fewer than 4 points, different lengths, or tokens that are not positive.
        """
        import numpy as np
        from scipy.optimize import least_squares

        d, a = (np.asarray(values, dtype=float) for values in (tokens, ratio))
        if d.ndim != 1 or d.shape != a.shape or len(d) < 4:
            raise ValueError(
                f"tokens, ratio: expected at least 4 points each, got {d.shape} and {a.shape}"
            )
        if not ((d > 0) & np.isfinite(d) & np.isfinite(a)).all():
            raise ValueError("tokens, ratio: expected finite numbers, tokens > 0")
        unit = d.max()  # where the search is at home

        def residuals(shape: Any) -> Any:
            columns = self._columns(d / unit, np.exp(shape))
            return columns @ _linear(columns, a) - a

        if self.kind == "relu":
            starts = [[np.log(alpha), np.log(rate)] for alpha in _ALPHAS for rate in _RATES]
        else:
            starts = [[np.log(alpha)] for alpha in _ALPHAS]
        fits = [
            least_squares(residuals, start, bounds=(-12.0, 3.0), xtol=1e-12, ftol=1e-14, gtol=1e-14)
            for start in starts
        ]
        shape = np.exp(min(fits, key=lambda fit: fit.cost).x)
        amplitude, self.a0 = _linear(self._columns(d / unit, shape), a).tolist()
        self.alpha = float(shape[0])
        if self.kind == "relu":
            self.b = float(np.log(amplitude)) if amplitude > 0 else -float("inf")
            self.c = float(shape[1] * unit**-self.alpha)
        else:
            self.b, self.c = 0.0, float(amplitude * unit**self.alpha)
        return self

    def _columns(self, d: Any, shape: Any) -> Any:
        """What the law is linear in, a column each: the part that changes, and the limit."""
        import numpy as np

        if self.kind == "relu":
            return np.stack([np.exp(-shape[1] * d ** shape[0]), np.ones_like(d)], -1)
        return np.stack([-(d ** -shape[0]), np.ones_like(d)], -1)

    def __repr__(self) -> str:
        return (
            f"SparsingLaw({self.kind!r}, alpha={self.alpha:.4g}, b={self.b:.4g}, c={self.c:.4g}, "
            f"a0={self.a0:.4g})"
        )


def _linear(columns: Any, values: Any) -> Any:
    """Least squares without negative coefficients."""
    from scipy.optimize import nnls

    return nnls(columns, values)[0]
