"""Networks of flat weights, many at once, and surrogates that are samples of such weights.

With weights theta, a Gaussian prior and Gaussian noise, minus the log posterior is

    U(theta) = sum_i (y_i - f(x_i; theta))^2 / (2 s^2) + theta^T theta / (2 prior_var).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from torchzoo.gp.bnn_surrogates import Function, StandardizedSurrogate
from torchzoo.gp.bnn_surrogates_posterior import FunctionSamples

CHUNK = 64  # weight samples that are evaluated at once


class FlatMLP:
    """A tanh network without weights of its own.

    Args:
        sizes: Widths of the input, hidden layers and output.

    Shape:
        - theta: `(..., P)`
        - x: `(..., n, sizes[0])`
        - output: `(..., n, sizes[-1])`

    Example:
        >>> net = FlatMLP((1, 8, 2))
        >>> theta = net.initial((5,), torch.zeros(1))  # five networks
        >>> net.size, net(theta, torch.zeros(3, 1)).shape
        (34, torch.Size([5, 3, 2]))
    """

    def __init__(self, sizes: Sequence[int]):
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes: expected at least two widths of at least 1, got {sizes}")
        self.sizes = tuple(sizes)
        self.shapes = [(out, fan_in) for fan_in, out in pairwise(self.sizes)]
        self.size = sum(out * (fan_in + 1) for out, fan_in in self.shapes)

    def layers(self, theta: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weights `(..., out, in)` and biases `(..., out)`; a row has its bias at its end."""
        parts = theta.split([out * (fan_in + 1) for out, fan_in in self.shapes], -1)
        joined = [
            part.unflatten(-1, (out, fan_in + 1))
            for part, (out, fan_in) in zip(parts, self.shapes, strict=True)
        ]
        return [(both[..., :-1], both[..., -1]) for both in joined]

    def initial(
        self, shape: Sequence[int], like: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Weights as `torch.nn.Linear` starts with them, uniform within `1 / sqrt(in)`."""
        bounds = torch.cat(
            [
                like.new_full((out * (fan_in + 1),), 1 / math.sqrt(fan_in))
                for out, fan_in in self.shapes
            ]
        )
        draws = like.new_empty(*shape, self.size).uniform_(-1, 1, generator=generator)
        return bounds * draws

    def activations(self, theta: Tensor, x: Tensor) -> list[Tensor]:
        """Inputs of all linear layers, the last that of the output layer."""
        found = [x]
        for weight, bias in self.layers(theta)[:-1]:
            found.append((found[-1] @ weight.mT + bias[..., None, :]).tanh())
        return found

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        weight, bias = self.layers(theta)[-1]
        return self.activations(theta, x)[-1] @ weight.mT + bias[..., None, :]

    def factors(self, theta: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each layer a and g such that the derivative by its rows is g a^T.

        Returns:
            Inputs with a 1 at their end, `(..., n, in + 1)`, and derivatives of the outputs by
            the layer's outputs, `(..., n, m, out)`.
        """
        inputs = self.activations(theta, x)
        layers = self.layers(theta)
        m = self.sizes[-1]
        slope = torch.eye(m, dtype=x.dtype, device=x.device).expand(*inputs[-1].shape[:-1], m, m)
        found = []
        for (weight, _), a in zip(reversed(layers), reversed(inputs), strict=True):
            ones = torch.ones_like(a[..., :1])
            found.append((torch.cat([a, ones], -1), slope))
            slope = (slope @ weight[..., None, :, :]) * (1 - a.square())[..., None, :]
        return found[::-1]


def potential(
    net: FlatMLP,
    theta: Tensor,
    x: Tensor,
    y: Tensor,
    *,
    prior_var: Tensor | float,
    noise_var: Tensor | float,
    weight: Tensor | None = None,
) -> Tensor:
    """Minus the log posterior of weights, up to a constant.

    Args:
        net: The network.
        theta: Weights.
        x: Inputs.
        y: Outputs.
        prior_var: Variance of the weights.
        noise_var: Variance of the noise.
        weight: Weight of each row.

    Shape:
        - theta: `(..., P)`
        - x, y: `(..., n, d)` and `(..., n, m)`
        - weight: `(..., n)`
        - output: `(...)`

    Example:
        >>> net, one = FlatMLP((1, 1)), torch.ones(1, 1)
        >>> potential(net, torch.tensor([2.0, 0.0]), one, one, prior_var=1.0, noise_var=0.5)
        tensor(3.)
    """
    misfit = (y - net(theta, x)).square().sum(-1)
    if weight is not None:
        misfit = weight * misfit
    return misfit.sum(-1) / (2 * noise_var) + theta.square().sum(-1) / (2 * prior_var)


def descend(loss: Callable[[Tensor], Tensor], start: Tensor, *, steps: int, lr: float) -> Tensor:
    """Adam on a loss whose entries, a row each, are independent.

    Example:
        >>> loss = lambda x: (x - 1).square().sum(-1)
        >>> found = descend(loss, torch.zeros(2, 1), steps=400, lr=0.1)
        >>> torch.allclose(found, torch.ones(2, 1), atol=1e-3)
        True
    """
    theta = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=lr)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            loss(theta).sum().backward()
            optimizer.step()
    return theta.detach()


class NetworkSurrogate(StandardizedSurrogate):
    """A surrogate that is a set of networks; a subclass finds their weights.

    Args:
        hidden: Widths of the hidden layers.
        prior_var: Variance of the prior of every weight.
        noise_var: Variance of the noise of standardised outputs.
        **kwargs: `bounds` and `generator`.
    """

    theta: Tensor

    def __init__(
        self,
        *,
        hidden: Sequence[int] = (128, 128, 128),
        prior_var: float = 10.0,
        noise_var: float = 0.1,
        **kwargs: Any,
    ):
        if any(width < 1 for width in hidden):
            raise ValueError(f"hidden: expected widths of at least 1, got {hidden}")
        for name, value in {"prior_var": prior_var, "noise_var": noise_var}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a number above 0, got {value}")
        super().__init__(**kwargs)
        self.hidden, self.prior_var, self.noise_var = tuple(hidden), prior_var, noise_var

    @abstractmethod
    def _sample(self, x: Tensor, z: Tensor) -> Tensor:
        """Weights `(S, *b, P)`; may change `noise`."""

    def _fit(self, x: Tensor, z: Tensor) -> None:
        self.net = self._network()
        self.noise = x.new_full(x.shape[:-2], self.noise_var)
        self.theta = self._sample(x, z)

    def _network(self) -> FlatMLP:
        return FlatMLP((self.x.shape[-1], *self.hidden, self.y.shape[-1]))

    def _posterior(self, x: Tensor) -> FunctionSamples:
        return FunctionSamples(self._values(self.theta, x), self.noise[..., None, None])

    def _values(self, theta: Tensor, x: Tensor) -> Tensor:
        """Values `(S, ..., *b, q, m)` of networks `(S, *b, P)`."""
        extra = x.ndim - 2 - (theta.ndim - 2)
        theta = theta.reshape(len(theta), *[1] * extra, *theta.shape[1:])
        return torch.cat([self.net(part, x) for part in theta.split(CHUNK)])

    def sample_function(self, n: int = 1) -> Function:
        """Draw networks, without replacement while there are enough.

        Returns:
            A function from `(..., *b, q, d)` to `(n, ..., *b, q, m)`.
        """
        self._check(None)
        if n < 1:
            raise ValueError(f"n: expected at least 1, got {n}")
        total = len(self.theta)
        if n <= total:
            index = torch.randperm(total, generator=self.generator)[:n]
        else:
            index = torch.randint(total, (n,), generator=self.generator)
        theta, shift, scale = self.theta[index.to(self.theta.device)], self._shift, self._scale

        def function(x: Tensor) -> Tensor:
            self._check(x)
            return shift + scale * self._values(theta, self._scaled(x.to(self.x)))

        return function

    def _state(self) -> dict[str, Tensor]:
        return {"theta": self.theta, "noise": self.noise}

    def _load(self, state: Mapping[str, Tensor]) -> None:
        self.theta, self.noise, self.net = state["theta"], state["noise"], self._network()
