"""One interface to posteriors over black-box functions, for Bayesian optimisation.

A surrogate scales inputs to the unit cube, standardises outputs,

    u = (x - low) / (high - low),      z = (y - mean) / sd,

fits a model of z given u, and gives its posterior in the units of y: as functions f_1, ..., f_S for
networks whose weights are sampled, else as a joint Gaussian. Both are joint over points, so that
an acquisition function of several points sees their correlations. The surrogates themselves are in
the files beside this one.

Y. L. Li, T. G. J. Rudner and A. G. Wilson, "A study of Bayesian neural network surrogates for
Bayesian optimization", 2024. Deviations are stated with each surrogate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from torchzoo.gp.bnn_surrogates_posterior import SamplePosterior

Function = Callable[[Tensor], Tensor]


@runtime_checkable
class Surrogate(Protocol):
    """What every surrogate can do."""

    def fit(self, X: Tensor, Y: Tensor) -> Self: ...

    def posterior(self, X: Tensor) -> SamplePosterior: ...

    def sample_function(self, n: int) -> Function: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...

    def to(self, device: torch.device | str) -> Self: ...


class StandardizedSurrogate(ABC):
    """What surrogates share: scaling, checks, states. A subclass fits standardised data.

    All of it is batched: `(*b, n, d)` data are separate problems, fitted at once.

    Args:
        bounds: Lower and upper ends of the inputs, `(2, d)`; None: the unit cube.
        generator: Draws on the CPU; None: a new one, seeded by torch's.
    """

    x: Tensor
    y: Tensor

    def __init__(self, *, bounds: Tensor | None = None, generator: torch.Generator | None = None):
        if bounds is not None and (
            bounds.ndim != 2 or len(bounds) != 2 or not (bounds[0] < bounds[1]).all()
        ):
            raise ValueError(f"bounds: expected (2, d), the lower ends first, got {bounds}")
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        self.bounds, self.generator = bounds, generator

    def fit(self, X: Tensor, Y: Tensor) -> Self:
        """Fit to data.

        Args:
            X: Inputs.
            Y: Outputs; they need no scaling.

        Shape:
            - X: `(*b, n, d)`
            - Y: `(*b, n, m)`

        Raises:
            ValueError: Shapes that don't fit, or numbers that are not finite.
        """
        if X.ndim < 2 or not X.numel():
            raise ValueError(f"X: expected (..., n, d), got {tuple(X.shape)}")
        if Y.ndim < 2 or Y.shape[:-1] != X.shape[:-1] or not Y.shape[-1]:
            expected = f"({', '.join(map(str, X.shape[:-1]))}, m)"
            raise ValueError(f"Y: expected {expected}, got {tuple(Y.shape)}")
        for name, value in {"X": X, "Y": Y}.items():
            if not value.isfinite().all():
                raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
        if self.bounds is not None and self.bounds.shape[1] != X.shape[-1]:
            expected = f"(..., n, {self.bounds.shape[1]})"
            raise ValueError(f"X: expected {expected}, got {tuple(X.shape)}")
        self._keep(X.detach().clone(), Y.detach().to(X).clone())
        with torch.enable_grad():
            self._fit(self._scaled(self.x), (self.y - self._shift) / self._scale)
        return self

    def posterior(self, X: Tensor) -> SamplePosterior:
        """The posterior at points, joint over the last but one dimension; differentiable.

        Shape:
            - X: `(..., *b, q, d)`
            - mean: `(..., *b, q, m)`

        Raises:
            RuntimeError: Before `fit`.
            ValueError: Points of another dimension.
        """
        self._check(X)
        return self._posterior(self._scaled(X.to(self.x))).affine(self._shift, self._scale)

    def sample_function(self, n: int = 1) -> Function:
        """Draw functions that can be called at any points, again and again.

        Returns:
            A function from `(..., *b, q, d)` to `(n, ..., *b, q, m)`. Values are drawn when they
            are first asked for, given all before.
        """
        self._check(None)
        return _GaussianPaths(self, n)

    def as_botorch_model(self) -> Any:
        """This surrogate as a botorch model, for its acquisition functions and optimisers.

        Raises:
            ImportError: botorch is not installed.
        """
        try:
            from torchzoo.gp._botorch import SurrogateModel
        except ModuleNotFoundError as error:
            raise ImportError("as_botorch_model needs botorch: pip install torchzoo[gp]") from error
        self._check(None)
        return SurrogateModel(self)

    def state_dict(self) -> dict[str, Tensor]:
        """All that another surrogate with the same options needs to predict and to go on."""
        self._check(None)
        state = {"x": self.x, "y": self.y, "generator": self.generator.get_state()}
        state |= self._state()
        return {name: value.detach().clone().contiguous() for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the state of another surrogate with the same options.

        Raises:
            ValueError: Data are missing.
        """
        if missing := sorted({"x", "y", "generator"} - state.keys()):
            raise ValueError(f"state: expected x, y and generator, got none of {missing}")
        self._keep(state["x"].clone(), state["y"].clone())
        self.generator.set_state(state["generator"].cpu())
        self._load({name: value.clone() for name, value in state.items()})

    def to(self, device: torch.device | str) -> Self:
        """Move to a device."""
        if self.bounds is not None:
            self.bounds = self.bounds.to(device)
        if hasattr(self, "x"):
            self.load_state_dict({k: v.to(device) for k, v in self.state_dict().items()})
        return self

    @abstractmethod
    def _fit(self, x: Tensor, z: Tensor) -> None:
        """Fit to scaled inputs and standardised outputs."""

    @abstractmethod
    def _posterior(self, x: Tensor) -> SamplePosterior:
        """That of standardised outputs at scaled inputs."""

    @abstractmethod
    def _state(self) -> dict[str, Tensor]:
        """What the fit found."""

    @abstractmethod
    def _load(self, state: Mapping[str, Tensor]) -> None:
        """The reverse; data are there already."""

    def _keep(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y
        self._shift = y.mean(-2, keepdim=True)
        spread = y.std(-2, keepdim=True) if y.shape[-2] > 1 else torch.ones_like(self._shift)
        self._scale = torch.where(spread > 1e-9 * self._shift.abs(), spread, 1.0)

    def _scaled(self, x: Tensor) -> Tensor:
        if self.bounds is None:
            return x
        low, high = self.bounds.to(x)
        return (x - low) / (high - low)

    def _draws(self, device: torch.device) -> torch.Generator:
        """A generator on the device."""
        if device.type == self.generator.device.type:
            return self.generator
        seed = int(torch.randint(2**62, (), generator=self.generator))
        return torch.Generator(device).manual_seed(seed)

    def _check(self, x: Tensor | None) -> None:
        if not hasattr(self, "x"):
            raise RuntimeError(f"this {type(self).__name__} has no data yet; call fit first")
        if x is not None and (x.ndim < 2 or x.shape[-1] != self.x.shape[-1]):
            raise ValueError(f"X: expected (..., q, {self.x.shape[-1]}), got {tuple(x.shape)}")


class _GaussianPaths:
    """Functions of a Gaussian posterior: each call is conditioned on the values of those before."""

    def __init__(self, surrogate: StandardizedSurrogate, n: int):
        if n < 1:
            raise ValueError(f"n: expected at least 1, got {n}")
        self.surrogate, self.n = surrogate, n
        self.generator = torch.Generator()
        self.generator.manual_seed(int(torch.randint(2**62, (), generator=surrogate.generator)))
        self.x: Tensor | None = None
        self.white: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Values `(n, ..., *b, q, m)`.

        The Cholesky factor of all points so far begins with that of the points before, so the
        same white noise gives the same values there.
        """
        self.surrogate._check(x)
        batch = self.surrogate.x.shape[:-2]
        q, d = x.shape[-2:]
        x = x.expand(*torch.broadcast_shapes(x.shape[:-2], batch), q, d)
        extra = x.shape[: x.ndim - 2 - len(batch)]
        rows = x.reshape(-1, *batch, q, d).movedim(0, -3).flatten(-3, -2)
        seen = rows if self.x is None else torch.cat([self.x.to(rows), rows], -2)
        found = self.surrogate.posterior(seen)
        new = torch.randn(
            (self.n, *found.mean.shape[:-2], found.mean.shape[-1], rows.shape[-2]),
            generator=self.generator,
            dtype=found.mean.dtype,
        ).to(found.mean.device)
        white = new if self.white is None else torch.cat([self.white.to(new), new], -1)
        eye = torch.eye(seen.shape[-2], dtype=found.mean.dtype, device=found.mean.device)
        # a jitter that never depends on later points
        small = torch.finfo(eye.dtype).eps ** 0.5
        ridge = small * self.surrogate._scale.square().mT[..., None] * eye
        factor = torch.linalg.cholesky(found.covariance + ridge)
        values = found.mean + (factor @ white[..., None])[..., 0].mT
        self.x, self.white = seen.detach(), white
        values = values[..., -rows.shape[-2] :, :]
        parts = values.unflatten(-2, (-1, q)).movedim(-3, 1)
        return parts.reshape(self.n, *extra, *batch, q, values.shape[-1])
