"""Covariances of fully connected networks of infinite width.

With inputs x in R^d, weights of variance v_w over the fan-in and biases of variance v_b,

    k_0(x, x') = v_b + v_w x^T x' / d,
    k_l(x, x') = v_b + v_w E[phi(u) phi(u')],    (u, u') ~ N(0, k_(l-1)),

the expectation in closed form, see `torchzoo.infinite.dual`. All of it comes from the Gram matrix
of the inputs, so memory is quadratic in their number whatever their dimension.

R. M. Neal, "Bayesian learning for neural networks", 1996; J. Lee and others, "Deep neural networks
as Gaussian processes", 2018; Y. L. Li, T. G. J. Rudner and A. G. Wilson, "A study of Bayesian
neural network surrogates for Bayesian optimization", 2024.
"""

from __future__ import annotations

import math
from typing import Any

from gpytorch.kernels import Kernel
from torch import Tensor

from torchzoo.infinite import dual


class _InfiniteWidthKernel(Kernel):
    """What the two share; a subclass names its activation."""

    has_lengthscale = False
    is_stationary = False
    activation: str

    def __init__(
        self,
        in_dim: int,
        var_w: float = 10.0,
        var_b: float = 1.6,
        depth: int = 3,
        **kwargs: Any,
    ):
        if in_dim < 1:
            raise ValueError(f"in_dim: expected at least 1, got {in_dim}")
        if not 0 < var_w < math.inf:
            raise ValueError(f"var_w: expected a number above 0, got {var_w}")
        if not 0 <= var_b < math.inf:
            raise ValueError(f"var_b: expected a number of at least 0, got {var_b}")
        if depth < 0:
            raise ValueError(f"depth: expected at least 0, got {depth}")
        super().__init__(**kwargs)
        self.in_dim, self.var_w, self.var_b, self.depth = in_dim, var_w, var_b, depth

    def forward(
        self,
        x1: Tensor,
        x2: Tensor,
        diag: bool = False,
        last_dim_is_batch: bool = False,
        **params: Any,
    ) -> Tensor:
        if last_dim_is_batch:
            raise ValueError("last_dim_is_batch: expected False, got True")
        for name, x in (("x1", x1), ("x2", x2)):
            if x.ndim < 2 or x.shape[-1] != self.in_dim:
                raise ValueError(f"{name}: expected (..., n, {self.in_dim}), got {tuple(x.shape)}")
        first, second = (x.square().sum(-1) / self.in_dim for x in (x1, x2))
        if diag:
            cross = (x1 * x2).sum(-1) / self.in_dim
        else:
            cross = x1 @ x2.mT / self.in_dim
            first, second = first[..., :, None], second[..., None, :]
        phi = dual(self.activation)
        first, second, cross = (self.var_b + self.var_w * part for part in (first, second, cross))
        for _ in range(self.depth):
            cross = self.var_b + self.var_w * phi.value(first, second, cross)
            first, second = (self.var_b + self.var_w * phi.diagonal(d) for d in (first, second))
        return cross

    def extra_repr(self) -> str:
        return (
            f"in_dim={self.in_dim}, var_w={self.var_w:g}, var_b={self.var_b:g}, depth={self.depth}"
        )


class InfiniteWidthReLUKernel(_InfiniteWidthKernel):
    """Covariance of a ReLU network of infinite width.

    Args:
        in_dim: Dimension of the inputs.
        var_w: Variance of the weights, times their fan-in.
        var_b: Variance of the biases.
        depth: Hidden layers; 0: a linear function.
        **kwargs: `batch_shape` and others of `gpytorch.kernels.Kernel`.

    Shape:
        - x1: `(..., n, in_dim)`
        - x2: `(..., m, in_dim)`
        - output: `(..., n, m)`

    Returns:
        As every gpytorch kernel, a lazy covariance matrix.

    Raises:
        ValueError: An option out of its range, or inputs of another dimension.

    Source:
        Y. L. Li and others, "A study of Bayesian neural network surrogates for Bayesian
        optimization", 2024; Y. Cho and L. K. Saul, "Kernel methods for deep learning", 2009.

    Example:
        >>> import torch
        >>> kernel = InfiniteWidthReLUKernel(1, var_w=2.0, var_b=0.5, depth=1)
        >>> x = torch.tensor([[1.0]])
        >>> kernel(x).to_dense()  # 0.5 + 2 (0.5 + 2) / 2
        tensor([[3.]])
    """

    activation = "relu"


class InfiniteWidthErfKernel(_InfiniteWidthKernel):
    """Covariance of a network of infinite width with the error function as activation.

    Args:
        in_dim: Dimension of the inputs.
        var_w: Variance of the weights, times their fan-in.
        var_b: Variance of the biases.
        depth: Hidden layers; 0: a linear function.
        **kwargs: `batch_shape` and others of `gpytorch.kernels.Kernel`.

    Shape:
        - x1: `(..., n, in_dim)`
        - x2: `(..., m, in_dim)`
        - output: `(..., n, m)`

    Returns:
        As every gpytorch kernel, a lazy covariance matrix.

    Raises:
        ValueError: An option out of its range, or inputs of another dimension.

    Source:
        Y. L. Li and others, "A study of Bayesian neural network surrogates for Bayesian
        optimization", 2024; C. K. I. Williams, "Computation with infinite neural networks", 1998,
        equation 11.

    Example:
        >>> import torch
        >>> kernel = InfiniteWidthErfKernel(2, var_b=1.3)
        >>> x = torch.rand(5, 2)
        >>> bool((kernel(x).diagonal() < 11.3).all())  # at most var_b + var_w
        True
    """

    activation = "erf"
