"""The residual block that state space layers are stacked by: `x + SSM(norm(x))`.

The layer itself ends with GELU, dropout and a gated linear map, so the block adds the norm before
it and the residual around it. Gu, Gupta, Goel and Re, "On the parameterization and initialization
of diagonal state space models", 2022.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchzoo import peers
from torchzoo.hub import ZooModel
from torchzoo.registry import Comparison, Example, register
from torchzoo.ssm.layer import SSMLayer


def layer_class(name: str) -> type[SSMLayer]:
    """The state space layer of this name, in any case, among those of the family.

    Raises:
        ValueError: There is none.
    """
    import torchzoo.ssm as family  # the block's own package: not there yet while it is imported

    for public in family.__all__:
        if public.lower() == name.lower():
            found = getattr(family, public)
            if isinstance(found, type) and issubclass(found, SSMLayer):
                return found
    raise ValueError(f"ssm: expected the name of a state space layer such as 'S4D', got {name!r}")


@register(
    example=lambda: Example(
        {"d_model": 4, "d_state": 6, "ssm": "S4D"},
        (torch.randn(2, 5, 4),),
        bad_options={"d_model": 0, "d_state": 5, "ssm": "LSTM", "dropout": 1.0},
    ),
    compare=lambda: Comparison(
        {"d_model": 256, "d_state": 64}, (torch.randn(4, 1024, 256),), peers.SEQUENCES
    ),
)
class S4Block(ZooModel):
    """Residual block around any state space layer of the family.

    Args:
        d_model: Features D.
        d_state: State size N of each feature, even.
        ssm: Name of the layer's class, such as `"S4D"`, in upper or lower case.
        dropout: Probability of dropping a feature of a sequence, at all steps together.
        options: Further options of the layer.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        - x: `(..., L, D)`
        - output: `(..., L, D)`
        - state: as the layer's
        - lengths: `(...)`

    Returns:
        The outputs; with `return_state=True` a pair of them and the state.

    Raises:
        ValueError: There is no such layer, an option out of its range, or tensors of other shapes.

    Source:
        Gu, Gupta, Goel and Re, "On the parameterization and initialization of diagonal state
        space models", 2022.

    Example:
        >>> block = S4Block(8, 16, ssm="S4D", init="legs", dropout=0.1)
        >>> block(torch.randn(2, 100, 8)).shape
        torch.Size([2, 100, 8])
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        ssm: str = "S4D",
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        layer: Any = layer_class(ssm)
        self.ssm: SSMLayer = layer(d_model, d_state, dropout=dropout, **options, **factory)
        self.norm = nn.LayerNorm(d_model, **factory)

    def reset_parameters(self) -> None:
        """Draw the layer anew and make the norm neutral."""
        self.ssm.reset_parameters()
        self.norm.reset_parameters()

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        rate: float = 1.0,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run over whole sequences; see `SSMLayer.forward`. Padding keeps its values."""
        self._check(x)
        y = self.ssm(self.norm(x), state, lengths=lengths, rate=rate, return_state=return_state)
        return (x + y[0], y[1]) if return_state else x + y

    def _check(self, x: Tensor) -> None:
        if x.ndim < 1 or x.shape[-1] != self.ssm.d_model:
            raise ValueError(f"x: expected {self.ssm.d_model} features, got shape {tuple(x.shape)}")

    def setup_step(self, rate: float = 1.0) -> None:
        """Prepare for many calls of `step`; see `SSMLayer.setup_step`."""
        self.ssm.setup_step(rate)

    def initial_state(self, *batch: int) -> Tensor:
        """The state of rest for sequences of these batch dimensions."""
        return self.ssm.initial_state(*batch)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run one step: x `(..., D)` and a state give outputs `(..., D)` and the next state."""
        self._check(x)
        y, state = self.ssm.step(self.norm(x), state)
        return x + y, state


@register(
    paper=107,
    example=lambda: Example(
        {"d_model": 4, "d_state": 6, "init": "inv", "bidirectional": True},
        (torch.randn(2, 5, 4),),
        bad_options={"d_model": 0, "d_state": 5, "dropout": 1.0, "disc": "euler"},
    ),
    compare=lambda: Comparison(
        {"d_model": 256, "d_state": 64}, (torch.randn(4, 1024, 256),), peers.SEQUENCES
    ),
)
class S4DBlock(S4Block):
    """Residual block around `S4D`: layer norm, S4D, GELU, dropout, gated linear map, residual.

    Args:
        d_model: Features D.
        d_state: State size N of each feature, even.
        dropout: Probability of dropping a feature of a sequence, at all steps together.
        options: Further options of `S4D` and its kernel.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        - x: `(..., L, D)`
        - output: `(..., L, D)`
        - state: `(..., D, N/2)`, complex
        - lengths: `(...)`

    Returns:
        The outputs; with `return_state=True` a pair of them and the state.

    Raises:
        ValueError: An option out of its range, or tensors of other shapes.

    Source:
        Gu, Gupta, Goel and Re, "On the parameterization and initialization of diagonal state
        space models", 2022.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 8), S4DBlock(8), S4DBlock(8), nn.Linear(8, 1))
        >>> model(torch.randn(2, 100, 1)).shape
        torch.Size([2, 100, 1])
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__(
            d_model,
            d_state,
            ssm="S4D",
            dropout=dropout,
            device=device,
            dtype=dtype,
            **options,
        )
