"""Maximising acquisition functions, over a box by botorch or over a finite set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 256  # points of a finite set that are evaluated at once


def optimize_acqf(
    acq: Callable[[Tensor], Tensor],
    bounds: Tensor | None = None,
    q: int = 1,
    *,
    num_restarts: int = 20,
    raw_samples: int = 256,
    maxiter: int = 200,
    generator: torch.Generator | None = None,
    candidates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the best points, by L-BFGS from the best of random ones, or among candidates.

    Args:
        acq: An acquisition function of q points.
        bounds: Lower and upper ends of a box, which needs botorch.
        q: Points that are looked for together; among candidates one after the other.
        num_restarts: Starts of the local search.
        raw_samples: Sobol points that the starts are chosen from.
        maxiter: Iterations of L-BFGS.
        generator: Gives the seed of all that is random; None: torch's own.
        candidates: A finite set, instead of bounds.

    Shape:
        - acq: `(..., q, d)` to `(...)`
        - bounds: `(2, d)`
        - candidates: `(M, d)`

    Returns:
        The points, `(q, d)`, and the value, a scalar.

    Raises:
        ImportError: Bounds without botorch.
        ValueError: Not one of bounds and candidates, or one of them of a wrong shape.

    Example:
        >>> hill = lambda x: -(x - 0.3).square().sum((-2, -1))
        >>> optimize_acqf(hill, candidates=torch.tensor([[0.0], [0.4], [1.0]]))[0]
        tensor([[0.4000]])
    """
    if (bounds is None) == (candidates is None):
        raise ValueError("bounds: expected bounds or candidates, got both or neither")
    for name, value in {
        "q": q, "num_restarts": num_restarts, "raw_samples": raw_samples, "maxiter": maxiter
    }.items():  # fmt: skip
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if candidates is not None:
        return _best_of(acq, candidates, q)
    assert bounds is not None
    check_bounds(bounds)
    try:
        from botorch.optim import optimize_acqf as optimize
    except ModuleNotFoundError as error:
        message = "optimize_acqf over bounds needs botorch: pip install torchzoo[gp]"
        raise ImportError(message) from error
    seed = int(torch.randint(2**31, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        optimum: Any = optimize(
            acq,  # type: ignore[arg-type]
            bounds=bounds,
            q=q,
            num_restarts=num_restarts,
            raw_samples=raw_samples,
            options={"maxiter": maxiter, "seed": seed},
        )
    return optimum


def check_bounds(bounds: Tensor) -> None:
    """Raise ValueError unless bounds are `(2, d)`, the lower ends below the upper ones."""
    if bounds.ndim != 2 or len(bounds) != 2 or not bounds.numel():
        raise ValueError(f"bounds: expected (2, d), got {tuple(bounds.shape)}")
    if not (bounds[0] < bounds[1]).all():
        raise ValueError(f"bounds: expected lower ends below upper ones, got {bounds.tolist()}")


def check_points(name: str, x: Tensor, bounds: Tensor) -> None:
    """Raise ValueError unless x is `(n, d)` with all points within the bounds `(2, d)`."""
    dim = bounds.shape[1]
    if x.ndim != 2 or x.shape[1] != dim or not len(x):
        raise ValueError(f"{name}: expected (n, {dim}), got {tuple(x.shape)}")
    if not ((x >= bounds[0]) & (x <= bounds[1])).all():
        raise ValueError(f"{name}: expected within the bounds, got a point outside of them")


def sobol_points(bounds: Tensor, count: int, seed: int) -> Tensor:
    """Scrambled Sobol points of a box, `(count, d)`, in double precision."""
    engine = torch.quasirandom.SobolEngine(bounds.shape[1], scramble=True, seed=seed)
    low, high = bounds.double()
    return torch.lerp(low, high, engine.draw(count, dtype=torch.float64))


def random_points(
    bounds: Tensor, candidates: Tensor | None, count: int, generator: torch.Generator
) -> Tensor:
    """Draw candidates, or points of a box where there are none, `(count, d)`."""
    if candidates is not None:
        return candidates[torch.randint(len(candidates), (count,), generator=generator)]
    draws = torch.rand(count, bounds.shape[1], dtype=torch.float64, generator=generator)
    low, high = bounds.double()
    return torch.lerp(low, high, draws)


@torch.no_grad()
def _best_of(acq: Callable[[Tensor], Tensor], candidates: Tensor, q: int) -> tuple[Tensor, Tensor]:
    if candidates.ndim != 2 or not candidates.numel():
        raise ValueError(f"candidates: expected (M, d), got {tuple(candidates.shape)}")
    chosen = candidates[:0]
    value = candidates.new_zeros(())
    for _ in range(q):
        before = chosen.expand(len(candidates), *chosen.shape)
        batches = torch.cat([before, candidates[:, None]], 1).split(CHUNK)
        values = torch.cat([acq(batch) for batch in batches])
        value, at = values.max(0)
        chosen = torch.cat([chosen, candidates[at][None]])
    return chosen, value
