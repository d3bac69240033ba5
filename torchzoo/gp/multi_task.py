"""Several functions of the same inputs at once, by intrinsic coregionalisation.

The last input says which of T functions, the tasks, a value is of. With a kernel k of the other
inputs and a covariance B = W W^T + diag(v) of tasks, W of `(T, rank)`,

    cov(f_s(x), f_t(x')) = B_st k(x, x'),

so that of all tasks at all points is the Kronecker product B (x) K. Each task has its own mean.

E. V. Bonilla, K. M. A. Chai and C. K. I. Williams, "Multi-task Gaussian process prediction", 2007;
K. Swersky, J. Snoek and R. P. Adams, "Multi-task Bayesian optimization", 2013; P. I. Frazier, "A
tutorial on Bayesian optimization", 2018, section 5.5. Deviations: one noise for all tasks. The
kernel of tasks is gpytorch's `IndexKernel`; botorch's model with the same covariance, whose tasks
are correlated positively by default, is `torchzoo.gp.MultiTaskGP`.
"""

from __future__ import annotations

from typing import Self

import gpytorch
import torch
from gpytorch.kernels import IndexKernel, MaternKernel
from gpytorch.priors import GammaPrior
from torch import Tensor, nn

from torchzoo.gp.bnn_surrogates_gp import _ExactGP, _GPSurrogate


class _TaskMeans(gpytorch.means.Mean):
    """A constant for each task, which the last input names."""

    def __init__(self, num_tasks: int, batch: torch.Size):
        super().__init__()
        self.constant = nn.Parameter(torch.zeros(*batch, num_tasks))

    def forward(self, x: Tensor) -> Tensor:
        task = x[..., -1].long()
        wide = torch.broadcast_shapes(task.shape[:-1], self.constant.shape[:-1])
        constant = self.constant.expand(*wide, -1)
        return constant.gather(-1, task.expand(*wide, -1))


class MultiTaskSurrogate(_GPSurrogate):
    """Correlated Gaussian processes, one a task, with a Matérn-5/2 kernel, at the mode.

    Tasks may be correlated negatively. In `BayesOpt` the tasks are its fidelities: the last of them
    counts, and the others are worth their costs for what they tell of it. Priors are those of
    `GPSurrogate`, and none for the covariance of tasks.

    Args:
        num_tasks: Tasks.
        rank: Columns of W; None: as many as tasks.
        max_iter: Iterations of L-BFGS.
        bounds: Lower and upper ends of the inputs, the task not among them; None: the unit cube.
        generator: Draws on the CPU; None: a new one, seeded by torch's.

    Shape:
        - X: `(*b, n, d + 1)`; the last input is the task, 0 to T - 1
        - Y: `(*b, n, m)`
        - bounds: `(2, d)`

    Raises:
        ValueError: An option out of its range.

    Source:
        E. V. Bonilla, K. M. A. Chai and C. K. I. Williams, "Multi-task Gaussian process
        prediction", 2007, equations 1 and 2.

    Example:
        >>> x = torch.linspace(0, 1, 8, dtype=torch.float64).repeat(2)
        >>> task = torch.arange(2).repeat_interleave(8)
        >>> y = (6 * x).sin() * (1 - 2 * task) + 3 * task  # the second one is upside down
        >>> surrogate = MultiTaskSurrogate(2).fit(torch.stack([x, task], 1), y[:, None])
        >>> covariance = surrogate.task_covariance
        >>> covariance.shape, bool(covariance[0, 1] < 0)
        (torch.Size([2, 2]), True)
    """

    def __init__(
        self,
        num_tasks: int,
        *,
        rank: int | None = None,
        max_iter: int = 100,
        bounds: Tensor | None = None,
        generator: torch.Generator | None = None,
    ):
        rank = num_tasks if rank is None else rank
        for name, value in {"num_tasks": num_tasks, "max_iter": max_iter}.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not 1 <= rank <= num_tasks:
            raise ValueError(f"rank: expected within [1, {num_tasks}], got {rank}")
        if bounds is not None and bounds.ndim == 2 and len(bounds) == 2:
            unscaled = torch.tensor([[0.0], [1.0]]).to(bounds)
            bounds = torch.cat([bounds, unscaled], 1)
        super().__init__(bounds=bounds, generator=generator)
        self.num_tasks, self.rank, self.max_iter = num_tasks, rank, max_iter

    @property
    def task_covariance(self) -> Tensor:
        """B, of standardised values, `(*b, T, T)`; with several outputs `(*b, m, T, T)`."""
        self._check(None)
        found = self.model.kernel.kernels[1]._eval_covar_matrix().detach()
        return found[..., 0, :, :] if self.y.shape[-1] == 1 else found

    def fit(self, X: Tensor, Y: Tensor) -> Self:
        """Fit to data of all tasks.

        Raises:
            ValueError: Shapes that don't fit, numbers that are not finite, or a task that there
                isn't.
        """
        if X.ndim < 2 or X.shape[-1] < 2:
            raise ValueError(f"X: expected (..., n, d + 1), got {tuple(X.shape)}")
        task = X[..., -1]
        if not ((task == task.round()) & (task >= 0) & (task < self.num_tasks)).all():
            raise ValueError(f"X: expected tasks 0 to {self.num_tasks - 1} as last input")
        return super().fit(X, Y)

    def _build(self, x: Tensor, z: Tensor) -> _ExactGP:
        batch, d = z.shape[:-2] + z.shape[-1:], x.shape[-1] - 1
        matern = MaternKernel(
            nu=2.5,
            ard_num_dims=d,
            batch_shape=batch,
            active_dims=tuple(range(d)),
            lengthscale_prior=GammaPrior(3.0, 6.0),
        )
        tasks = IndexKernel(self.num_tasks, self.rank, batch_shape=batch, active_dims=(d,))
        # gpytorch's start is random: here tasks are alike, but not the same
        start = 0.3 * torch.eye(self.num_tasks, self.rank)
        start[:, 0] += 0.8
        tasks.initialize(covar_factor=start.expand_as(tasks.covar_factor).clone())
        tasks.var = torch.full_like(tasks.var, 0.1)
        return _ExactGP(x, z, matern * tasks, _TaskMeans(self.num_tasks, batch))
