"""ProAct: clipped ReLUs that keep bit flips from spreading.

S. Mousavi, M. H. Ahmadilivani, J. Raik, M. Jenihhin and M. Daneshtalab, "ProAct: Progressive
Training for Hybrid Clipped Activation Function to Enhance Resilience of DNNs", 2024. With a bound
λ that learns and κ = 20,

    HyReLU(x) = max(0, x − x σ(κ (x − λ))) = max(0, x) σ(κ (λ − x)),

so that what is far above λ becomes 0. λ is one number a layer, but one a neuron in the last
activation layer ("hybrid"): bounds are stored too, and the more there are the more flips hit them.
`proact_bounds` starts them at the largest activation on training data; `ProActTrainer` then makes
them smaller.

Deviations: NaN gives 0 in all activations here, so that a flip that makes a NaN is stopped as one
that makes an infinity is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchzoo import peers
from torchzoo.activations.base import ActivationBase
from torchzoo.ops import bounded_relu, hyrelu
from torchzoo.registry import Comparison, Example, register

__all__ = ["ClipAct", "FitAct", "HybridClippedReLU", "Ranger", "hyrelu"]

Bound = float | list[Any] | Tensor


class _Clipped(ActivationBase):
    """A rectifier with a bound; `bound` is a parameter where it learns, else a buffer."""

    bound: Tensor

    def __init__(
        self,
        bound: Bound,
        learnable: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        start = torch.as_tensor(bound, dtype=torch.float64, device="cpu").detach().clone()
        if not start.numel() or not (start > 0).all():
            shown = bound if isinstance(bound, (int, float)) else f"the smallest {start.min()}"
            raise ValueError(f"bound: expected numbers > 0, got {shown}")
        super().__init__("bound", start, learnable, device, dtype)

    def _check(self, x: Tensor) -> None:
        """Raise for an input whose features the bound does not broadcast to."""
        bound, trailing = self.bound.shape, x.shape[max(x.ndim - self.bound.ndim, 0) :]
        if len(bound) != len(trailing) or any(
            b not in (1, n) for b, n in zip(bound, trailing, strict=True)
        ):
            raise ValueError(
                f"x: expected last dimensions that fit bound, {tuple(bound)}, got {tuple(x.shape)}"
            )

    def extra_repr(self) -> str:
        return f"features={tuple(self.bound.shape)}"


def _example(options: dict[str, Any], bad: dict[str, Any]) -> Callable[[], Example]:
    return lambda: Example(
        {"bound": [0.9, 1.1, 0.4, 2.0], **options},
        (torch.randn(3, 4),),
        bad_options={"bound": -1.0, **bad},
    )


@register(
    paper=121,
    example=_example({"sharpness": 5.0}, {"sharpness": 0.0}),
    compare=lambda: Comparison({"bound": [6.0] * 4096}, (torch.randn(512, 4096),), peers.BOUNDED),
)
class HybridClippedReLU(_Clipped):
    """ReLU that falls smoothly to zero above a bound which learns.

    Args:
        bound: First value of the bound λ, > 0: one number, or of a shape that broadcasts to the
            features of one sample.
        sharpness: κ, how steeply the output falls at the bound.
        learnable: Whether the bound is a parameter; else it is a buffer.
        hard: Compare exactly, x where 0 < x ≤ λ and else 0, for inference: the bound then gets no
            gradient.
        device: Where the bound is held.
        dtype: Its type.

    Shape:
        - x: `(..., *features)`
        - output: `(..., *features)`

    Returns:
        max(0, x) σ(κ (λ − x)), which is at most W(exp(κ λ − 1)) / κ, with Lambert's W; 0 for NaN
        and infinity.

    Raises:
        ValueError: The bound or κ is not positive, or x does not fit the bound.

    Source:
        S. Mousavi, M. H. Ahmadilivani, J. Raik, M. Jenihhin and M. Daneshtalab, "ProAct:
        Progressive Training for Hybrid Clipped Activation Function to Enhance Resilience of DNNs",
        2024 (hybrid clipped activation); the function is that of the authors' code.

    Example:
        >>> HybridClippedReLU(2.0)(torch.tensor([-1.0, 1.0, 2.0, 3e30])).detach()
        tensor([0., 1., 1., 0.])
    """

    def __init__(
        self,
        bound: Bound,
        *,
        sharpness: float = 20.0,
        learnable: bool = True,
        hard: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if not sharpness > 0:
            raise ValueError(f"sharpness: expected a number > 0, got {sharpness}")
        super().__init__(bound, learnable, device, dtype)
        self.sharpness, self.hard = sharpness, hard

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        if self.hard:
            return bounded_relu(x, self.bound.detach(), kind="below")
        return hyrelu(x, self.bound, sharpness=self.sharpness)

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, sharpness={self.sharpness:g}"
        return text + (", hard=True" if self.hard else "")


@register(
    paper=121,
    example=_example({"sharpness": 5.0}, {"sharpness": 0.0}),
    compare=lambda: Comparison({"bound": [6.0] * 4096}, (torch.randn(512, 4096),), peers.BOUNDED),
)
class FitAct(HybridClippedReLU):
    """The same smooth function with a bound for each neuron of every layer: a baseline.

    Args:
        bound: First values of the bounds, of the shape of one sample's features.
        sharpness: As for `HybridClippedReLU`.
        learnable: As for `HybridClippedReLU`.
        hard: As for `HybridClippedReLU`.
        device: Where the bounds are held.
        dtype: Their type.

    Shape:
        - x: `(..., *features)`
        - output: `(..., *features)`

    Returns:
        max(0, x) σ(κ (λ − x)).

    Raises:
        ValueError: As for `HybridClippedReLU`.

    Source:
        B. Ghavami, M. Sadati, Z. Fang and L. Shannon, "FitAct: Error Resilient Deep Neural Networks
        via Fine-Grained Post-Trainable Activation Functions", 2022.

    Example:
        >>> FitAct([1.0, 2.0])(torch.tensor([[1.0, 1.0]])).detach()
        tensor([[0.5000, 1.0000]])
    """


@register(
    paper=121,
    example=_example({}, {}),
    compare=lambda: Comparison({"bound": [6.0] * 4096}, (torch.randn(512, 4096),), peers.BOUNDED),
)
class Ranger(_Clipped):
    """ReLU that saturates at a bound: a baseline.

    Args:
        bound: The bound λ, > 0: one number, or of a shape that broadcasts to the features.
        device: Where the bound is held.
        dtype: Its type.

    Shape:
        - x: `(..., *features)`
        - output: `(..., *features)`

    Returns:
        min(max(0, x), λ); 0 for NaN.

    Raises:
        ValueError: The bound is not positive, or x does not fit it.

    Source:
        Z. Chen, G. Li and K. Pattabiraman, "A Low-cost Fault Corrector for Deep Neural Networks
        through Range Restriction", 2021.

    Example:
        >>> Ranger(2.0)(torch.tensor([-1.0, 1.0, 3e30]))
        tensor([0., 1., 2.])
    """

    def __init__(
        self,
        bound: Bound,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(bound, False, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return bounded_relu(x, self.bound, kind="saturate")


@register(
    paper=121,
    example=_example({}, {}),
    compare=lambda: Comparison({"bound": [6.0] * 4096}, (torch.randn(512, 4096),), peers.BOUNDED),
)
class ClipAct(_Clipped):
    """ReLU that gives zero above a bound, by comparison: a baseline.

    Args:
        bound: The bound λ, > 0: one number, or of a shape that broadcasts to the features.
        device: Where the bound is held.
        dtype: Its type.

    Shape:
        - x: `(..., *features)`
        - output: `(..., *features)`

    Returns:
        x where 0 < x ≤ λ, else 0.

    Raises:
        ValueError: The bound is not positive, or x does not fit it.

    Source:
        L.-H. Hoang, M. A. Hanif and M. Shafique, "FT-ClipAct: Resilience Analysis of Deep Neural
        Networks and Improving their Fault Tolerance using Clipped Activation", 2020.

    Example:
        >>> ClipAct(2.0)(torch.tensor([-1.0, 1.0, 3e30]))
        tensor([0., 1., 0.])
    """

    def __init__(
        self,
        bound: Bound,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(bound, False, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return bounded_relu(x, self.bound, kind="below")
