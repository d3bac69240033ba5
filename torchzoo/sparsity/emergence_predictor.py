"""Parameters of the emergence curve from the architecture of a model, before it is trained.

Gallego-Feliciano, McClendon, Morinelli, Zervoudakis and Saravanos, "Hidden Dynamics of Massive
Activations in Transformer Training", 2025: regressions of A, λ, γ, t0 and K on a layer's place and
the sizes of the model. Targets are fitted as log(1 + y), K after a Yeo-Johnson transform.

Deviations: y below 0, which A may be, is fitted as -log(1 - y).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchzoo.sparsity.emergence import EmergenceParams

Targets = Sequence[EmergenceParams] | Sequence[float] | NDArray[np.float64] | Tensor


class Architecture(NamedTuple):
    """A layer, by its number from 1, and layers, width, heads and MLP width of its model."""

    layer: int
    layers: int
    dim: int
    heads: int
    hidden: int


def architecture_features(l: int, L: int, d: int, H: int, d_ff: int) -> Tensor:
    """Features of a layer from which the parameters of its emergence curve are predicted.

    Args:
        l: The layer, from 1 to L.
        L: Number of layers.
        d: Width of the residual stream.
        H: Number of attention heads.
        d_ff: Width of the feed-forward layers.

    Shape:
        - output: `(10,)`

    Returns:
        l/L, its root, its square and its cube; H/d, the attention density; d_ff/d; d/L; H/L;
        log d; l L. float64.

    Raises:
        ValueError: A size < 1, or `l` not in 1..L.

    Source:
        Gallego-Feliciano et al., "Hidden Dynamics of Massive Activations in Transformer Training",
        2025, the features of section 5.

    Example:
        >>> architecture_features(2, 4, 32, 4, 128)[:6].tolist()
        [0.5, 0.7071067811865476, 0.25, 0.125, 0.125, 4.0]
    """
    for name, size in (("L", L), ("d", d), ("H", H), ("d_ff", d_ff)):
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    if not 1 <= l <= L:
        raise ValueError(f"l: expected 1 to L = {L}, got {l}")
    depth = l / L
    powers = [depth, depth**0.5, depth**2, depth**3]
    sizes = [H / d, d_ff / d, d / L, H / L, float(np.log(d)), float(l * L)]
    return torch.tensor(powers + sizes, dtype=torch.float64)


class EmergencePredictor:
    """Regression of curve parameters, or of one number a layer, on `architecture_features`.

    Args:
        estimator: A scikit-learn regressor, cloned for each target; None: ridge regression.
        ridge: The penalty of the ridge regression, on standardised features.

    Example:
        >>> archs = [(l, 4, d, d // 8, 4 * d) for d in (16, 32, 64) for l in (1, 2, 3, 4)]
        >>> finals = [10.0 * d for _, _, d, _, _ in archs]
        >>> predictor = EmergencePredictor(ridge=1e-3).fit(archs, finals)
        >>> 250 < predictor.predict([(2, 4, 32, 4, 128)]).item() < 400
        True
    """

    def __init__(self, estimator: Any = None, *, ridge: float = 1.0):
        if not ridge >= 0:
            raise ValueError(f"ridge: expected a number ≥ 0, got {ridge}")
        self.estimator = estimator
        self.ridge = ridge
        self._models: list[Any] = []
        self._one = False

    def fit(self, archs: Sequence[Sequence[int]], params: Targets) -> Self:
        """Fit the regressions.

        Args:
            archs: Arguments of `architecture_features` for each of n layers; see `Architecture`.
            params: `EmergenceParams` of each, or one number of each, treated like K.

        Raises:
            ValueError: Lengths differ, fewer than 2 layers, or neither 1 nor 5 numbers a layer.
        """
        targets = np.asarray(params, dtype=np.float64)
        if len(archs) != len(targets) or len(archs) < 2:
            raise ValueError(
                f"archs, params: expected one length of at least 2, got {len(archs)} and "
                f"{len(targets)}"
            )
        if targets.shape[1:] not in ((), (len(EmergenceParams._fields),)):
            raise ValueError(f"params: expected shape (n, 5) or (n,), got {targets.shape}")
        self._one = targets.ndim == 1
        columns = targets[:, None] if self._one else targets
        names = ("K",) if self._one else EmergenceParams._fields
        features = _features(archs)
        self._models = [
            self._regression(name).fit(features, column)
            for name, column in zip(names, columns.T, strict=True)
        ]
        return self

    def predict(self, archs: Sequence[Sequence[int]]) -> Tensor:
        """Predicted parameters, `(n, 5)` or `(n,)` as they were fitted, float64.

        Raises:
            ValueError: `fit` has not been called.
        """
        if not self._models:
            raise ValueError("predict: expected a fitted predictor; call fit first")
        features = _features(archs)
        columns = [torch.as_tensor(model.predict(features)) for model in self._models]
        return columns[0] if self._one else torch.stack(columns, -1)

    def _regression(self, target: str) -> Any:
        from sklearn.base import clone
        from sklearn.compose import TransformedTargetRegressor
        from sklearn.linear_model import Ridge
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import PowerTransformer, StandardScaler

        estimator = Ridge(self.ridge) if self.estimator is None else clone(self.estimator)
        regressor = make_pipeline(StandardScaler(), estimator)
        if target == "K":
            return TransformedTargetRegressor(regressor, transformer=PowerTransformer())
        return TransformedTargetRegressor(regressor, func=_log1p, inverse_func=_expm1)


def _features(archs: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    return torch.stack([architecture_features(*arch) for arch in archs]).numpy()


def _log1p(y: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sign(y) * np.log1p(np.abs(y))


def _expm1(z: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sign(z) * np.expm1(np.abs(z))
