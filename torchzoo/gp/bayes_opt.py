"""Bayesian optimisation by asking and telling, whose state is a JSON file.

A surrogate is fitted to what was observed, an acquisition function of it is maximised, and its
maximiser is suggested. Several points at once are found one after the other, each as if the
posterior mean had been observed at those before. What is recommended in the end is the evaluated
point of the highest posterior mean, never that of the highest value.

P. I. Frazier, "A tutorial on Bayesian optimization", 2018.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchzoo.files import write_json
from torchzoo.gp.acquisition_lines import gaussian
from torchzoo.gp.acquisition_optimize import check_points, optimize_acqf, random_points
from torchzoo.gp.bayes_opt_acquisition import (
    ACQUISITIONS,
    GRID,
    AtFidelity,
    Improvement,
    acquisition_on_points,
    averaged,
)
from torchzoo.gp.bayes_opt_data import Observations, checked_levels, decode, encode
from torchzoo.gp.bayes_opt_domain import Domain
from torchzoo.gp.bayes_opt_models import TAKES_DATA, believing, default_surrogate, with_data
from torchzoo.gp.bnn_surrogates_gp import GPSurrogate


class BayesOpt:
    """Optimises an expensive function on a box or a finite set.

    Options and data, and no hidden state, determine what is suggested: `suggest` may be called
    again and gives the same, and what is loaded goes on exactly as it would have.

    Args:
        bounds: Lower and upper ends of the box.
        acquisition: `"ei"`: expected improvement on the best value observed, which is right
            without noise; `"noisy_ei"`; `"kg"`: knowledge gradient; `"dkg"`: that of values with
            gradients; `"es"`, `"pes"` and `"mes"`: entropy search for the place of the maximum,
            the first on a set of points only, and for its value; `"random"`.
        surrogate: Model of the function, with `fit`, `posterior` and states as a
            `StandardizedSurrogate`; None: a `GPSurrogate`, or a `DerivativeGP` for `"dkg"`.
            Gradients need a `DerivativeGP`. With a `FullyBayesianSurrogate` acquisition functions
            are averaged over its hyperparameters.
        maximize: Whether to maximise.
        seed: Of all that is random.
        candidates: A finite set to choose from, the first of it before any fit; None: the box,
            which needs botorch.
        num_initial: Evaluations before any fit, at Sobol points or the first candidates; None:
            2 (d + 1).
        refit_every: Evaluations between two fits of hyperparameters; in between the surrogate
            takes in new data. Those that are no Gaussian processes are fitted each time.
        fidelities: Costs of an evaluation by fidelity, the highest being the one that counts; or
            by task of a `MultiTaskSurrogate`, the last counting. Needs `"kg"`, by a unit of cost;
            suggestions get the fidelity as one more number.

    Raises:
        ValueError: An option out of its range.

    Source:
        P. I. Frazier, "A tutorial on Bayesian optimization", 2018, algorithm 1.

    Example:
        >>> grid = torch.linspace(-1, 1, 51, dtype=torch.float64)[torch.randperm(51), None]
        >>> bounds = torch.tensor([[-1.0], [1.0]])
        >>> search = BayesOpt(bounds, acquisition="noisy_ei", candidates=grid)
        >>> search.run(lambda x: -(x[:, 0] - 0.3).square(), 12)
        >>> x, value = search.best()
        >>> bool((x - 0.3).abs() < 0.1)
        True
    """

    def __init__(
        self,
        bounds: Tensor,
        *,
        acquisition: str = "ei",
        surrogate: Any = None,
        maximize: bool = True,
        seed: int = 0,
        candidates: Tensor | None = None,
        num_initial: int | None = None,
        refit_every: int = 1,
        fidelities: Mapping[float, float] | None = None,
    ):
        if acquisition not in ACQUISITIONS:
            raise ValueError(f"acquisition: expected one of {ACQUISITIONS}, got {acquisition!r}")
        self.fidelities = dict(sorted((fidelities or {}).items()))
        candidates = None if candidates is None else candidates.detach().double()
        self.domain = Domain(bounds.detach().double(), candidates, tuple(self.fidelities), seed)
        num_initial = 2 * (self.dim + 1) if num_initial is None else num_initial
        for name, value in {"num_initial": num_initial, "refit_every": refit_every}.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if candidates is not None and len(candidates) < num_initial:
            count = len(candidates)
            raise ValueError(f"candidates: expected at least {num_initial}, got {count}")
        if self.fidelities and (acquisition != "kg" or not min(self.fidelities.values()) > 0):
            raise ValueError(
                "fidelities: expected costs above 0 and the acquisition 'kg', got "
                f"{self.fidelities} and {acquisition!r}"
            )
        self.acquisition, self.maximize, self.seed = acquisition, maximize, seed
        self.num_initial, self.refit_every = num_initial, refit_every
        if surrogate is None:
            surrogate = default_surrogate(acquisition, self.bounds, self.fidelities, seed)
        if acquisition == "dkg" and not hasattr(surrogate, "joint"):
            kind = type(surrogate).__name__
            raise ValueError(f"surrogate: expected a DerivativeGP for 'dkg', got a {kind}")
        self.surrogate = surrogate
        self.data = Observations.empty(self.dim)
        self._fitted = 0  # observations at the last fit
        self._hyperparameters: dict[str, Tensor] | None = None

    @property
    def bounds(self) -> Tensor:
        """Ends of the box, `(2, d)`."""
        return self.domain.bounds

    @property
    def candidates(self) -> Tensor | None:
        """The finite set to choose from, `(M, d)`, if there is one."""
        return self.domain.candidates

    @property
    def dim(self) -> int:
        """Inputs of the function, the fidelity not among them."""
        return self.bounds.shape[1]

    @property
    def x(self) -> Tensor:
        """Points evaluated, `(n, d)`."""
        return self.data.x

    @property
    def y(self) -> Tensor:
        """Their values, `(n,)`."""
        return self.data.y

    def suggest(self, q: int = 1) -> Tensor:
        """Points to evaluate next.

        Shape:
            - output: `(q, d)`, or `(q, d + 1)` with fidelities

        Raises:
            ImportError: There are no candidates, and botorch is not installed.
            ValueError: q below 1.
        """
        if q < 1:
            raise ValueError(f"q: expected at least 1, got {q}")
        n = len(self.data)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + n)
        if n < self.num_initial:
            return self.domain.initial(n, q)
        if self.acquisition == "random":
            return random_points(self.bounds, self.candidates, q, generator)
        model = self.surrogate_given_data()
        chosen = self.bounds.new_empty(0, self.dim + bool(self.fidelities))
        for _ in range(q):
            point = self._optimize(model, chosen, generator)
            chosen = torch.cat([chosen, point])
            if len(chosen) < q:
                model = believing(model, chosen[-1:])
        return chosen

    def observe(
        self,
        x: Tensor,
        y: Tensor | float | Sequence[float],
        *,
        constraints: Tensor | None = None,
        fidelity: Tensor | Sequence[float] | None = None,
        grad: Tensor | None = None,
    ) -> None:
        """Take in evaluations.

        Args:
            x: Points.
            y: Their values.
            constraints: Values that should be at most 0; `"ei"` keeps to them. As many each time.
            fidelity: Fidelities of the values, if there are any.
            grad: Gradients of the values.

        Shape:
            - x: `(q, d)`, or `(d,)`
            - y: `(q,)`, or a number
            - constraints: `(q, c)`
            - fidelity: `(q,)`
            - grad: `(q, d)`

        Raises:
            ValueError: Points outside of the bounds, values that are not a number for each point
                or not finite, or something that the options have no use for.
        """
        x = torch.atleast_2d(torch.as_tensor(x, dtype=torch.float64)).detach()
        check_points("x", x, self.bounds)
        if constraints is not None and self.acquisition not in ("ei", "random"):
            raise ValueError(f"constraints: expected None for {self.acquisition!r}, got some")
        if grad is not None and not hasattr(self.surrogate, "gradient"):
            kind = type(self.surrogate).__name__
            raise ValueError(f"grad: expected None for a {kind}, got some; use a DerivativeGP")
        levels = checked_levels(fidelity, list(self.fidelities))
        self.data = self.data.added(x, y, constraints, levels, grad)

    def run(
        self,
        function: Callable[[Tensor], Any],
        budget: int,
        *,
        checkpoint: str | Path | None = None,
    ) -> None:
        """Evaluate until there are so many observations, one after the other.

        Args:
            function: Values of points `(1, d)`, as a number or `(1,)`; or a pair of that and the
                gradient, `(1, d)`.
            budget: Observations to stop at.
            checkpoint: File that the state is written to after each, whole or not at all. One that
                is there is continued.

        Raises:
            ValueError: There are fidelities; loop by `suggest` and `observe`.
        """
        if self.fidelities:
            raise ValueError("fidelities: expected none in run, use suggest and observe")
        if checkpoint is not None and Path(checkpoint).exists():
            self.load_state(json.loads(Path(checkpoint).read_text(encoding="utf-8")))
        while len(self.data) < budget:
            x = self.suggest()
            found = function(x)
            y, grad = found if isinstance(found, tuple) else (found, None)
            self.observe(x, torch.as_tensor(y).reshape(-1), grad=grad)
            if checkpoint is not None:
                self.save(checkpoint)

    def best(self, by: str = "evaluated") -> tuple[Tensor, Tensor]:
        """What to report: the point of the best posterior mean, and that mean.

        Args:
            by: `"evaluated"`: among points evaluated, feasible ones where there are constraints;
                `"posterior"`: anywhere.

        Shape:
            - output: `(d,)` and a scalar

        Raises:
            RuntimeError: Nothing was observed, or nothing feasible.
            ValueError: Another word.
        """
        if by not in ("evaluated", "posterior"):
            raise ValueError(f"by: expected 'evaluated' or 'posterior', got {by!r}")
        if not self.data.feasible.any():
            raise RuntimeError("nothing feasible was observed yet")
        model = self.surrogate_given_data()

        def mean(x: Tensor) -> Tensor:
            return gaussian(model, self.domain.at_top(x)).mean[..., 0, 0]

        points = self.x[self.data.feasible] if by == "evaluated" else self.candidates
        box = self.bounds if points is None else None
        generator = torch.Generator().manual_seed(self.seed)
        x, value = optimize_acqf(mean, box, generator=generator, candidates=points)
        return x[0], value if self.maximize else -value

    def surrogate_given_data(self) -> Any:
        """The model of the function, or of minus it, given all data.

        Hyperparameters are fitted when it is their turn.
        """
        n, state = len(self.data), self._hyperparameters
        wait = self.refit_every if isinstance(self.surrogate, TAKES_DATA) else 1
        grad = self.data.grad if self.data.grad is None or self.maximize else -self.data.grad
        if state is None or not 0 <= n - self._fitted < wait:
            if state is not None:  # where its generator was
                self.surrogate.load_state_dict(state)
            options = {} if grad is None else {"grad": grad}
            self.surrogate.fit(self.data.inputs, self._signed(), **options)
            self._fitted, self._hyperparameters = n, self.surrogate.state_dict()
            return self.surrogate
        return with_data(self.surrogate, state, self.data.inputs, self._signed(), grad)

    def save(self, path: str | Path) -> None:
        """Write the state as JSON, whole or not at all."""
        write_json(path, self.state())

    @classmethod
    def load(cls, path: str | Path, *, surrogate: Any = None) -> BayesOpt:
        """What `save` wrote; with the surrogate that it had, if it was not the default."""
        state = json.loads(Path(path).read_text(encoding="utf-8"))
        options = dict(state["options"])
        options["candidates"] = decode(options["candidates"])
        options["fidelities"] = dict(options["fidelities"])
        found = cls(decode(options.pop("bounds")), surrogate=surrogate, **options)
        found.load_state(state)
        return found

    def state(self) -> dict[str, Any]:
        """Options, data, and the hyperparameters of the last fit, as JSON values."""
        return {
            "options": {
                "bounds": encode(self.bounds),
                "acquisition": self.acquisition,
                "maximize": self.maximize,
                "seed": self.seed,
                "candidates": encode(self.candidates),
                "num_initial": self.num_initial,
                "refit_every": self.refit_every,
                "fidelities": [list(pair) for pair in self.fidelities.items()],
            },
            "data": self.data.encoded(),
            "fitted": self._fitted,
            "surrogate": {k: encode(v) for k, v in (self._hyperparameters or {}).items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over the `state` of another one with the same options.

        Raises:
            ValueError: The options differ.
        """
        own = self.state()["options"]
        for name, value in state["options"].items():
            if value != own[name]:
                raise ValueError(f"{name}: expected that of the state, got another")
        self.data = Observations.decoded(state["data"])
        self._fitted = state["fitted"]
        self._hyperparameters = {k: decode(v) for k, v in state["surrogate"].items()} or None

    def _grid(self) -> Tensor:
        """A finite set that stands for the domain, with what was evaluated."""
        return self.domain.grid(self.x, GRID[self.acquisition])

    def _signed(self) -> Tensor:
        return (self.y if self.maximize else -self.y)[:, None]

    def _optimize(self, model: Any, pending: Tensor, generator: torch.Generator) -> Tensor:
        box = self.domain.box
        if not self.fidelities:
            acq = self._acquisition_function(model, pending, generator)
            finite = self._grid() if self.acquisition == "es" else self.candidates
            box = None if finite is not None else box
            return optimize_acqf(acq, box, generator=generator, candidates=finite)[0].detach()
        found, targets = [], self.domain.at_top(self._grid())
        for level, price in self.fidelities.items():
            acq = averaged(model, partial(AtFidelity, targets=targets, level=level, price=price))
            x, value = optimize_acqf(acq, box, generator=generator, candidates=self.candidates)
            found.append((float(value), torch.cat([x, torch.full_like(x[:, :1], level)], 1)))
        return max(found, key=lambda pair: pair[0])[1].detach()

    def _acquisition_function(
        self, model: Any, pending: Tensor, generator: torch.Generator
    ) -> Callable[[Tensor], Tensor]:
        if self.acquisition == "ei":
            feasible = self.data.feasible
            best = self._signed()[feasible, 0].max() if feasible.any() else None
            return averaged(model, partial(Improvement, best=best, limits=self._limits()))
        seen = self.acquisition == "noisy_ei"
        points = torch.cat([self.x, pending]) if seen else self._grid()
        return averaged(
            model,
            lambda one: acquisition_on_points(self.acquisition, one, points, generator),
        )

    def _limits(self) -> GPSurrogate | None:
        """A model of the constraints, if there are any."""
        if self.data.constraints is None:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        limits = GPSurrogate(bounds=self.bounds, generator=generator)
        return limits.fit(self.x, self.data.constraints)
