"""A mixture of growth curves with the interface of scikit-learn's estimators.

A row of X is a subject: its J times, then its covariates. A row of y holds its J responses, NaN
where one is missing.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchzoo.moe.growth import GrowthMoE
from torchzoo.moe.growth_fitting import fit_growth_moe
from torchzoo.moe.growth_result import GrowthMoEFit

Array = npt.NDArray[np.float64]


class GrowthMoERegressor:
    """Mixture of growth curves, estimated by maximum likelihood.

    Arguments are kept as they are and checked by `fit`, so that scikit-learn can clone it.

    Args:
        num_classes: Number of classes.
        gate_columns: Which covariates say which class, counted from 0 after the times.
        expert_columns: Which covariates say where within a class.
        trajectory: "bilinear", "linear", "quadratic" or "exponential".
        shared_residual: Whether all classes have the same residual variance.
        n_starts: Number of starts.
        seed: Seed of the starts.
        method: "lbfgs" or "em".
        max_iter: Most iterations.

    Attributes:
        result_: The `GrowthMoEFit`, after `fit`.
        n_occasions_: Number `J` of times in a row of X, after `fit`.
        n_features_in_: Number of columns of X, after `fit`.

    Source:
        Liu and Perera, "Extending Mixture of Experts Model to Investigate Heterogeneity of
        Trajectories: When, Where and How to Add Which Covariates", 2021; interface: Buitinck and
        others, "API design for machine learning software", 2013.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> t, x = np.tile(np.arange(6.0), (200, 1)), rng.normal(size=(200, 1))
        >>> y = 3 * x + rng.normal(size=(200, 1)) * t + 0.3 * rng.normal(size=(200, 6))
        >>> model = GrowthMoERegressor(1, expert_columns=[0], trajectory="linear", n_starts=1)
        >>> model.fit(np.hstack([t, x]), y).predict(np.hstack([t, x])).shape
        (200, 6)
    """

    def __init__(
        self,
        num_classes: int = 2,
        *,
        gate_columns: Sequence[int] = (),
        expert_columns: Sequence[int] = (),
        trajectory: str = "bilinear",
        shared_residual: bool = False,
        n_starts: int = 5,
        seed: int = 0,
        method: str = "lbfgs",
        max_iter: int = 500,
    ) -> None:
        self.num_classes = num_classes
        self.gate_columns = gate_columns
        self.expert_columns = expert_columns
        self.trajectory = trajectory
        self.shared_residual = shared_residual
        self.n_starts = n_starts
        self.seed = seed
        self.method = method
        self.max_iter = max_iter

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments; `deep` changes nothing, as none is an estimator."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> Self:
        """Change arguments of the constructor.

        Raises:
            ValueError: There is no such argument.
        """
        for name, value in params.items():
            if name not in self.get_params():
                raise ValueError(f"{name}: expected one of {list(self.get_params())}, got {name!r}")
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> SimpleNamespace:
        """What scikit-learn asks of an estimator before it cross-validates it."""
        takes = SimpleNamespace(pairwise=False, allow_nan=True, sparse=False)
        return SimpleNamespace(estimator_type="regressor", input_tags=takes, requires_fit=True)

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:
        """Estimate the mixture.

        Args:
            X: `(n, J + c)`, times and covariates.
            y: `(n, J)`, responses; NaN where missing.

        Raises:
            ValueError: Shapes or columns that don't fit; see `fit_growth_moe` too.
        """
        table, responses = _matrix("X", X), _matrix("y", y)
        self.n_features_in_, self.n_occasions_ = table.shape[1], responses.shape[1]
        self.result_: GrowthMoEFit = fit_growth_moe(
            num_classes=self.num_classes,
            **self._inputs(table, responses),
            trajectory=self.trajectory,
            shared_residual=self.shared_residual,
            n_starts=self.n_starts,
            seed=self.seed,
            method=self.method,
            max_iter=self.max_iter,
        )
        return self

    @torch.no_grad()
    def predict(self, X: npt.ArrayLike) -> Array:
        """`(n, J)`, mean responses of subjects of whom only times and covariates are known."""
        model, inputs = self._fitted(X)
        curves = model.predict_trajectory(inputs["t"], inputs["expert_x"])
        weights = model.log_weights(inputs["gate_x"]).exp()
        return (weights[..., None] * curves).sum(-2).numpy()

    @torch.no_grad()
    def predict_proba(self, X: npt.ArrayLike, y: npt.ArrayLike | None = None) -> Array:
        """`(n, K)`, probabilities of the classes, given the responses where there are some."""
        model, inputs = self._fitted(X, y)
        if y is None:
            return model.log_weights(inputs["gate_x"]).exp().numpy()
        return model.posterior(**inputs).numpy()

    @torch.no_grad()
    def score(self, X: npt.ArrayLike, y: npt.ArrayLike) -> float:
        """Mean log-likelihood of a subject."""
        model, inputs = self._fitted(X, y)
        return model(**inputs).mean().item()

    def _fitted(
        self, X: npt.ArrayLike, y: npt.ArrayLike | None = None
    ) -> tuple[GrowthMoE, dict[str, Any]]:
        """The fitted model and its inputs."""
        if not hasattr(self, "result_"):
            raise RuntimeError("this GrowthMoERegressor is not fitted yet; call fit first")
        table = _matrix("X", X)
        if table.shape[1] != self.n_features_in_:
            raise ValueError(f"X: got {table.shape[1]} columns, expected {self.n_features_in_}")
        return self.result_.model, self._inputs(table, None if y is None else _matrix("y", y))

    def _inputs(self, table: Tensor, y: Tensor | None) -> dict[str, Any]:
        """Times, covariates and, where there are some, responses with their mask."""
        t, covariates = table.tensor_split([self.n_occasions_], -1)
        inputs: dict[str, Any] = {"t": t}
        for name in ("gate", "expert"):
            columns = list(getattr(self, f"{name}_columns"))
            if not all(0 <= column < covariates.shape[1] for column in columns):
                wanted = f"from 0 to {covariates.shape[1] - 1}, after {self.n_occasions_} times"
                raise ValueError(f"{name}_columns: expected {wanted}, got {columns}")
            inputs[f"{name}_x"] = covariates[:, columns]
        if y is not None:
            inputs |= {"y": y, "mask": ~y.isnan()}
        return inputs


def _matrix(name: str, value: npt.ArrayLike) -> Tensor:
    matrix = torch.as_tensor(np.asarray(value, dtype=np.float64))
    if matrix.ndim != 2:
        raise ValueError(f"{name}: expected two dimensions, got shape {tuple(matrix.shape)}")
    return matrix
