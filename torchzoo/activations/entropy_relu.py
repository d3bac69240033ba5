"""CRReLU: ReLU corrected towards another entropy of its output, by a trained amount.

H. Sun, Z. Wu, B. Xia, P. Chang, Z. Dong, Y. Yuan, Y. Chang and X. Wang, "A Method on Searching
Better Activation Functions", 2024. For a Gaussian input the method (`torchzoo.activations.eafo`)
corrects ReLU on x > 0 in the direction x exp(−x²/2); carried on to x < 0 and scaled by a trained
number this is

    CRReLU(x) = max(0, x) + ε x exp(−x²/2),   ε = 0.01 at first.

The correction is largest at x = ±1, where it is ±0.61 ε, and gone for abs(x) > 4. On x > 0 the
entropy falls to first order where ε < 0 and rises where ε > 0; training chooses the sign.

Deviations: none; `num_parameters` is ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchzoo import peers
from torchzoo.activations.base import ActivationBase
from torchzoo.ops import crrelu
from torchzoo.registry import Comparison, Example, register

__all__ = ["CRReLU", "crrelu"]


@register(
    paper=3,
    example=lambda: Example(
        {"num_parameters": 4, "init": 0.3},
        (torch.randn(3, 4),),
        bad_options={"init": math.nan, "num_parameters": 0},
    ),
    compare=lambda: Comparison({}, (torch.randn(512, 4096),), peers.ACTIVATIONS),
)
class CRReLU(ActivationBase):
    """ReLU with a correction around zero whose size is learned.

    Args:
        init: First value of the size ε.
        num_parameters: 1 for one ε, or C for one for each of the last dimension's features.
        learnable: Whether ε learns; else it is a buffer.
        inplace: Write the result into the input. Backward needs the input, so a copy of it is kept
            where gradients are recorded.
        device: Where ε is held.
        dtype: Its type.

    Shape:
        - x: `(..., C)`
        - output: `(..., C)`, of the type of x

    Returns:
        max(0, x) + ε x exp(−x²/2).

    Raises:
        ValueError: `init` is not finite, `num_parameters` is not positive, or is neither 1 nor the
            last dimension of x.

    Source:
        H. Sun, Z. Wu, B. Xia, P. Chang, Z. Dong, Y. Yuan, Y. Chang and X. Wang, "A Method on
        Searching Better Activation Functions", 2024 (Correction Regularized ReLU).

    Example:
        >>> act = CRReLU()
        >>> act(torch.tensor([-1.0, 0.0, 1.0])).detach()
        tensor([-0.0061,  0.0000,  1.0061])
        >>> sorted(act.state_dict())
        ['eps']
    """

    eps: Tensor

    def __init__(
        self,
        init: float = 0.01,
        *,
        num_parameters: int = 1,
        learnable: bool = True,
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if not math.isfinite(init):
            raise ValueError(f"init: expected a finite number, got {init}")
        if num_parameters < 1:
            raise ValueError(f"num_parameters: expected 1 or more, got {num_parameters}")
        start = torch.full((num_parameters,), float(init), dtype=torch.float64, device="cpu")
        super().__init__("eps", start, learnable, device, dtype)
        self.init, self.num_parameters, self.inplace = init, num_parameters, inplace

    def forward(self, x: Tensor) -> Tensor:
        if self.num_parameters > 1 and x.shape[-1:] != self.eps.shape:
            raise ValueError(f"x: expected (..., {self.num_parameters}), got {tuple(x.shape)}")
        if not self.inplace:
            return crrelu(x, self.eps)
        return x.copy_(crrelu(x.clone() if torch.is_grad_enabled() else x, self.eps))

    def extra_repr(self) -> str:
        text = f"init={self.init:g}, num_parameters={self.num_parameters}"
        return text + (", inplace=True" if self.inplace else "")
