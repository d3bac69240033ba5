"""Solvers of small numerical problems that several families share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor


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
    best: tuple[Tensor, float, list[Tensor]] | None = None

    def evaluate() -> Tensor:
        nonlocal best
        with torch.enable_grad():
            loss = closure()
        slopes = torch.autograd.grad(loss, leaves, materialize_grads=True)
        for p, g in zip(leaves, slopes, strict=True):
            p.grad = g
        loss = loss.detach()
        if best is None and not loss.isfinite():
            raise ValueError(f"closure: expected a finite value at the start, got {loss.item()}")
        residual = max((g.abs().max().item() for g in slopes if g.numel()), default=0.0)
        if best is None or (loss, residual) < best[:2]:
            best = loss, residual, [p.detach().clone() for p in leaves]
        return loss

    try:
        optimizer.step(evaluate)
    finally:
        for p, g in zip(leaves, grads, strict=True):
            p.grad = g
    assert best is not None
    value, residual, point = best
    with torch.no_grad():
        for p, q in zip(leaves, point, strict=True):
            p.copy_(q)
    iterations = optimizer.state[leaves[0]]["n_iter"]
    return Solution(value, residual <= tol, iterations, residual)
