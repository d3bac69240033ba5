"""Bases of univariate functions: what a Kolmogorov-Arnold layer makes of each input.

A basis with K functions takes `x (..., D)` to `B_k(x_i)`, `(..., D, K)`; a layer then mixes them
linearly, `y_o = sum_ik c_oik B_k(x_i)`. Inside, bases work on `(..., K, D)`: with the inputs last
and adjacent, each function is one vectorised pass, which with K = 8 functions last it is not.

Here are the protocol, the table of activations by name, and the bases without a grid:

    FourierBasis      cos(x), sin(x), cos(2x), sin(2x), ...
    ActivationBasis   fixed activations by name

Splines are in `spline_basis`, polynomials in `polynomial_basis`, bumps on a grid in `local_basis`,
pairs of activations in `pair_basis`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torchzoo import peers
from torchzoo.hub import ZooModel
from torchzoo.registry import Comparison, Example, register

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "gelu": F.gelu,
    "selu": F.selu,
    "tanh": torch.tanh,
}
"""Activations that layers of this family take by name."""


class UnivariateBasis(ZooModel):
    """K functions of one variable, applied to every input.

    A subclass sets `num_basis` and defines `evaluate`. Where each input has parameters of its own
    it sets `in_features`, and defines `select`.

    Attributes:
        num_basis: Number of functions K.
        grid_range: The interval of inputs that the functions are made for.
        in_features: Number of inputs D, where the basis is tied to one; else None.
    """

    num_basis: int
    grid_range: tuple[float, float] = (-1.0, 1.0)
    in_features: int | None = None

    def evaluate(self, x: Tensor) -> Tensor:
        """The functions of x (..., D), with the functions before the inputs: (..., K, D)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        self.check_inputs(x)
        return self.evaluate(x).mT

    def check_inputs(self, x: Tensor) -> None:
        """Raise the ValueError that `forward` raises for this x, if any."""
        width = "D" if self.in_features is None else str(self.in_features)
        wrong = self.in_features is not None and x.ndim > 0 and x.shape[-1] != self.in_features
        if x.ndim == 0 or wrong or not x.is_floating_point():
            raise ValueError(
                f"x: expected floating point of shape (..., {width}), "
                f"got {x.dtype} of shape {tuple(x.shape)}"
            )

    def reset_parameters(self) -> None:
        """Put the parameters, if any, to their start."""

    def select(self, inputs: Tensor) -> UnivariateBasis:
        """The basis of some of the inputs, by index: itself, where all inputs share one."""
        return self

    def extra_repr(self) -> str:
        return f"num_basis={self.num_basis}"


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raise a ValueError unless `value` is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")


def check_choice(name: str, value: object, choices: Sequence[str] | dict[str, object]) -> None:
    """Raise a ValueError unless `value` is one of the names."""
    if value not in list(choices):
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_range(grid_range: tuple[float, float]) -> tuple[float, float]:
    """The range as two floats; raises a ValueError unless it ascends."""
    low, high = grid_range
    if not low < high:
        raise ValueError(f"grid_range: expected low < high, got {grid_range!r}")
    return float(low), float(high)


def steps(count: int, like: Tensor) -> Tensor:
    """0, 1, .., count - 1 as a column `(count, 1)`, in the type and on the device of a tensor."""
    return torch.arange(count, dtype=like.dtype, device=like.device).unsqueeze(-1)


@register(
    example=lambda: Example(
        {"num_basis": 5},
        (torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),),
        bad_options={"num_basis": 0},
    ),
    compare=lambda: Comparison({"num_basis": 8}, (torch.randn(1024, 64),), peers.BASES),
)
class FourierBasis(UnivariateBasis):
    """Cosines and sines of whole multiples of the input: cos x, sin x, cos 2x, sin 2x, and so on.

    Args:
        num_basis: Number of functions K; the highest frequency is K / 2, rounded up.

    Shape:
        - x: `(..., D)`
        - output: `(..., D, K)`

    Returns:
        The functions of each input.

    Raises:
        ValueError: `num_basis` below 1, or x without dimensions.

    Source:
        Xu, Chen, Li, Yang, Wang, Hu and Ngai, FourierKAN-GCF: Fourier Kolmogorov-Arnold Network,
        2024, equation 8.

    Example:
        >>> FourierBasis(3)(torch.zeros(1)).tolist()
        [[1.0, 0.0, 1.0]]
    """

    grid_range = (-torch.pi, torch.pi)

    def __init__(self, num_basis: int = 12) -> None:
        super().__init__()
        check_count("num_basis", num_basis)
        self.num_basis = num_basis

    def evaluate(self, x: Tensor) -> Tensor:
        angle = x.unsqueeze(-2) * (steps((self.num_basis + 1) // 2, x) + 1)
        pairs = torch.stack([angle.cos(), angle.sin()], -2)  # (..., K/2, 2, D)
        return pairs.flatten(-3, -2)[..., : self.num_basis, :]


@register(
    example=lambda: Example(
        {"activations": ("silu", "tanh", "softplus")},
        (torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),),
        bad_options={"activations": ("silu", "sine")},
    ),
    compare=lambda: Comparison(
        {"activations": ("softplus", "sigmoid", "silu", "relu", "elu", "gelu", "selu", "tanh")},
        (torch.randn(1024, 64),),
        peers.BASES,
    ),
)
class ActivationBasis(UnivariateBasis):
    """Fixed activations as a basis, such as the SiLU of a layer's base branch.

    Args:
        activations: Names out of softplus, sigmoid, silu, relu, leaky_relu, elu, gelu, selu, tanh.

    Shape:
        - x: `(..., D)`
        - output: `(..., D, K)`, a function a name

    Returns:
        The activations of each input.

    Raises:
        ValueError: No name, an unknown one, or x without dimensions.

    Source:
        Liu, Wang, Vaidya, Ruehle, Halverson, Soljacic, Hou and Tegmark, KAN: Kolmogorov-Arnold
        Networks, 2024, equation 2.11 (the base function, here one of several).

    Example:
        >>> ActivationBasis(["relu", "tanh"])(torch.zeros(5, 2)).shape
        torch.Size([5, 2, 2])
    """

    def __init__(self, activations: Sequence[str] = ("silu",)) -> None:
        super().__init__()
        if not activations:
            raise ValueError("activations: expected at least one name, got none")
        for name in activations:
            check_choice("activations", name, list(ACTIVATIONS))
        self.activations = tuple(activations)
        self.num_basis = len(self.activations)

    def evaluate(self, x: Tensor) -> Tensor:
        return torch.stack([ACTIVATIONS[name](x) for name in self.activations], -2)

    def extra_repr(self) -> str:
        return ", ".join(self.activations)
