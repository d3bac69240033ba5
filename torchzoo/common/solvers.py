"""Solvers of small numerical problems that several families share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Literal, NamedTuple

import torch
from torch import Tensor

STALL = 30
"""Evaluations after which a search that gains nothing is stalled; a line search makes up to 26."""


class _StalledError(Exception):
    """Ends a search from within."""


class Solution(NamedTuple):
    """What a solver found.

    Attributes:
        value: The solution; for a minimiser the lowest objective, whose point is in the parameters.
        converged: Whether `residual` came under the tolerance.
        iterations: Iterations used.
        residual: How far from solved; for a minimiser the largest entry of the gradient.
    """

    value: Tensor
    converged: bool
    iterations: int
    residual: float


def minimize_lbfgs(
    closure: Callable[[], Tensor],
    params: Iterable[Tensor],
    *,
    max_iter: int = 200,
    tol: float = 1e-9,
    min_gain: float = 0.0,
) -> Solution:
    """Minimise a smooth full-batch objective in place by L-BFGS with a strong Wolfe line search.

    The parameters end at the best point evaluated, so the objective never ends above its start,
    even where the line search met overflow. It stops where the gradient is below `tol`, and where
    a step or its gain is lost in rounding.

    Args:
        closure: Computes the objective, a scalar, from the parameters; it need not differentiate.
        params: Leaf tensors to move; those that don't require a gradient stay as they are. Their
            `.grad` is left as it was.
        max_iter: Most iterations.
        tol: Largest absolute gradient entry that counts as solved.
        min_gain: Stop where 30 evaluations in a row, more than a line search makes, lower the
            objective by no more than this, relative to its size where that is above 1.

    Returns:
        The `Solution`, its value detached.

    Raises:
        ValueError: Nothing to move, or the objective is not finite at the start.

    Source:
        D. C. Liu and J. Nocedal, On the limited memory BFGS method for large scale optimization,
        1989; the iteration is `torch.optim.LBFGS`.

    Example:
        >>> x = torch.tensor([3.0, -1.0], dtype=torch.float64, requires_grad=True)
        >>> found = minimize_lbfgs(lambda: ((x - 2) ** 2 * torch.tensor([1.0, 50.0])).sum(), [x])
        >>> [round(value, 6) for value in x.tolist()], found.converged
        ([2.0, 2.0], True)
    """
    leaves = [p for p in params if p.requires_grad]

    def differentiated() -> tuple[Tensor, Sequence[Tensor]]:
        with torch.enable_grad():
            loss = closure()
        return loss.detach(), torch.autograd.grad(loss, leaves, materialize_grads=True)

    return minimize_with_slopes(
        differentiated, leaves, max_iter=max_iter, tol=tol, min_gain=min_gain
    )


def minimize_with_slopes(
    objective: Callable[[], tuple[Tensor, Sequence[Tensor]]],
    leaves: Sequence[Tensor],
    *,
    max_iter: int = 200,
    tol: float = 1e-9,
    min_gain: float = 0.0,
) -> Solution:
    """`minimize_lbfgs` of an objective that gives its slopes itself.

    Args:
        objective: Computes the objective and its slope for each leaf, without a graph.
        leaves: Leaf tensors that require a gradient, moved in place.
        max_iter: See `minimize_lbfgs`.
        tol: See `minimize_lbfgs`.
        min_gain: See `minimize_lbfgs`.
    """
    if not leaves:
        raise ValueError("params: expected at least one tensor that requires a gradient, got none")
    grads = [p.grad for p in leaves]
    # The optimizer compares this with losses, steps and slopes alike; squared, it stops none of
    # them before rounding does.
    lost_in_rounding = torch.finfo(leaves[0].dtype).eps ** 2
    optimizer = torch.optim.LBFGS(
        leaves,
        max_iter=max_iter,
        max_eval=2 * max_iter + 1,
        tolerance_grad=tol,
        tolerance_change=lost_in_rounding,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    best: tuple[float, float, Tensor, list[Tensor]] | None = None
    lows: list[float] = []  # the lowest objective after each evaluation

    def evaluate() -> float:
        nonlocal best
        loss, slopes = objective()
        for p, g in zip(leaves, slopes, strict=True):
            p.grad = g
        value = loss.item()
        if best is None and not math.isfinite(value):
            raise ValueError(f"closure: expected a finite value at the start, got {value}")
        residual = max((g.abs().max().item() for g in slopes if g.numel()), default=0.0)
        if best is None or (value, residual) < best[:2]:
            best = value, residual, loss, [p.detach().clone() for p in leaves]
        if min_gain:
            lows.append(best[0])
            least = min_gain * max(1.0, abs(lows[-1]))
            if len(lows) > STALL and lows[-1 - STALL] - lows[-1] <= least:
                raise _StalledError
        return value

    try:
        with suppress(_StalledError):
            optimizer.step(evaluate)
    finally:
        for p, g in zip(leaves, grads, strict=True):
            p.grad = g
    assert best is not None
    _, residual, lowest, point = best
    with torch.no_grad():
        for p, q in zip(leaves, point, strict=True):
            p.copy_(q)
    iterations = optimizer.state[leaves[0]]["n_iter"]
    return Solution(lowest, residual <= tol, iterations, residual)


def conjugate_gradient(
    matvec: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    tol: float = 1e-10,
    max_iter: int = 1000,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
) -> Solution:
    """Solve `A x = b` for a symmetric positive definite A that is known by its products.

    Args:
        matvec: Maps vectors `(..., n)` to `A x`, `(..., n)`; leading dimensions are systems.
        b: Right-hand sides, `(..., n)`.
        tol: Norm of the residual, relative to that of `b`, at which a system counts as solved.
        max_iter: Most iterations.
        preconditioner: Maps residuals `(..., n)` to an approximation of their `A^-1`.

    Shape:
        - b: `(..., n)`
        - value of the solution: `(..., n)`

    Returns:
        The `Solution`; its residual is the relative one of the worst system, computed afresh.

    Raises:
        ValueError: `b` has no dimension.

    Source:
        M. R. Hestenes and E. Stiefel, Methods of conjugate gradients for solving linear systems,
        1952.

    Example:
        >>> a = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> found = conjugate_gradient(lambda x: x @ a, torch.tensor([3.0, 4.0]), tol=1e-6)
        >>> [round(value, 4) for value in found.value.tolist()], found.iterations
        ([1.0, 1.0], 2)
    """
    if b.ndim == 0:
        raise ValueError("b: expected (..., n), got a scalar")
    precondition = preconditioner or (lambda r: r)
    goal = tol * b.norm(dim=-1, keepdim=True)
    x, r = torch.zeros_like(b), b
    z = precondition(r)
    p, rz = z, (r * z).sum(-1, keepdim=True)
    iterations = 0
    while iterations < max_iter:
        active = r.norm(dim=-1, keepdim=True) > goal
        if not active.any():
            break
        q = matvec(p)
        alpha = _ratio(rz, (p * q).sum(-1, keepdim=True)).where(active, 0)
        x, r = x + alpha * p, r - alpha * q
        z = precondition(r)
        previous, rz = rz, (r * z).sum(-1, keepdim=True)
        p = z + _ratio(rz, previous) * p
        iterations += 1
    size = b.norm(dim=-1)
    worst = _ratio((b - matvec(x)).norm(dim=-1), size).max().item() if b.numel() else 0.0
    # The recursion's residual drifts from the true one by rounding, which is no failure.
    rounding = torch.finfo(b.dtype).eps * b.shape[-1]
    return Solution(x, worst <= max(2 * tol, rounding), iterations, worst)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """`a / b`, and 0 where b is 0."""
    return torch.where(b == 0, 0, a / b.where(b != 0, 1))


def ridge(
    features: Tensor,
    y: Tensor,
    ridge: float,
    *,
    solver: Literal["auto", "primal", "dual", "cg"] = "auto",
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Coefficients of a ridge regression: `argmin_v sum_i w_i (y_i - <phi_i, v>)^2 + ridge <v, v>`.

    Computed in float64 whatever the dtype of the data, as the normal equations square their
    condition number.

    Args:
        features: Rows phi_i, `(..., n, P)`; there is no intercept but what a column of ones gives.
        y: Targets, `(..., n)`, or `(..., n, k)` for k regressions on the same features.
        ridge: Penalty, at least 0.
        solver: `"primal"` factorises `(P, P)`, `"dual"` `(n, n)`, `"auto"` the smaller of the two;
            `"cg"` forms neither, and needs few iterations where the penalty is not small.
        sample_weight: Weights w_i of at least 0, `(..., n)`.

    Shape:
        - features: `(..., n, P)`
        - y: `(..., n)` or `(..., n, k)`
        - sample_weight: `(..., n)`
        - output: `(..., P)` or `(..., P, k)`

    Returns:
        The coefficients in the dtype of the features.

    Raises:
        ValueError: Shapes that don't fit, a negative penalty or weight, an unknown solver, or a
            penalty too small for features of deficient rank.

    Source:
        A. E. Hoerl and R. W. Kennard, Ridge regression: biased estimation for nonorthogonal
        problems, 1970; the dual form is `Phi^T (Phi Phi^T + ridge I)^-1 y`.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> ridge(features, torch.tensor([2.0, 2.0]), 1.0)
        tensor([1.0000, 0.8000])
    """
    one = y.ndim == features.ndim - 1
    columns = y.unsqueeze(-1) if one else y
    if features.ndim < 2 or columns.shape[:-1] != features.shape[:-1]:
        raise ValueError(
            "y: expected (..., n) or (..., n, k) for features (..., n, P), "
            f"got {tuple(y.shape)} for {tuple(features.shape)}"
        )
    if not ridge >= 0:
        raise ValueError(f"ridge: expected at least 0, got {ridge}")
    if solver not in ("auto", "primal", "dual", "cg"):
        raise ValueError(f"solver: expected 'auto', 'primal', 'dual' or 'cg', got {solver!r}")
    phi, target = features.double(), columns.double()
    if sample_weight is not None:
        if sample_weight.shape != features.shape[:-1] or (sample_weight < 0).any():
            raise ValueError(
                f"sample_weight: expected values of at least 0 of shape "
                f"{tuple(features.shape[:-1])}, got {tuple(sample_weight.shape)}"
            )
        root = sample_weight.double().sqrt().unsqueeze(-1)
        phi, target = root * phi, root * target
    n, size = features.shape[-2:]
    if solver == "cg":
        found = conjugate_gradient(
            lambda v: (v @ phi.mT) @ phi + ridge * v,
            (phi.mT @ target).mT,
            tol=1e-12,
            max_iter=10 * max(n, size),
        )
        if not found.converged:
            warnings.warn(
                f"ridge: relative residual {found.residual:.1e} after {found.iterations} steps",
                stacklevel=2,
            )
        coefficients = found.value.mT
    elif solver == "primal" or (solver == "auto" and size <= n):
        coefficients = _solve_shifted(phi.mT @ phi, ridge, phi.mT @ target)
    else:
        coefficients = phi.mT @ _solve_shifted(phi @ phi.mT, ridge, target)
    return (coefficients.squeeze(-1) if one else coefficients).to(features.dtype)


def _solve_shifted(gram: Tensor, ridge: float, b: Tensor) -> Tensor:
    """`(gram + ridge I)^-1 b` by Cholesky."""
    gram.diagonal(dim1=-2, dim2=-1).add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed.any():
        raise ValueError(f"ridge: too small for features of deficient rank, got {ridge}")
    return torch.cholesky_solve(b, factor)
